"""Is the network the one that the surgery declared: right classes, no stray child, every new module in use?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import tensors
from solidify.artifact.tensors import Standing
from solidify.findings import Finding
from solidify.model import anatomy, probing
from solidify.model.extent import Extent
from solidify.surgery import catalogue, contract, control, ledger
from solidify.upstream.torch import own_modules

IN_USE = "every new module is in use"
START = "start identical"
UNTOUCHED = "unchanged tensors identical"
Find = Callable[[str], nn.Module | None]


def structure(model: nn.Module, edits: Sequence[Mapping[str, Any]], find: Find | None = None) -> Finding:
    """Compares the model with the edits' records (`name`, `new_class`): what stands where, and nothing beside it.

    `find` leads from a name of a module to what stands there, where an adapter has been put around modules.
    """
    find = find or partial(_find_module, model)
    declared = ledger.new_modules(edits)
    faults = []
    for name, edit in declared.items():
        kind = type(module).__name__ if (module := find(name)) is not None else "nothing"
        if kind != edit["new_class"]:
            faults.append(f"{name} is {kind}, not {edit['new_class']}")
    shaped = {name: _inspect_shape(find(name), edit) for name, edit in ledger.reshaped_modules(edits).items()}
    faults += [f"{name} {fault}" for name, (_, wrong) in shaped.items() for fault in wrong]
    faults += [
        f"{owner or 'the model'} has a child with the dotted name {child!r}, which its forward never calls"
        for owner, module in model.named_modules()
        for child in own_modules(module)
        if "." in child
    ]
    kinds = sorted({edit["new_class"] for edit in declared.values()})
    said = (
        [f"{len(declared)} {'module is' if len(declared) == 1 else 'modules are'} of class {', '.join(kinds)}"]
        if declared
        else []
    )
    said += [f"{name} {shape}" for name, (shape, _) in shaped.items()]
    if not faults and not said:
        return Finding.unseen("structure", "the model holds no edit")
    return Finding("structure", not faults, "; ".join(faults or said))


def _find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Returns what stands under a name, or None; `get_submodule` would raise, and read other attributes, too."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = None if module is None else own_modules(module).get(part)
    return module


def _inspect_shape(module: nn.Module | None, edit: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Returns what shape a module has, and what is not as the edit says."""
    return ("", ["is gone"]) if module is None else catalogue.of(edit).inspect(module, edit)


def in_use(model: PreTrainedModel, edits: Sequence[Mapping[str, Any]], extent: Extent) -> Finding:
    """Doubles the output of each new module in turn and looks whether the model's outputs move.

    An added module must move what the outputs carry under its name, any other the logits.
    """
    declared = ledger.new_modules(edits)
    if not declared:
        return Finding.unseen(IN_USE, "no new module was put in, so there is nothing to try")
    if not extent.whole:
        return _check_called(model, declared)
    inputs = probing.probe_inputs(model)
    idle = []
    for name, edit in declared.items():
        module = _find_module(model, name)
        key = name if catalogue.of(edit).adds else None
        before = _collect_logits(model, inputs, key)
        if module is None:
            idle.append(name)
            continue
        handle = module.register_forward_hook(_double_output)
        try:
            if torch.equal(_collect_logits(model, inputs, key), before):
                idle.append(name)
        finally:
            handle.remove()
    evidence = f"doubling the output of each of {len(declared)} modules moves the model's"
    return Finding(IN_USE, not idle, f"no effect: {', '.join(idle)}" if idle else evidence)


def _check_called(model: PreTrainedModel, declared: Mapping[str, Mapping[str, Any]]) -> Finding:
    """Runs a large model until the first new module of each kind was called: a sample, and no proof of the others."""
    replaced = [name for name, edit in declared.items() if catalogue.of(edit).runs]
    first = list(control.first_of_each_kind(model, replaced))
    if not first:
        return Finding.unseen(IN_USE, "a model of this size is not run as a whole")
    calls = contract.record(model, first, probing.few_inputs(model), partly=True)
    idle = [name for name in first if name not in calls]
    evidence = f"the first of each kind ({', '.join(first)}) is called in the model's forward pass"
    return Finding(IN_USE, False if idle else None, f"never called: {', '.join(idle)}" if idle else evidence)


def _collect_logits(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], key: str | None) -> torch.Tensor:
    """Returns the model's logits, or what its outputs carry under a name."""
    if key is None:
        return anatomy.run(model, inputs)
    with torch.no_grad(), anatomy.evaluation(model):
        answer = model(**inputs)[key]
    return torch.as_tensor(answer[0] if isinstance(answer, (tuple, list)) else answer)


