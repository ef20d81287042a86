"""A change of the experts of MoE blocks, made and recorded: all blocks or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.behaviour import properties
from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, operations
from solidify.model.extent import Extent
from solidify.surgery import (
    control,
    expert_averages,
    expert_groups,
    expert_parts,
    expert_proof,
    expert_tables,
    expert_taking,
)
from solidify.surgery.control import Control
from solidify.surgery.edit_record import Edit
from solidify.surgery.expert_averages import Merging
from solidify.surgery.expert_scores import ExpertChoice
from solidify.surgery.transaction import transaction
from solidify.weights import mapped, spilling

_REFUSED = "the experts cannot be rearranged as asked"


def present_orders(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the order that changes nothing, of each block.

    Raises:
        SurgeryError: a block has no experts, or none of a form that can be rearranged.
    """
    sizes = {name: int(expert_parts.plan_block(model, name, [])["size"]) for name in names}
    refuse(SurgeryError, _REFUSED, expert_parts.find_missing(model, sizes))
    return {name: list(range(size)) for name, size in sizes.items()}


def present_choices(model: PreTrainedModel, names: Sequence[str]) -> dict[str, int]:
    """Returns how many experts a token gets in each block.

    Raises:
        SurgeryError: a block does not say it, or has no experts, or none of a form that can be rearranged.
    """
    present_orders(model, names)
    found = {name: set(expert_parts.find_choices(model.get_submodule(name)).values()) for name in names}
    refuse(SurgeryError, _REFUSED, [_describe_silent(name) for name, said in found.items() if not said])
    return {name: max(said) for name, said in found.items()}


def find_moved_groups(model: PreTrainedModel, sizes: Mapping[str, Sequence[int]]) -> list[str]:
    """Says in which blocks copies of all experts would have other groups of experts chosen."""
    groups = {name: expert_groups.find_groups(model.get_submodule(name), len(order)) for name, order in sizes.items()}
    return [fault for name, each in groups.items() if each is not None for fault in each.describe_copies(name)]


def change(
    model: PreTrainedModel,
    orders: Mapping[str, list[int]],
    chosen: Mapping[str, int] | None = None,
    *,
    choice: ExpertChoice | None = None,
    merging: Merging | None = None,
    extent: Extent | None = None,
    same: str = "",
) -> list[Edit]:
    """Gives blocks the experts of their `orders`, and each token as many as are `chosen`; returns the edits.

    `choice` says how the orders came about; with a `merging`, they name the heaviest expert of each of its clusters.
    With `same`, the words for what is done, the model must compute what it computed.

    Raises:
        SurgeryError: a block cannot have these experts, or the changed model behaves otherwise than before.
    """
    extent = Extent.given(extent, model)
    plans = {name: _plan_one(model, name, order, chosen) for name, order in orders.items()}
    blocks = {name: model.get_submodule(name) for name in orders}
    refuse(
        SurgeryError, _REFUSED, expert_parts.find_missing(model, {name: plan["size"] for name, plan in plans.items()})
    )
    faults = [f for name, plan in plans.items() for f in expert_parts.find_faults(blocks[name], name, plan)]
    faults += expert_parts.find_ties(model, list(orders), plans)
    refuse(SurgeryError, _REFUSED, faults)
    numbers = {name: merging.renumber(name) if merging else _renumber(plans[name]) for name in orders}
    for name, block in blocks.items():
        faults += expert_tables.find_faults(name, block, plans[name], numbers[name])
    settings = {name: {**plan, **expert_parts.find_configured(model, plans, name)} for name, plan in plans.items()}
    faults += [fault for name in orders for fault in expert_parts.find_held(blocks[name], name, settings[name])]
    refuse(SurgeryError, _REFUSED, faults)
    before = control.take_whole(model, extent)
    if before.inputs is not None:
        expert_proof.refuse_unproved(model, plans, before.inputs, extent)
    mixed = any(expert_parts.is_mixed(blocks[name], settings[name]) for name in plans)
    layouts = merging.find_layouts(model, plans, before.inputs, extent) if merging and before.inputs else None
    with transaction(model, extent, changes=orders):
        edits = []
        for name in orders:
            new = merging.average(name, blocks[name], plans[name], layouts[name]) if merging and layouts else {}
            new |= expert_tables.rewrite(blocks[name], plans[name], numbers[name])
            edits.append(_change_one(model, name, settings[name], choice or merging, new, extent))
        unrecorded = ("router_logits",) if mixed else ()  # transformers balances the load over equal blocks alone
        what, advice = _describe(chosen)
        identical = control.judge_whole(model, before, what, unrecorded=unrecorded, advice=advice)
        if same:
            _refuse_moved(model, before, same, [f for plan in plans.values() for f in plan.get("further", {}).values()])
    probed = before.inputs is not None
    return [dataclasses.replace(edit, identical=identical, probed=probed, control=before.distances) for edit in edits]


def _plan_one(model: PreTrainedModel, name: str, order: list[int], chosen: Mapping[str, int] | None) -> dict[str, Any]:
    plan = expert_parts.plan_block(model, name, order)
    if chosen is None or not plan["size"]:
        return plan
    said = expert_parts.find_choices(model.get_submodule(name))
    refuse(SurgeryError, _REFUSED, [] if said else [_describe_silent(name)])
    tables = {"tables": dict.fromkeys(plan["tables"], chosen[name])} if "tables" in plan else {}
    return {**plan, **tables, "chosen": dict.fromkeys(said, chosen[name])}


