"""What an alignment takes, before it begins: tokens, memory and disk, as bounds that need no data to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from solidify.healing import matching
from solidify.healing.learning import Alignment
from solidify.healing.matching import Unit
from solidify.model import anatomy

_WIDE = 4  # bytes of a float32
_STATE = 3  # gradient and two moments of AdamW, in float32, beside each number that learns


@dataclass(frozen=True)
class Footprint:
    """What an alignment takes at most: `modules` that learn, numbers in them that do, `tokens` seen by each; bytes of
    `memory` (weights that are mapped from files count where they are read) and of `disk` for activations."""

    modules: int
    parameters: int
    tokens: int
    stream: bool
    memory: int
    disk: int

    def document(self) -> dict[str, Any]:
        """Returns the figures as plain values."""
        return dict(vars(self))


def footprint(
    model: PreTrainedModel,
    units: Sequence[Unit],
    trained: Mapping[str, Sequence[str]],
    settings: Alignment,
    *,
    rows: int,
    length: int,
    stream: bool,
) -> Footprint:
    """Counts what an alignment takes, with batches of so many rows of at most so many tokens.

    The changed model may be on the meta device; the base is taken to be as large.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    learning = {unit.name: sum(sizes[name] for name in trained[unit.name]) for unit in units}
    own = {
        unit.name: _count_wide(model.get_submodule(unit.name)) + learning[unit.name] * _STATE * _WIDE for unit in units
    }
    width = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0)
    batch = rows * length * width * _WIDE * 2  # what a unit is given, and its target
    tokens = settings.max_steps * rows * length
    if stream:
        layers: dict[str, int] = {}
        for unit in units:
            layer = matching.layer_of(model, unit.name) or unit.name
            layers[layer] = layers.get(layer, 0) + own[unit.name] + batch
        memory = max((anatomy.size(model.get_submodule(n)) * 2 + size for n, size in layers.items()), default=0)
        disk = 2 * tokens * width * model.dtype.itemsize
    else:
        memory, disk = 2 * anatomy.size(model) + sum(own.values()) + batch * len(units), 0
    return Footprint(len(units), sum(learning.values()), tokens, stream, memory, disk)


def _count_wide(module: nn.Module) -> int:
    return anatomy.count(module.parameters()) * _WIDE
