"""What a merged model's files hold of every changed tensor, read back and compared with the files of base and adapter.

For models that are too large to be run. safetensors reads the adapter, and what a low-rank update comes to is computed
in `sums`: of the merge its plan is used (which of the adapter's tensors change which tensor, by what settings) and its
reader of layouts, and not its reading of the adapter, its arithmetic or its writing. Of large tensors some rows are
compared, evenly spread, the first and the last among them; of stacks some experts, at some rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from torch import nn

from solidify.adapter import storage
from solidify.behaviour.values import substitute_entries
from solidify.errors import ArtifactError
from solidify.findings import Finding
from solidify.merging import sums
from solidify.merging.mathematics import NAME, Change, Merger
from solidify.merging.rewriting import Prepared
from solidify.merging.sums import Off
from solidify.system import console
from solidify.upstream.torch import own_parameters
from solidify.weights import checkpoint
from solidify.weights.format import same_bits
from solidify.weights.reverting import Stored, Unit

_WHOLE, _SAMPLED = 2**18, 2**16  # numbers: a tensor with more is sampled, at about so many
_LEAST = 3  # rows of a sampled tensor
_SAME, _OTHER = Off(0.0), Off(math.inf)
_EVERY = slice(None)


@dataclass
class Comparison:
    """How far each tensor is off that was compared, by name; `sampled` are those of which some rows were."""

    found: dict[str, Off] = field(default_factory=dict)
    sampled: set[str] = field(default_factory=set)

    def finding(self, changed: Sequence[str]) -> Finding:
        """Judges what was compared of all changed tensors: no proof, unless that was every row of every one."""
        if not self.found:
            return Finding.unseen(sums.SUM, f"none of {len(changed)} changed tensors was read back")
        faults = [line for name, off in self.found.items() for line in sums.fault(name, off)]
        faults = faults or sums.fault("all of them together", Off.of_all(list(self.found.values())))
        every = set(changed) <= self.found.keys()
        counted = f"all {len(changed)} changed" if every else f"{len(self.found)} of {len(changed)} changed"
        part = f" ({len(self.sampled)} of them at some rows)" if self.sampled else ""
        evidence = f"{counted} tensors, read back, are W + s·B·A, computed here and rounded{part}"
        proved = True if every and not self.sampled else None
        return Finding(sums.SUM, False if faults else proved, "; ".join(faults[:4]) or evidence)


def compare(prepared: Prepared, adapter: Path, directory: Path) -> Comparison:
    """Compares every changed tensor of the merged model in `directory` with what base and adapter add up to.

    Raises:
        ArtifactError: the directory lacks a tensor of the base, or the base one that the adapter changes.
    """
    made = Comparison()
    after = prepared.stored.at(checkpoint.read(directory))
    with console.stage("Reading back"), safe_open(adapter / storage.WEIGHTS, "pt") as given:
        for name, change in prepared.merger.changes.items():
            before, merged = _locate(prepared, after, name)
            reading = _Reading(prepared.merger, change, given, before, merged)
            off, every = reading.compare()
            made.found[name] = off
            made.sampled |= set() if every else {name}
    return made


def _locate(prepared: Prepared, after: Stored, name: str) -> tuple[Unit, Unit]:
    """Returns where a tensor stands in the base and in the result.

    One that is tied to another stands there under the other's name, if the result did not get one of its own.
    """
    units = prepared.stored.units
    tied = (other for group in prepared.ties if name in group for other in group if other in units)
    source = name if name in units else next(tied, None)
    if source is None:
        raise ArtifactError(f"the base holds no {name}, which the adapter changes")
    merged = after.units[source]
    if source != name and (own := after.checkpoint.entries.get(prepared.stored.key_of(name))) is not None:
        merged = Unit(after, {source: own.shape}, own, None, merged.rows)
    return units[source], merged


@dataclass
class _Reading:
    """One changed tensor: how the adapter changes it (whose file is `given`), in the base and in the result."""

    merger: Merger
    change: Change
    given: Any
    before: Unit
    after: Unit

    @property
    def name(self) -> str:
        """Its name in the base's model, or that of the tensor that it is tied to."""
        return next(iter(self.after.shapes)) if self.after.entry is not None else self.change.name

    def compare(self) -> tuple[Off, bool]:
        """Returns how far it is off, and whether that is of all of it."""
        offs, every = [], True
        with substitute_entries(self._list_factors()):
            for part in self._choose_parts():
                off, whole = self._compare_part(part)
                offs.append(off)
                every = every and whole and part is None
        return Off.of_all(offs), every

    def _choose_parts(self) -> Iterator[range | None]:
        """Chooses parts along the first axis, evenly spread, and all rows of tokens that were trained alone."""
        sizes, rows = self.after.shapes[self.name].sizes, self.after.rows
        numbers = math.prod(sizes)
        if not rows or numbers <= _WHOLE or self._needs_all():
            yield None
            return
        width = 1 if self.after.entry is not None else 2  # one expert alone may be no list of experts
        count = min(max(_LEAST, _SAMPLED * rows // numbers), rows - width + 1)
        places = {round(number * (rows - width) / (count - 1)) for number in range(count)} if count > 1 else {0}
        for place in sorted(places | {*(self.change.tokens or ())}):
            yield range(place, place + width)

    def _needs_all(self) -> bool:
        """Returns whether an element depends on others along the first axis: norms of DoRA where inputs stand first."""
        layer = self.change.layer
        return layer is not None and bool(layer.use_dora.get(NAME)) and sums.row_axis(layer) == 1

    def _compare_part(self, part: range | None) -> tuple[Off, bool]:
        found = self.after.read(part)[self.name]
        change, layer = self.change, self.change.layer
        own = change.instead or (change.keys[0] if layer is None and change.tokens is None else None)
        base = self.before.read(part)[self.name] if own is None else self._read_given(own, part).to(found.dtype)
        if layer is None:
            wanted = base if change.tokens is None else self._with_rows(base, part)
            return (_SAME if same_bits(wanted, found) else _OTHER), True
        places = _EVERY if part is None else slice(part.start, part.stop)
        if change.name.endswith(".bias"):
            return sums.off_by(sums.bias(layer, NAME, base, places), found), True
        rows = self._choose_rows(found)
        expected = sums.weight(layer, NAME, base, places, rows)
        return sums.off_by(expected, sums.rows_at(found, sums.row_axis(layer), rows)), rows == _EVERY

    def _choose_rows(self, found: torch.Tensor) -> slice:
        """Chooses rows of the output within a large stack of experts, or within what could not be read in parts."""
        layer = self.change.layer
        stacked = isinstance(layer, ParamWrapper) and found.ndim == 3
        if not stacked or found.numel() <= _WHOLE:
            return _EVERY
        assert layer is not None
        step = min(-(-found.numel() // _SAMPLED), max(1, found.shape[sums.row_axis(layer)] // _LEAST))
        return slice(step // 2, None, step)

    def _with_rows(self, base: torch.Tensor, part: range | None) -> torch.Tensor:
        """Puts the adapter's rows of tokens into some rows of the base."""
        first = 0 if part is None else part.start
        expected = base.clone()
        for place in range(len(base)):
            if (row := self._places.get(first + place)) is not None:
                expected[place] = self._given_rows[row].to(base.dtype)
        return expected

    @cached_property
    def _places(self) -> dict[int, int]:
        """Where the rows of tokens stand in the adapter, by the tokens' numbers."""
        return {number: place for place, number in enumerate(self.change.tokens or ())}

    @cached_property
    def _given_rows(self) -> torch.Tensor:
        return self._read_given(self.change.keys[0], None)

    def _read_given(self, key: str, part: range | None) -> torch.Tensor:
        """Reads a tensor of the adapter, or some of it along the first axis."""
        tensor: torch.Tensor = self.given.get_slice(key)[part.start : part.stop] if part else self.given.get_tensor(key)
        return tensor

    def _list_factors(self) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
        """Reads the adapter's factors of a layer, and returns each with its place there."""
        change = self.change
        return [
            (own_parameters(owner), attribute, nn.Parameter(self.given.get_tensor(key), requires_grad=False))
            for key in (change.keys if change.layer is not None else ())
            if key != change.instead
            for owner, attribute in [self.merger.parts[key]]
        ]
