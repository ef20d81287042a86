"""A checkpoint read as a model's state and written back in its own layout, a part of a tensor at a time.

Written against transformers 5.23, undocumented: `revert_weight_conversion` of `core_model_loading.py`, by which
`save_pretrained` goes back to the checkpoint's layout. What it makes is made forwards again and compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from solidify.errors import ArtifactError, refuse
from solidify.upstream.transformers import (
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    optional_keys,
    rename_source_key,
    revert_weight_conversion,
    set_conversions,
)
from solidify.weights import layout
from solidify.weights.checkpoint import Checkpoint
from solidify.weights.format import Entry, Shape
from solidify.weights.layout import Conversion


@dataclass(frozen=True)
class Unit:
    """Tensors in memory and tensors of a checkpoint that are made of each other.

    `rows` is the length of the first axis when the unit can be read and written in parts along it, else 0.
    """

    owner: Stored
    shapes: dict[str, Shape]
    entry: Entry | None
    conversion: Conversion | None
    rows: int

    @property
    def keys(self) -> list[str]:
        """The names in the checkpoint."""
        return [self.entry.name] if self.entry is not None else self._select_part(None).keys

    def keys_of(self, rows: range | None) -> list[str]:
        """Returns the names in the checkpoint that a part belongs to."""
        return [self.entry.name] if self.entry is not None else self._select_part(rows).keys

    def read(self, rows: range | None = None) -> dict[str, torch.Tensor]:
        """Reads the tensors as they are in memory, or some rows of them."""
        if self.entry is not None:
            (name,) = self.shapes
            return {name: rows_of(self.entry, rows).read()}
        part, entries = self._select_part(rows), self.owner.checkpoint.entries
        made = part.make(self.owner.model, {key: entries[key].read() for key in part.keys})
        return {name: made[name] for name in self.shapes}

    def written(self, tensors: Mapping[str, torch.Tensor], rows: range | None = None) -> dict[str, torch.Tensor]:
        """Turns tensors as they are in memory (or some rows of them) into those of the checkpoint.

        Raises:
            ArtifactError: transformers' conversion does not lead back to the checkpoint's own names or values.
        """
        if self.entry is not None:
            (name,) = self.shapes
            return {self.entry.name: tensors[name]}
        part = self._select_part(rows)
        found = self.owner.revert(part, tensors)
        entries = self.owner.checkpoint.entries
        fits = set(found) == set(part.keys) and all(
            tensor.shape == entries[key].shape.sizes and tensor.dtype == entries[key].shape.dtype
            for key, tensor in found.items()
        )
        again = part.make(self.owner.model, found) if fits else {}
        if not fits or not all(torch.equal(again[name], tensors[name]) for name in self.shapes):
            raise ArtifactError(
                f"transformers' conversion of {', '.join(self.shapes)} does not lead back to the checkpoint's layout"
            )
        return found

    def _select_part(self, rows: range | None) -> Conversion:
        assert self.conversion is not None
        if rows is None or not self.rows:
            return self.conversion
        sources = {p: keys[rows.start : rows.stop] for p, keys in self.conversion.sources.items()}
        return replace(self.conversion, sources=sources)


class Stored:
    """A checkpoint as the state of a model, whose tensors get the checkpoint's dtypes (it is on the meta device).

    Raises:
        ArtifactError: a tensor of the model is missing in the checkpoint, or has another shape there.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self.model, self.checkpoint = model, checkpoint
        try:
            self._take_dtypes(layout.read(model, checkpoint))
            self.layout = layout.read(model, checkpoint)
        except (RuntimeError, ValueError) as error:  # tensors that a rule cannot put together
            raise ArtifactError(f"the weights in {checkpoint.directory} do not fit their class: {error}") from error
        self._mapping = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in self._mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self._mapping if isinstance(rule, WeightConverter)]
        self._state = dict(model.state_dict())
        units = [self._make_plain(name, checkpoint.entries[key]) for name, key in self.layout.stored.items()]
        units += [self._make_converted(conversion) for conversion in self.layout.conversions]
        self.units = {name: unit for unit in units for name in unit.shapes}
        refuse(ArtifactError, f"the weights in {checkpoint.directory} do not fit their class", self._find_faults())
        for key in checkpoint.entries:
            self._rename_key(key)  # by which the rules learn that they were used
        set_conversions(model, [rule for rule in self._mapping if rule.was_used()])

    def at(self, checkpoint: Checkpoint) -> Stored:
        """Returns the same tensors as another checkpoint of the same layout has them.

        Raises:
            ArtifactError: it lacks one of them.
        """
        lacking = [key for key in self.checkpoint.entries if key not in checkpoint.entries]
        refuse(ArtifactError, f"{checkpoint.directory} is incomplete", [f"{key} is missing" for key in lacking[:4]])
        other = copy(self)
        other.checkpoint = checkpoint
        other.units = {
            name: replace(unit, owner=other, entry=unit.entry and checkpoint.entries[unit.entry.name])
            for name, unit in self.units.items()
        }
        return other

    def _take_dtypes(self, found: layout.Layout) -> None:
        entries = self.checkpoint.entries
        dtypes = {name: entries[key].shape.dtype for name, key in found.stored.items()}
        for conversion in found.conversions:
            dtypes |= dict.fromkeys(conversion.targets, entries[conversion.keys[0]].shape.dtype)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name in dtypes and tensor.dtype != dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])

    def _find_faults(self) -> list[str]:
        state = self.model.state_dict(keep_vars=True)
        there = {id(state[name]) for name in self.units if name in state}
        ignored = [re.compile(pattern) for pattern in optional_keys(self.model)]
        missing = [
            f"missing_keys: {name}"
            for name, tensor in state.items()
            if name not in self.units
            and id(tensor) not in there
            and name not in self.model.all_tied_weights_keys
            and not any(pattern.search(name) for pattern in ignored)
        ]
        return missing + [
            f"mismatched_keys: {name} has shape {list(unit.shapes[name].sizes)} and not {list(state[name].shape)}"
            for name, unit in self.units.items()
            if name in state and unit.shapes[name].sizes != tuple(state[name].shape)
        ]

    def _make_plain(self, name: str, entry: Entry) -> Unit:
        return Unit(self, {name: entry.shape}, entry, None, entry.shape.sizes[0] if entry.shape.sizes else 0)

    def _make_converted(self, conversion: Conversion) -> Unit:
        """Tries on the meta device whether the first two of each pattern's tensors make the first two rows."""
        unit = Unit(self, dict(conversion.targets), None, conversion, 0)
        numbers = {len(keys) for keys in conversion.sources.values()}
        if len(numbers) != 1 or (number := numbers.pop()) < 3:
            return unit
        part = replace(conversion, sources={p: keys[:2] for p, keys in conversion.sources.items()})
        shapes = {key: self.checkpoint.entries[key].shape for key in part.keys}
        made = part.make(self.model, {k: torch.empty(s.sizes, dtype=s.dtype, device="meta") for k, s in shapes.items()})
        splits = all(
            s.sizes[0] == number and tuple(made[n].shape) == (2, *s.sizes[1:]) for n, s in conversion.targets.items()
        )
        return replace(unit, rows=number) if splits else unit

    def revert(self, part: Conversion, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Applies a rule backwards, and finds the checkpoint's keys by the patterns that their names lead to."""
        found = revert_weight_conversion(self.model, {name: tensors[name] for name in part.targets})
        keys_by_pattern: dict[str, list[str]] = {}
        for key in sorted(found, key=dot_natural_key):
            _, pattern = self._rename_key(key)
            keys_by_pattern.setdefault(pattern or next(iter(part.sources)), []).append(key)
        if {p: len(keys) for p, keys in keys_by_pattern.items()} != {p: len(keys) for p, keys in part.sources.items()}:
            return {}
        return {
            key: found[made].contiguous()
            for pattern, keys in part.sources.items()
            for key, made in zip(keys, keys_by_pattern[pattern], strict=True)
        }

    def key_of(self, name: str) -> str:
        """Returns the name in the checkpoint for a tensor that it does not hold."""
        (found,) = revert_weight_conversion(self.model, {name: self._state[name]})
        return str(found)

    def _rename_key(self, key: str) -> tuple[str, Any]:
        found: tuple[str, Any] = rename_source_key(
            key, self._renamings, self._converters, self.model.base_model_prefix, self._state
        )
        return found


def rows_of(entry: Entry, rows: range | None) -> Entry:
    """Returns some rows of a stored tensor, which stand together."""
    if rows is None:
        return entry
    sizes = entry.shape.sizes
    row = entry.shape.nbytes // sizes[0]
    return replace(entry, shape=Shape(entry.shape.dtype, (len(rows), *sizes[1:])), start=entry.start + rows.start * row)