def _renumber(plan: Mapping[str, Any]) -> list[list[int]]:
    return expert_tables.places(plan["order"], plan["size"])


def _describe(chosen: Mapping[str, int] | None) -> tuple[str, str]:
    """Returns what a model got, in words, and what to do where its own code does not take it."""
    if chosen is None:
        return "these experts", ""
    numbers = " or ".join(map(str, sorted({*chosen.values()})))
    return f"{numbers} of these experts a token", "; its code does not take that number: give another experts_per_token"


def _describe_silent(name: str) -> str:
    return f"{name} says nowhere how many experts a token gets, so the number cannot be changed"


def _refuse_moved(model: PreTrainedModel, before: Control, what: str, further: Sequence[int]) -> None:
    """Raises SurgeryError when the model does not compute what it did, up to rounding.

    `further` counts what routers weigh beside the experts, of which there are no copies.
    """
    if before.inputs is None or before.output is None:
        return
    output = anatomy.run(model, before.inputs)
    moved, allowed = properties.distance(output, before.output), properties.allowed("", 0.0, output.dtype)
    if not moved <= allowed:
        reason = "weighs or chooses copies otherwise"
        if further:
            reason = f"weighs them against {max(further)} more (which compute nothing, or are shared) without copies"
        raise SurgeryError(
            f"{_REFUSED}: with {what} the model's output moves by {moved:.1e} (rounding: {allowed:.1e}), because its "
            f"router {reason}; choose experts by an order instead"
        )


def _change_one(
    model: PreTrainedModel,
    name: str,
    settings: dict[str, Any],
    reason: ExpertChoice | Merging | None,
    new: Mapping[str, torch.Tensor],
    extent: Extent,
) -> Edit:
    """Changes one block, gives it its `new` tensors, and writes the record."""
    block = model.get_submodule(name)
    old_keys, parameters = list(block.state_dict()), anatomy.count(block.parameters())
    order, size = settings["order"], settings.pop("size")
    kept = [*block.parameters(), *block.buffers()]
    expert_taking.take_experts(model, [name], settings, {})
    expert_averages.put_tensors(block, new)
    if not extent.whole:
        spilling.spill(name, block, kept, extent.spill)
        mapped.release_tensors([*kept, *block.parameters(), *block.buffers()])
    operations.assign(model.config, settings["after"])
    operations.set_attributes(model, settings["attributes"])
    planned = isinstance(reason, ExpertChoice) and reason.planned
    merged = isinstance(reason, Merging)
    same = order == list(range(size))
    tensors = _follow_tensors(name, block.state_dict(), settings, same=same, known=not (planned or merged))
    lives = set(tensors.values())
    return Edit(
        name=name,
        old_class=type(block).__name__,
        module_class=None,
        arguments=_describe_change(name, settings, reason),
        supplied=(),
        tensors=tensors,
        dropped=tuple(f"{name}.{key}" for key in old_keys if f"{name}.{key}" not in lives),
        frozen=(),
        parameters_before=parameters,
        parameters_after=anatomy.count(block.parameters()),
        probed=False,
        identical=False,
        bypass=False,
        operation="merge_experts" if merged else "rearrange_experts",
        settings=settings,
        unknown=tuple(_list_items(tensors, name, settings["lists"])) if planned else (),
    )


def _follow_tensors(
    name: str, state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], *, same: bool, known: bool
) -> dict[str, str | None]:
    """Returns which old tensor each tensor of a block is now; which items of lists they are, may not be known."""
    order = settings["order"]
    tensors: dict[str, str | None] = {}
    for key in state:
        inside = next((each for each in settings["lists"] if key.startswith(f"{each}.")), None)
        if inside is not None:
            number, _, rest = key.removeprefix(f"{inside}.").partition(".")
            tensors[f"{name}.{key}"] = (
                None if not known and not same else f"{name}.{inside}.{order[int(number)]}.{rest}"
            )
        else:
            moved = not same and (key in settings["tensors"] or key in settings.get("tables", {}))
            tensors[f"{name}.{key}"] = None if moved else f"{name}.{key}"
    return tensors


def _list_items(tensors: Mapping[str, str | None], name: str, lists: Sequence[str]) -> Iterator[str]:
    """Yields the new tensors that stand in lists: only with the order is it known which old ones they are."""
    for key, origin in tensors.items():
        if origin is None and any(key.startswith(f"{name}.{each}.") for each in lists):
            yield key


def _describe_change(name: str, settings: Mapping[str, Any], reason: ExpertChoice | Merging | None) -> dict[str, Any]:
    """Says what was done: which experts a block has, and by what they were chosen; or, in a plan, how they would be."""
    chosen = settings.get("chosen", {})
    per_token = {"experts_per_token": next(iter(chosen.values()))} if chosen else {}
    if isinstance(reason, Merging):
        return {**reason.describe(name), **per_token}
    choice = reason
    if choice is None:
        return {"order": settings["order"], **per_token}
    experts = {"keep": len(settings["order"])} if choice.planned else {"order": settings["order"]}
    return {**experts, "by": choice.by, **choice.evidence, **per_token}
