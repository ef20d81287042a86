"""Which tensor of an original a new module took over: told by building it once more, on numbers that are nobody else's.

Values alone cannot tell: norms of ones that were taken over equal norms of ones that were made anew, and on the meta
device there are none. So the module is built on a stand-in of the original, whose every tensor holds random numbers of
its own, and takes over from it; what equals one of these afterwards, descends from it. `plan` and build both ask here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from solidify.behaviour import calling
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.surgery.outside import take_sample
from solidify.system import foreign


@dataclass(frozen=True)
class Original:
    """What an original held before a new module was built: its tensors, and, of a small model, their values."""

    kind: str
    parameters: int
    tensors: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls, original: nn.Module, *, with_values: bool, copies: Mapping[int, torch.Tensor] = MappingProxyType({})
    ) -> Original:
        """Looks at an original; `copies` of values that were made already are by their tensors' `id`."""
        state = original.state_dict(keep_vars=True)
        held = {key: t for key, t in state.items() if not t.is_meta} if with_values else {}
        values = {key: copies[id(t)] if id(t) in copies else t.detach().clone() for key, t in held.items()}
        return cls(type(original).__name__, anatomy.count(original.parameters()), dict(state), values)

    def open_questions(self, new: nn.Module) -> list[str]:
        """Names the new module's tensors that may descend from one of the original's that does not stand in it."""
        state = new.state_dict(keep_vars=True)
        standing, olds = ({id(tensor) for tensor in each.values()} for each in (state, self.tensors))
        free = {(tensor.shape, tensor.dtype) for tensor in self.tensors.values() if id(tensor) not in standing}
        return [key for key, tensor in state.items() if id(tensor) not in olds and (tensor.shape, tensor.dtype) in free]

    def ledger(
        self, name: str, new: nn.Module, traced: Mapping[str, str] | None
    ) -> tuple[dict[str, str | None], tuple[str, ...], tuple[str, ...]]:
        """Finds for every tensor of a new module the tensor of the original that it equals bit for bit.

        `traced` says which the module takes over whatever their values, None that this is not known. Returns full
        names: origins by new name (None for a new tensor), the original's tensors that live on nowhere, and those of
        the new ones that could be either, on the meta device.
        """
        tensors: dict[str, str | None] = {}
        state = new.state_dict(keep_vars=True)
        for key, tensor in state.items():
            candidates = [key, *(k for k in self.tensors if key.endswith("." + k)), *self.tensors]
            origin = next((k for k in candidates if k in self.tensors and self._is_same(k, tensor)), None)
            source = (traced or {}).get(key)
            if origin is None and source is not None and self._has_values(source, tensor):
                origin = source
            tensors[f"{name}.{key}"] = None if origin is None else f"{name}.{origin}"
        used = {origin for origin in tensors.values() if origin is not None}
        dropped = tuple(f"{name}.{key}" for key in self.tensors if f"{name}.{key}" not in used)
        open_ = self.open_questions(new) if traced is None else []
        return tensors, dropped, tuple(f"{name}.{key}" for key in open_ if state[key].is_meta)

    def find_overwritten(self, name: str, new: nn.Module, ledger: Mapping[str, str | None]) -> list[tuple[str, str]]:
        """Returns which parameters that are the original's by the `ledger` no longer have its values: names, old ones.

        Some values of each are compared: that they all were its own was seen when the ledger was made. Of a large
        model, of whose values there is no copy, nothing is known.
        """
        if not self.values:
            return []
        named = {f"{name}.{key}": parameter for key, parameter in new.named_parameters(remove_duplicate=False)}
        found = []
        for key, origin in ledger.items():
            before = self.values.get(origin.removeprefix(f"{name}.")) if origin is not None else None
            if before is not None and key in named and not _are_alike(before, named[key].data):
                found.append((key, str(origin)))
        return found

    def _is_same(self, key: str, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor is one of the original, with the values that it had before the user's code ran."""
        if tensor is self.tensors[key]:
            return self.values.get(key, tensor) is tensor or self._has_values(key, tensor)
        if tensor.is_meta or not self._has_values(key, tensor):
            return False
        # A constant tensor (a fresh bias of zeros, say) equals every other such: that is no sign of descent.
        return tensor.numel() > 1 and bool((tensor != tensor.reshape(-1)[0]).any())

    def _has_values(self, key: str, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor has the values of the original's; where neither has any, whether it could have."""
        before = self.values.get(key, self.tensors[key])
        if before.shape != tensor.shape or before.dtype != tensor.dtype or before.is_meta != tensor.is_meta:
            return False
        return before.is_meta or torch.equal(before, tensor)


def trace(original: nn.Module, build: Callable[[nn.Module], nn.Module]) -> dict[str, str] | None:
    """Returns which tensor of the original each tensor of the new module is a copy of, by their names within.

    `build` makes the new module for a given original, and has it take over from it. Random numbers that it draws are
    put back. None where that cannot be told: the original is large, or it cannot be copied or built upon.
    """
    if not Extent.of(original).whole:
        return None
    with calling.chance_kept():
        return foreign.attempt(_trace_tensors, original, build).value


def _trace_tensors(original: nn.Module, build: Callable[[nn.Module], nn.Module]) -> dict[str, str]:
    stand_in = _stand_in(original)
    before = {key: tensor.detach().clone() for key, tensor in stand_in.state_dict(keep_vars=True).items()}
    new = build(stand_in).state_dict(keep_vars=True)
    found: dict[str, str] = {}
    for key, tensor in new.items():
        candidates = [key, *(k for k in before if key.endswith("." + k)), *before]
        origin = next((k for k in candidates if k in before and _are_equal(before[k], tensor)), None)
        if origin is not None:
            found[key] = origin
    return found


def _stand_in(original: nn.Module) -> nn.Module:
    """Copies a module without its numbers, onto the CPU, and gives every tensor its own."""
    held = [*original.parameters(), *original.buffers()]
    memo: dict[int, object] = {}
    for tensor in held:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        memo[id(tensor)] = (
            nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        )
    made = copy.deepcopy(original, memo)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in {id(t): t for t in (*made.parameters(), *made.buffers())}.values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.random_(0, 2, generator=generator)
    return made


def _are_alike(before: torch.Tensor, tensor: torch.Tensor) -> bool:
    return before.shape == tensor.shape and torch.equal(take_sample(before), take_sample(tensor))


def _are_equal(before: torch.Tensor, tensor: torch.Tensor) -> bool:
    if before.shape != tensor.shape or before.dtype != tensor.dtype:
        return False
    return before.is_floating_point() and bool(before.numel()) and torch.equal(before, tensor)
