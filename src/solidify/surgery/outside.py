"""What a change was not asked to change, compared with what it was: by values, or by what shows a write without a copy.

Of a small model there are copies of all values. Of a bounded one a write is seen by the number of writes that torch
counts (not through `.data`), by the pages of a mapped file that became the process's own and are no longer the file's,
and, of what is in memory, by the values of small tensors and a sample of those of others. What a forward moves in
buffers is put back by whoever runs it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from solidify.errors import SurgeryError
from solidify.surgery.snapshot import is_within
from solidify.upstream.torch import own_buffers, own_parameters, unsaved_buffers, writes
from solidify.weights import mapped
from solidify.weights.format import same_bits

_NAMED = 6  # at most, in a message
_SAMPLE = 64  # values of a tensor, at most
_SMALL = 2**16  # bytes of a tensor that is copied whole: it may lie in a page that a neighbour was written to in


class Outside:
    """The tensors of a model's state that stand under no name that is to be changed, as they are now."""

    def __init__(self, model: nn.Module, changes: Collection[str], copies: Mapping[int, torch.Tensor]) -> None:
        self._model, self._changes = model, frozenset(changes)
        tensors = self._tensors = self._list_tensors()
        bare = {name: tensor for name, tensor in tensors.items() if id(tensor) not in copies and not tensor.is_meta}
        regions = mapped.file_regions(bare) if bare else {}
        self._values = {name: (t, copies[id(t)]) for name, t in tensors.items() if id(t) in copies and not t.is_meta}
        self._traces = {name: _Trace.of(tensor, regions.get(name)) for name, tensor in bare.items()}

    def _list_tensors(self) -> dict[str, torch.Tensor]:
        """Returns parameters, and the buffers that a state holds, by every name that they have."""
        found: dict[str, torch.Tensor] = {}
        for owner, module in self._model.named_modules(remove_duplicate=False):
            if is_within(owner, self._changes):
                continue
            unsaved = unsaved_buffers(module)
            held = (*own_parameters(module).items(), *own_buffers(module).items())
            for key, tensor in held:
                name = f"{owner}.{key}" if owner else key
                if tensor is not None and key not in unsaved and name not in self._changes:
                    found[name] = tensor
        return found

    def list_changed(self) -> list[str]:
        """Names the tensors that are gone, new, or others, hold other values, or share them with others than before."""
        now = self._list_tensors()
        changed = [n for n, (_, values) in self._values.items() if n not in now or not same_bits(now[n], values)]
        changed += [n for n, trace in self._traces.items() if n not in now or trace.is_other(now[n])]
        changed += now.keys() - self._tensors.keys()
        ties = {name for group in _group_tied(self._tensors) ^ _group_tied(now) for name in group}
        return list(dict.fromkeys([*changed, *sorted(ties)]))

    def list_lost(self) -> list[str]:
        """Names the tensors that were written to in their own memory, and of which no copies are kept."""
        return [name for name, trace in self._traces.items() if trace.is_overwritten()]

    def refuse_changes(self) -> None:
        """Raises SurgeryError for what is no longer what it was."""
        refuse_changed(self.list_changed())


def refuse_changed(changed: Sequence[str]) -> None:
    """Raises SurgeryError if something outside of what is changed, here by name, is no longer what it was."""
    if not changed:
        return
    more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
    raise SurgeryError(
        f"{', '.join(changed[:_NAMED])}{more}: outside what is changed, but no longer what it was before the "
        "change; a constructor, `adopt` and `forward` may read what other modules hold, and write to what is "
        "their own alone: have them work on a copy, and put back what they set"
    )


def _group_tied(tensors: Mapping[str, torch.Tensor]) -> set[frozenset[str]]:
    """Returns the names that stand for one tensor, where they are several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


@dataclass(frozen=True)
class _Trace:
    """A tensor of whose values there is no copy: its memory (`data`), how often it was written to, and the part of a
    file that it is (`region`), or else a sample."""

    tensor: torch.Tensor
    data: torch.Tensor
    writes: int
    region: tuple[Path, int] | None
    sample: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor, region: tuple[Path, int] | None) -> _Trace:
        """Looks at a tensor, one that is an unchanged part of a file or not."""
        sample = None if region is not None else _copy_some(tensor.data)  # to read a mapped one, the disk must, too
        return cls(tensor, tensor.data, writes(tensor), region, sample)

    def is_overwritten(self) -> bool:
        """Returns whether the tensor's own memory was written to."""
        if writes(self.tensor) != self.writes:
            return True
        if self.region is not None:
            return mapped.differs_from_file(self.data, self.region)
        return self.sample is not None and not same_bits(_copy_some(self.data), self.sample)

    def is_other(self, now: torch.Tensor) -> bool:
        """Returns whether what stands at the tensor's name is another than it was; it may have moved in memory."""
        moved = now is not self.tensor or _lie(now) != _lie(self.data)
        return self.is_overwritten() or (moved and not same_bits(now, self.data))


def _lie(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Returns where and how a tensor lies in memory, and whether it is read as it lies."""
    if tensor.is_meta:
        return ()
    return tensor.data_ptr(), tensor.stride(), tensor.is_conj(), tensor.is_neg()


def _copy_some(data: torch.Tensor) -> torch.Tensor:
    """Copies a small tensor, and some values of a larger one."""
    return data.clone() if data.nbytes <= _SMALL else take_sample(data)


def take_sample(data: torch.Tensor) -> torch.Tensor:
    """Copies at most 64 values of a tensor, spread over it: the same ones, however it lies in memory."""
    if not data.ndim or not data.numel():
        return data.clone()
    numbers = torch.arange(0, data.numel(), -(-data.numel() // _SAMPLE), device=data.device)
    return data[torch.unravel_index(numbers, data.shape)]
