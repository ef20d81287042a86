"""Modules whose weight is one (input and output embeddings, mostly): what may be declared of them, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from solidify import foreign
from solidify.adapter import standing


def faults(
    model: nn.Module, lora: Mapping[str, Any] | None, targets: Sequence[str], modules: Sequence[str]
) -> list[str]:
    """Returns what is wrong with the declaration of tied modules, each with the tie and the way out.

    `targets` get low-rank updates, `modules` are trained in full.
    """
    apart = isinstance(lora, Mapping) and lora.get("ensure_weight_tying") is False
    found = []
    for group, first in _groups(model):
        low = [name for name in group if name in targets]
        full = [name for name in group if name in modules]
        if low and full:
            found.append(
                f"{low[0]} gets a low-rank update and {full[0]} is trained in full, but they are tied (one weight); "
                "declare one of the two ways for it"
            )
        elif low and len(low) < len(group) and not apart:
            left = ", ".join(name for name in group if name not in low)
            found.append(
                f"LoRA: {low[0]} is tied to {left} (one weight), and an update of one would part them: name all of "
                f"{', '.join(group)} in target_modules, and they get one update; or give ensure_weight_tying: false, "
                f"and {low[0]} alone gets one"
            )
        elif full and full != [first]:
            found.append(
                f"train: {', '.join(full)}: {' and '.join(group)} are tied (one weight); "
                + (f"name {first} alone, and it is trained for all" if first else "they cannot be trained in full")
            )
    return found


def _groups(model: nn.Module) -> list[tuple[list[str], str | None]]:
    """Returns the names of modules that share one weight now, and which of them holds the input embeddings."""
    plain = standing.plain_model(model)
    if not isinstance(plain, PreTrainedModel):
        return []
    embeddings = foreign.attempt(plain.get_input_embeddings).value
    own = None if embeddings is None else standing.original(embeddings)
    found: dict[int, list[str]] = {}
    for name in standing.ties(model):
        place, _, attribute = name.rpartition(".")
        owner = foreign.attempt(standing.owner, model, place).value
        if owner is not None and owner._parameters.get(attribute) is not None:
            found.setdefault(id(owner._parameters[attribute]), []).append(place)
    groups = [sorted(set(group)) for group in found.values() if len(set(group)) > 1]
    return [(group, next((n for n in group if standing.owner(model, n) is own), None)) for group in groups]
