"""Which parameters a term on weights is about: by names of the plain model, without idle and frozen twins."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from solidify.adapter import lookup
from solidify.errors import ObjectiveError, refuse
from solidify.losses.precision import wide
from solidify.model import anatomy

Patterns = str | list[str] | None


@dataclass(frozen=True)
class Named:
    """A parameter, its name in the plain model, and what it is there: `base`, `full` (a trained copy) or `lora`.

    The parts of a LoRA update carry their target's name.
    """

    name: str
    kind: str
    parameter: nn.Parameter


def named(model: nn.Module) -> list[Named]:
    """Returns every parameter under its plain name, twins included, each tensor once."""
    peft_model = lookup.peft_model(model)
    if peft_model is None:
        return [Named(name, "base", p) for name, p in lookup.plain_model(model).named_parameters()]
    found = (Named(name, kind, p) for kind, name, p in lookup.named_parameters(peft_model))
    return list({id(each.parameter): each for each in found}.values())


def chosen(term: str, model: nn.Module, patterns: Patterns) -> list[Named]:
    """Returns the parameters that `patterns` name and that take part in the forward pass; by default what is trained.

    Raises:
        ObjectiveError: a pattern names no parameter, there is nothing at all, or tensors are sharded (FSDP2).
    """
    everything = named(model)
    if patterns is None:
        result = [each for each in everything if each.parameter.requires_grad]
    else:
        hits = anatomy.match(patterns, dict.fromkeys(each.name for each in everything))
        empty = [pattern for pattern, found in hits.items() if not found]
        if empty:
            raise ObjectiveError(f"{term}: {', '.join(map(repr, empty))} names no parameter")
        names = {name for found in hits.values() for name in found}
        running = {id(p) for p in active(model)}
        result = [each for each in everything if each.name in names and id(each.parameter) in running]
    if not result:
        raise ObjectiveError(f"{term}: there is nothing to penalise")
    return result


def matrices(term: str, model: nn.Module, patterns: Patterns) -> dict[str, torch.Tensor]:
    """Returns the chosen parameters as float32 stacks (experts, rows, columns), by a name of their own.

    A matrix is a stack of one, and of a tensor with more dimensions the first counts its matrices (fused experts).

    Raises:
        ObjectiveError: a named parameter has fewer than two dimensions. Without patterns such parameters are left out.
    """
    named_ = chosen(term, model, patterns)
    flat = [each.name for each in named_ if each.parameter.ndim < 2]
    if patterns is not None:
        refuse(ObjectiveError, f"{term} is about matrices", [f"{name} is a vector" for name in flat])
    stacks: dict[str, torch.Tensor] = {}
    for each in named_:
        if each.parameter.ndim >= 2:
            name, number = each.name, 1
            while name in stacks:  # the parts of a LoRA update share their target's name
                number += 1
                name = f"{each.name}#{number}"
            p = each.parameter
            stacks[name] = wide(p)[None] if p.ndim == 2 else wide(p).flatten(2)
    if not stacks:
        raise ObjectiveError(f"{term} is about matrices, but only vectors are trained; name `parameters`")
    return stacks


def active(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that take part in the forward pass now, LoRA's included; no frozen twin of a copy."""
    parameters = []
    for located in lookup.modules(model):
        parameters += list(located.inner.parameters(recurse=False))
        if located.called is not located.inner:
            inside = {id(p) for p in located.inner.parameters()}
            parameters += [p for p in located.called.parameters() if p.requires_grad and id(p) not in inside]
    return parameters
