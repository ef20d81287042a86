"""From a checkpoint's layout to the layout in memory, tensor by tensor, by transformers' own conversion rules.

Hub checkpoints of some families keep one tensor per expert, or other names, than the model has in memory. transformers
converts them while it loads a whole model; here its rules are applied to one tensor at a time, straight to a file.

Written against transformers 5.23: `get_model_conversion_mapping` (`conversion_mapping.py`, which PEFT uses too) and,
from `core_model_loading.py`, `rename_source_key`, the classes of rules, and the way in which
`convert_and_load_state_dict_in_model` gathers what a rule needs. None of these is documented.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from solidify.upstream.transformers import (
    Transpose,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from solidify.weights.checkpoint import Checkpoint
from solidify.weights.format import Entry, Piece, Shape, TensorSource

_BLOCK = 2**25  # bytes of the result that are made at a time where a rule allows it


@dataclass(frozen=True)
class Conversion:
    """Tensors of the model that are made of tensors of the checkpoint by a rule of transformers (None: renamed, cast).

    `sources` lists, for each pattern of the rule, the keys of the checkpoint in the order that the rule wants.
    """

    targets: dict[str, Shape]
    sources: dict[str, list[str]]
    rule: Any

    @property
    def keys(self) -> list[str]:
        """All keys of the checkpoint that this needs."""
        return [key for keys in self.sources.values() for key in keys]

    def tensor_source(self, model: PreTrainedModel, checkpoint: Checkpoint) -> TensorSource:
        """Returns what makes the tensors when they are to be written, in blocks where the rule allows it."""
        return TensorSource(self.targets, lambda: self._make_pieces(model, checkpoint.entries))

    def make(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Applies the rule to tensors of the checkpoint, by their keys."""
        first = next(iter(self.targets))
        if self.rule is None:
            return {first: tensors[self.keys[0]].to(self.targets[first].dtype)}
        rule = deepcopy(self.rule)
        for pattern, keys in self.sources.items():
            for key in keys:
                rule.add_tensor(first, key, pattern, tensors[key])
        made = rule.convert(first, model=model, config=model.config)
        flat = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {n: t.to(self.targets[n].dtype) if n in self.targets else t for n, t in flat.items()}

    def _make_pieces(self, model: PreTrainedModel, entries: Mapping[str, Entry]) -> Iterator[Piece]:
        for part in self._split_blocks():
            made = part.make(model, {key: entries[key].read() for key in part.keys})
            for name in self.targets:
                yield name, made[name]

    def _split_blocks(self) -> Iterator[Conversion]:
        """Splits by experts: stacked along the first axis and joined along others, they do not meet."""
        operations = [] if self.rule is None else self.rule.operations
        numbers = {len(keys) for keys in self.sources.values()}
        splits = (
            bool(operations)
            and isinstance(operations[0], MergeModulelist)
            and operations[0].dim == 0
            and all(_keeps_first_axis(operation) for operation in operations[1:])
            and len(numbers) == 1
            and all(shape.sizes[:1] == (max(numbers),) for shape in self.targets.values())
        )
        if not splits:
            yield self
            return
        number = numbers.pop()
        step = max(1, number * _BLOCK // max(1, sum(shape.nbytes for shape in self.targets.values())))
        for begin in range(0, number, step):
            yield Conversion(
                self.targets, {pattern: keys[begin : begin + step] for pattern, keys in self.sources.items()}, self.rule
            )


def _keeps_first_axis(operation: Any) -> bool:
    if isinstance(operation, Concatenate):
        return bool(operation.dim > 0)
    return isinstance(operation, Transpose) and operation.dim0 > 0 and operation.dim1 > 0


@dataclass(frozen=True)
class Layout:
    """How a checkpoint becomes a model's state.

    `stored` maps names in memory to the checkpoint's keys whose bytes they are.
    """

    stored: dict[str, str]
    conversions: list[Conversion]

    @property
    def in_memory(self) -> bool:
        """Whether the checkpoint has the layout in memory already: every tensor under its own name."""
        return not self.conversions and all(name == key for name, key in self.stored.items())

    def tensor_sources(self, model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorSource]:
        """Returns what gives each tensor of the model; one source may give several."""
        found = {name: TensorSource.stored(name, checkpoint.entries[key]) for name, key in self.stored.items()}
        for conversion in self.conversions:
            found |= dict.fromkeys(conversion.targets, conversion.tensor_source(model, checkpoint))
        return found


def read(model: PreTrainedModel, checkpoint: Checkpoint) -> Layout:
    """Finds out how a checkpoint becomes the state of a model, which may be on the meta device; reads headers only."""
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    rules = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for key in sorted(checkpoint.entries, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            continue  # whether it may be left out is for transformers to say
        rule, sources = found.setdefault(name, (rules[pattern] if pattern is not None else None, {}))
        if rule is None and sources:
            continue  # a second key of the same name; transformers, too, takes the first
        sources.setdefault(pattern or key, []).append(key)
    stored: dict[str, str] = {}
    conversions = []
    for name, (rule, sources) in found.items():
        entry = checkpoint.entries[next(iter(sources.values()))[0]]
        if rule is None and entry.shape == Shape.of(state[name]):
            stored[name] = entry.name
        else:
            conversions.append(_make_conversion(model, state, name, sources, rule, checkpoint))
    return Layout(stored, conversions)


def _make_conversion(
    model: PreTrainedModel,
    state: Mapping[str, torch.Tensor],
    name: str,
    sources: dict[str, list[str]],
    rule: Any,
    checkpoint: Checkpoint,
) -> Conversion:
    """Applies a rule on the meta device, to learn which tensors it makes."""
    draft = Conversion({name: Shape.of(state[name])}, sources, rule)
    entries = [checkpoint.entries[key] for key in draft.keys]
    empty = {e.name: torch.empty(e.shape.sizes, dtype=e.shape.dtype, device="meta") for e in entries}
    made = draft.make(model, empty)
    shapes = {n: Shape(state[n].dtype if n in state else t.dtype, tuple(t.shape)) for n, t in made.items()}
    return Conversion(shapes, sources, rule)
