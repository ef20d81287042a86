"""Modules whose weight is one (input and output embeddings, mostly): what may be declared of them, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import lookup
from solidify.system import foreign
from solidify.upstream.torch import own_parameters


def faults(
    model: nn.Module, lora: Mapping[str, Any] | None, targets: Sequence[str], modules: Sequence[str]
) -> list[str]:
    """Returns what is wrong with the declaration of tied modules, each with the tie and the way out.

    `targets` get low-rank updates, `modules` are trained in full.
    """
    apart = isinstance(lora, Mapping) and lora.get("ensure_weight_tying") is False
    found = []
    for group, first in _find_groups(model):
        low = [name for name in group if name in targets]
        full = [name for name in group if name in modules]
        if low and full:
            found.append(
                f"{low[0]} gets a low-rank update and {full[0]} is trained in full, but they are tied (one weight); "
                "declare one of the two ways for it"
            )
        elif low and not _can_part(model, group):
            found.append(
                f"LoRA: {' and '.join(group)} are tied (one weight) by the code of their module, and updates would "
                "part them: name none of them in target_modules"
            )
        elif low and len(low) < len(group) and not apart:
            left = ", ".join(name for name in group if name not in low)
            found.append(
                f"LoRA: {low[0]} is tied to {left} (one weight), and an update of one alone would break the tie: name "
                f"all of {', '.join(group)} in target_modules, and they get one update; or give ensure_weight_tying: "
                f"false, and {low[0]} alone gets one"
            )
        elif full and full != [first]:
            found.append(
                f"train: {', '.join(full)}: {' and '.join(group)} are tied (one weight); "
                + (f"name only {first}, and it is trained for all" if first else "they cannot be trained in full")
            )
    return found


def parted(model: PeftModel, lora: Mapping[str, Any] | None) -> list[str]:
    """Returns which ties an adapter that stands on the model would part: trained in full, or by updates of their own.

    PEFT (0.21.2) keeps ties of embeddings that it knows by name (`peft/utils/other.py`, EMBEDDING_LAYER_NAMES).
    """
    apart = isinstance(lora, Mapping) and lora.get("ensure_weight_tying") is False
    found = []
    for group in {tuple(sorted({name, *others})) for name, others in lookup.ties(model).items()}:
        located = {name: lookup.at(model, name.rpartition(".")[0]) for name in group}
        own = {n: own_parameters(p.inner).get(n.rpartition(".")[2]) for n, p in located.items() if p is not None}
        full = sorted({id(t) for t in own.values() if t is not None})
        if len(full) > 1 and any(t is not None and t.requires_grad for t in own.values()):
            found.append(
                f"{' and '.join(group)} are tied (one weight), and this training would break the tie: PEFT keeps it "
                "only for embeddings whose names it knows; train other parts, or LoRA on all of them"
            )
        updates = {
            _find_storages(p.called) for p in located.values() if p is not None and isinstance(p.called, BaseTunerLayer)
        }
        if len(updates) > 1 and not apart:
            found.append(
                f"LoRA: {' and '.join(group)} are tied (one weight), and PEFT gives them updates of their own; name "
                "none of them, or give ensure_weight_tying: false and name only one of them"
            )
    return found


def groups(model: nn.Module) -> list[list[str]]:
    """Returns the names of modules that share one weight now."""
    return [group for group, _ in _find_groups(model)]


def _can_part(model: nn.Module, group: Sequence[str]) -> bool:
    """Returns whether a configuration can untie a group, or PEFT keep it: it is the input and output embeddings."""
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel):
        return True
    asked = [foreign.attempt(ask).value for ask in (plain.get_input_embeddings, plain.get_output_embeddings)]
    ends = [lookup.original(module) for module in asked if isinstance(module, nn.Module)]
    return any(lookup.owner(model, name) is end for name in group for end in ends)


def _find_storages(layer: Any) -> frozenset[int]:
    """Returns where in memory the parameters of PEFT's layer stand; its base layer's are none of them."""
    inside = {id(p) for p in layer.get_base_layer().parameters()}
    return frozenset(p.untyped_storage().data_ptr() for p in layer.parameters() if id(p) not in inside)


def _find_groups(model: nn.Module) -> list[tuple[list[str], str | None]]:
    """Returns the names of modules that share one weight now, and which of them holds the input embeddings."""
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel):
        return []
    embeddings = foreign.attempt(plain.get_input_embeddings).value
    own = None if embeddings is None else lookup.original(embeddings)
    found: dict[int, list[str]] = {}
    for name in lookup.ties(model):
        path, _, attribute = name.rpartition(".")
        owner = foreign.attempt(lookup.owner, model, path).value
        if owner is not None and own_parameters(owner).get(attribute) is not None:
            found.setdefault(id(own_parameters(owner)[attribute]), []).append(path)
    groups = [sorted(set(group)) for group in found.values() if len(set(group)) > 1]
    return [(group, next((n for n in group if lookup.owner(model, n) is own), None)) for group in groups]