def _double_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    return _double_tensors(output)


def _double_tensors(value: Any) -> Any:
    """Doubles all floating tensors within what a module returned, whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value * 2 if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return type(value)(**{key: _double_tensors(each) for key, each in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_double_tensors, value))
    return type(value)(map(_double_tensors, value)) if isinstance(value, (tuple, list)) else value


def untouched(
    model: PreTrainedModel, before: Mapping[str, Standing | str], edits: Sequence[Mapping[str, Any]]
) -> Finding:
    """Compares tensor by tensor with the base: all that no edit names must be there, byte for byte.

    `before` maps the base's tensor names to where they stood (`tensors.standing`), or to their digests. Every one of
    them must be found again, under its own name or where an edit says that it went, or be named as dropped by an edit.
    """
    if not before:
        return Finding.unseen(UNTOUCHED, "the base has no tensors")
    now = tensors.standing(model.state_dict())
    origins, dropped = ledger.origins(before, edits)
    used = {origin for origin in origins.values() if origin is not None}
    faults = [f"{name} of the base is gone" for name in before if name not in used and name not in dropped]
    faults += [
        f"{name} is missing" if origin is None else f"{origin} of the base is gone"
        for name, origin in origins.items()
        if name not in now
    ]
    faults += [
        f"{name} changed"
        for name, origin in origins.items()
        if origin is not None and name in now and not tensors.are_same(before[origin], now[name])
    ]
    faults += [f"{name} is neither the base's nor named as new by an edit" for name in now if name not in origins]
    new = sum(1 for origin in origins.values() if origin is None)
    same = sum(1 for name in before if name in used)
    evidence = f"{same} of {len(before)} base tensors byte-identical, {new} new, {len(before) - same} dropped"
    return Finding(UNTOUCHED, not faults, "; ".join(faults[:4]) or evidence)


def exact_up_to(model: nn.Module, edits: Sequence[Mapping[str, Any]]) -> int | None:
    """Returns up to how many positions the new modules say that they start as their originals; None for any number.

    A window is its original until a text outgrows it: such a module says so by an attribute `exact_up_to`.
    """
    modules = [module for name in ledger.new_modules(edits) if (module := _find_module(model, name)) is not None]
    limits = [limit for m in modules if isinstance(limit := getattr(m, "exact_up_to", None), int)]
    return min(limits, default=None)


def start(
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    *,
    promised: bool,
    limit: int | None = None,
    added: Collection[int] = (),
) -> Finding:
    """Says how far surgery alone moved the outputs; a check only where the modules promised an identical start.

    With a `limit` (`exact_up_to`), outputs of more positions are no part of the promise, and are measured. The ids of
    tokens that were `added` have other logits, also where the base had spare rows for them. Without outputs (of a large
    model) nothing is proved: it says what the first module of each kind showed.
    """
    if not before:
        if not promised:
            return Finding.unseen(START, "a model of this size is not run as a whole")
        evidence = "the first new module of each kind gives its original's outputs bit for bit; the whole was not run"
        return Finding(START, None, evidence)
    shared = {k: _find_shared(before[k].shape[-1], after[k].shape[-1], added) for k in before}
    apart = max(after[k].shape[-1] - len(shared[k]) for k in before)
    before, after = ({k: outputs[k][..., shared[k]] for k in before} for outputs in (before, after))
    distance = max(float((after[k].double() - before[k].double()).abs().max()) for k in before)
    moved = {k for k in before if not torch.equal(after[k], before[k])}
    if not moved:
        more = f", of {apart} new tokens apart" if apart else ""
        return Finding(START, True, f"logits bit-identical to the base{more}")
    beyond = {k for k in before if limit is not None and _count_positions(before[k]) > limit}
    where = (
        f", on inputs of more than the {limit} positions up to which the new modules are exact"
        if moved <= beyond
        else ""
    )
    broken = promised and not moved <= beyond
    return Finding(START, False if broken else None, f"logits differ from the base by up to {distance:.3g}{where}")


def _find_shared(before: int, after: int, added: Collection[int]) -> list[int]:
    """Returns the numbers of the logits that stand for the same before and after: all, or those of no new token."""
    new = added if added and max(added) < after else ()
    return [number for number in range(before) if number not in new]


def _count_positions(logits: torch.Tensor) -> int:
    """Returns how many positions an output has: the axis between rows and values, where there is one."""
    return logits.shape[1] if logits.ndim > 2 else 1
