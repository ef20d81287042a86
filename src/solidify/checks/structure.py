"""Is the network the one that the surgery declared: right class at every place, no stray child, every module in use?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import tensors
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.tuning import standing


def structure(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> Finding:
    """Compares the model with the edits' records (`name`, `new_class`): what stands where, and nothing beside it."""
    plain = standing.plain_model(model)
    places = {place.name: place.inner for place in standing.modules(model)}
    last = {edit["name"]: edit for edit in edits}
    faults = []
    for name, edit in last.items():
        found = type(places[name]).__name__ if name in places else "nothing"
        if found != edit["new_class"]:
            faults.append(f"{name} holds {found}, not {edit['new_class']}")
    faults += [
        f"{owner or 'the model'} has a child with the dotted name {child!r}, which its forward never calls"
        for owner, module in plain.named_modules()
        for child in module._modules
        if "." in child
    ]
    evidence = f"{len(last)} places hold {', '.join(sorted({e['new_class'] for e in edits}))}"
    return Finding("structure", not faults, "; ".join(faults) or evidence)


def in_use(model: PreTrainedModel, names: Sequence[str]) -> Finding:
    """Doubles the output of each named module in turn and looks whether the model's output moves."""
    inputs = anatomy.probe_inputs(model)
    before = anatomy.run(model, inputs)
    places = {place.name: place.called for place in standing.modules(model)}
    idle = []
    for name in names:
        handle = places[name].register_forward_hook(_double)
        try:
            if torch.equal(anatomy.run(model, inputs), before):
                idle.append(name)
        finally:
            handle.remove()
    evidence = f"doubling the output of each of {len(names)} modules moves the logits"
    return Finding("every new module is in use", not idle, f"no effect: {', '.join(idle)}" if idle else evidence)


def _double(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output * 2
    return type(output)(t * 2 if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in output)


def untouched(model: PreTrainedModel, before: Mapping[str, str], edits: Sequence[Mapping[str, Any]]) -> Finding:
    """Compares tensor by tensor with the base's digests: all that no edit names must be there, byte for byte.

    `before` maps the base's tensor names to their digests. Every one of them must be found again, under its own name or
    where an edit says that it went, or be named as dropped by an edit.
    """
    now = tensors.digests(model.state_dict().items())
    moved = {origin: name for edit in edits for name, origin in edit["kept"].items()}
    dropped = {name for edit in edits for name in edit["dropped"]}
    new = {name for edit in edits for name in edit["new"]}
    faults = [
        f"{name} of the base is gone" for name in before if name not in dropped and moved.get(name, name) not in now
    ]
    faults += [
        f"{name} changed"
        for name, digest in before.items()
        if name not in dropped and now.get(moved.get(name, name), digest) != digest
    ]
    known = {moved.get(name, name) for name in before} | new
    faults += [f"{name} came from nowhere" for name in now if name not in known]
    same = sum(1 for name in before if name not in dropped)
    evidence = f"{same} of {len(before)} base tensors byte-identical, {len(new)} new, {len(dropped)} dropped"
    return Finding("unchanged tensors identical", not faults, "; ".join(faults[:4]) or evidence)


def start(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], *, promised: bool) -> Finding:
    """Says how far surgery alone moved the outputs; a check only where the modules promised an identical start."""
    distance = max(float((after[k].double() - before[k].double()).abs().max()) for k in before)
    equal = all(torch.equal(after[k], before[k]) for k in before)
    evidence = "logits bit-identical to the base" if equal else f"logits differ from the base by up to {distance:.3g}"
    return Finding("start identical", equal if promised else (True if equal else None), evidence)
