"""Chooses, repeats and reorders the experts of MoE blocks by a list of numbers, experts and router together.

The whole operation: its type, its function, its proof and the code that artifacts carry. Which tensors belong to the
experts is found by their shapes (`expert_parts.py`) and then proved: with all experts renumbered, a block must compute
what it computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import combinations
from operator import index
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from solidify.errors import SurgeryError, refuse
from solidify.surgery.operation import Context, Operation, Record

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.model.extent import Extent
    from solidify.surgery.contract import Call
    from solidify.surgery.edit_record import Edit


class RearrangeExperts(Operation):
    """One step of surgery: the blocks that `rearrange_experts` names have the experts that `order` lists, so ordered.

    A number that is left out goes (pruning), one that comes twice is copied.
    """

    asked = recorded = "rearrange_experts"
    shapes = runs = True

    rearrange_experts: str | list[str]
    order: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    expect: str
    count: int | None = Field(default=None, ge=1)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Rearranges the experts."""
        return rearrange_experts(
            model, self.rearrange_experts, self.order, expect=self.expect, count=self.count, extent=context.extent
        )

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Measures the tensors and lists that have one row or item per expert."""
        settings = edit["settings"]
        size = len(settings["order"])
        found = {path: _get_path(module, path).shape[dim] for path, dim in settings["tensors"].items()}
        found |= {path: len(_get_path(module, path)) for path in settings["lists"]}
        wrong = [f"{path} has {rows} experts, not {size}" for path, rows in found.items() if rows != size]
        return f"has {size} experts", wrong

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what an artifact does when its constructor has built the blocks as they were."""
        return take_experts


def rearrange_experts(
    model: PreTrainedModel,
    target: str | Sequence[str],
    order: Sequence[int],
    *,
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Gives the MoE blocks that `target` names the experts that `order` lists, and returns the edits.

    Expert `order[i]` (counted from 0) becomes expert `i`, with its column of the router: a number that is left out goes
    with the tokens that it would have had, one that comes twice is copied, and both copies are chosen among. Once all
    blocks of a configuration have as many experts, in one call or in several, the configuration and the modules that
    count them say so too, and the family's own class can hold the result. Until then router logits are not recorded.

    Raises:
        SurgeryError: what is named has no experts or others than its router chooses from; `order` names an expert that
            is not there, or fewer than a token gets; the changed model does not run, or behaves otherwise than before
            (with and without a cache, beside other rows). The model is then as it was.
    """
    import dataclasses

    from solidify.model.extent import Extent
    from solidify.surgery import control, expert_parts, selection
    from solidify.surgery.transaction import transaction

    extent = Extent.given(extent, model)
    names = selection.targets(model, target, expect, count)
    numbers = _read_order(order)
    plans = {name: expert_parts.plan_block(model, name, numbers) for name in names}
    blocks = {name: model.get_submodule(name) for name in names}
    faults = [f for name, plan in plans.items() for f in expert_parts.find_faults(blocks[name], name, plan)]
    faults += expert_parts.find_ties(model, names, plans)
    refuse(SurgeryError, "the experts cannot be rearranged as asked", faults)
    before = control.take_whole(model, extent)
    if before.inputs is not None:
        _refuse_unproved(model, plans, before.inputs, extent)
    settings = {
        name: {**plan, **expert_parts.find_configured(model, names, name, plan)} for name, plan in plans.items()
    }
    with transaction(model, extent):
        edits = [_rearrange_one(model, name, settings[name], extent) for name in names]
        mixed = any(len(numbers) != plan["size"] and not settings[name]["after"] for name, plan in plans.items())
        unrecorded = ("router_logits",) if mixed else ()  # transformers balances the load over equal blocks alone
        identical = control.judge_whole(model, before, "these experts", unrecorded=unrecorded)
    probed = before.inputs is not None
    return [dataclasses.replace(edit, identical=identical, probed=probed, control=before.distances) for edit in edits]


def take_experts(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Takes rows of tensors and items of lists, in a new order; a repeated one is copied."""
    from copy import deepcopy

    import torch
    from torch import nn

    order = edit["order"]
    for name in names:
        block = model.get_submodule(name)
        for path, dim in edit["tensors"].items():
            owner, _, key = path.rpartition(".")
            holder = block.get_submodule(owner)
            old = getattr(holder, key)
            rows = old.detach().index_select(dim, torch.tensor(order, device=old.device))
            if isinstance(old, nn.Parameter):
                holder.register_parameter(key, nn.Parameter(rows, requires_grad=old.requires_grad))
            else:
                setattr(holder, key, rows)
        for path in edit["lists"]:
            items = block.get_submodule(path)
            taken = [deepcopy(items[e]) if e in order[:index] else items[e] for index, e in enumerate(order)]
            block.set_submodule(path, type(items)(taken), strict=True)
        for path in edit["numbers"]:
            owner, _, key = path.rpartition(".")
            setattr(block.get_submodule(owner), key, len(order))


def _read_order(order: Any) -> list[int]:
    """Returns the numbers as plain ones, whatever holds them (a range, numpy, torch)."""
    listed = order.tolist() if hasattr(order, "tolist") else order
    if isinstance(listed, Iterable) and not isinstance(listed, (str, bytes, Mapping, Set)):
        listed = list(listed)
    if not isinstance(listed, list):
        raise SurgeryError(f"`order` lists experts by their numbers, as in [5, 2, 0], but it is {listed!r}")
    wrong = [each for each in listed if isinstance(each, bool) or not hasattr(each, "__index__")]
    if wrong:
        raise SurgeryError(f"`order` lists experts by their numbers, as in [5, 2, 0], but holds {wrong[0]!r}")
    return [index(each) for each in listed]


def _get_path(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _refuse_unproved(
    model: PreTrainedModel, plans: Mapping[str, dict[str, Any]], inputs: Mapping[str, Any], extent: Extent
) -> None:
    """Renumbers experts in a copy of each block (of a bounded model, of the first of each kind).

    With all experts renumbered its output must stay, and with a part of what was found it must move: else that part is
    about something else that has as many rows (other experts, slots of a memory).

    Raises:
        SurgeryError: it is not so, as where a router first chooses among groups of experts; or a block is not called.
    """
    from solidify.surgery import contract, control

    tried = extent.sample(list(plans), list(control.first_of_each_kind(model, list(plans))))
    calls = contract.record(model, tried, inputs, partly=not extent.whole)
    faults = [f"{name} is not called by the model" for name in tried if name not in calls]
    for name, call in calls.items():
        proof = _Renumbering(model.get_submodule(name), plans[name], call, wide=extent.whole)
        faults += [f"{name}: {fault}" for fault in proof.find_faults()]
    refuse(SurgeryError, "the experts cannot be rearranged as asked", faults)


class _Renumbering:
    """A copy of a block whose experts are reordered; `wide` in float32 where it is in half precision."""

    def __init__(self, block: nn.Module, plan: Mapping[str, Any], call: Call, *, wide: bool) -> None:
        import torch

        from solidify.model import operations
        from solidify.surgery import contract

        self.block, self.plan = operations.twin(block), plan
        self.args, self.kwargs = contract.copied(call.args), contract.copied(call.kwargs)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in block.parameters())
        if half and wide:
            self.block.float()
            self.args, self.kwargs = contract.widened(self.args), contract.widened(self.kwargs)
        self.allowed = 5e-2 if half and not wide else 2e-5  # sums in another order
        self.expected = self._run(self.block)

    def _run(self, block: nn.Module) -> torch.Tensor:
        import torch

        from solidify.model import anatomy
        from solidify.surgery import contract

        with torch.no_grad(), anatomy.evaluation(block):
            return contract.tensors_in(block(*contract.copied(self.args), **contract.copied(self.kwargs)))[0].double()

    def find_faults(self) -> list[str]:
        """Says what is not as it must be: all together change nothing, and no part of them does alone."""
        parts = [*self.plan["tensors"], *self.plan["lists"]]
        moved = self._renumber(parts)
        if moved > self.allowed:
            return [
                f"when its experts are only renumbered, the output moves by {moved:.1e} of its largest value, so the "
                "experts are not interchangeable (a router that chooses among groups, or a part that knows them by "
                "number), or their router lies outside: name the block that holds both"
            ]
        parts = [part for part in parts if self._tells_apart(part)]
        for count in range(1, len(parts) // 2 + 1):
            for some in combinations(parts, count):
                if self._renumber(some) <= self.allowed:
                    others = [part for part in parts if part not in some]
                    return [
                        f"which of {', '.join(some)} and {', '.join(others)} belong to the experts cannot be told: "
                        f"each has {self.plan['size']}, and either can be reordered without the other"
                    ]
        return []

    def _tells_apart(self, part: str) -> bool:
        """Returns whether rows differ, and are more than a number each, which may move no choice of these inputs."""
        if part in self.plan["lists"]:
            states = [list(item.state_dict().values()) for item in _get_path(self.block, part)]
            return any(not a.equal(b) for state in states[1:] for a, b in zip(states[0], state, strict=True))
        tensor = _get_path(self.block, part)
        rows = tensor.movedim(self.plan["tensors"][part], 0)  # (number of experts, ...)
        scores = tensor.is_floating_point() and tensor.numel() == len(rows)
        return not scores and bool((rows != rows[:1]).any())

    def _renumber(self, parts: Iterable[str]) -> float:
        """Returns by how much the output moves, of its largest value, when experts are reordered in some parts."""
        import torch

        from solidify.model import operations

        some = set(parts)
        holder = torch.nn.Module()
        holder.add_module("block", operations.twin(self.block))
        order = [*range(1, self.plan["size"]), 0]  # no group of experts stays one
        tensors = {path: dim for path, dim in self.plan["tensors"].items() if path in some}
        lists = [path for path in self.plan["lists"] if path in some]
        take_experts(holder, ["block"], {"order": order, "tensors": tensors, "lists": lists, "numbers": []}, {})
        found = self._run(holder.get_submodule("block"))
        if found.shape != self.expected.shape:
            return float("inf")
        return float((found - self.expected).abs().max() / self.expected.abs().max().clamp(min=1e-30))


def _rearrange_one(model: PreTrainedModel, name: str, settings: dict[str, Any], extent: Extent) -> Edit:
    """Rearranges one block and writes the record."""
    from solidify.model import anatomy, operations
    from solidify.surgery.edit_record import Edit
    from solidify.weights import spilling

    block = model.get_submodule(name)
    old_keys, parameters = list(block.state_dict()), anatomy.count(block.parameters())
    order, size = settings["order"], settings.pop("size")
    kept = [*block.parameters(), *block.buffers()]
    take_experts(model, [name], settings, {})
    if not extent.whole:
        spilling.spill(name, block, kept, extent.spill)
    operations.assign(model.config, settings["after"])
    operations.set_attributes(model, settings["attributes"])
    same = order == list(range(size))
    tensors: dict[str, str | None] = {}
    for key in block.state_dict():
        inside = next((each for each in settings["lists"] if key.startswith(f"{each}.")), None)
        if inside is not None:
            number, _, rest = key.removeprefix(f"{inside}.").partition(".")
            tensors[f"{name}.{key}"] = f"{name}.{inside}.{order[int(number)]}.{rest}"
        else:
            tensors[f"{name}.{key}"] = f"{name}.{key}" if same or key not in settings["tensors"] else None
    lives = set(tensors.values())
    return Edit(
        name=name,
        old_class=type(block).__name__,
        module_class=None,
        arguments={"order": order},
        supplied=(),
        tensors=tensors,
        dropped=tuple(f"{name}.{key}" for key in old_keys if f"{name}.{key}" not in lives),
        frozen=(),
        parameters_before=parameters,
        parameters_after=anatomy.count(block.parameters()),
        probed=False,
        identical=False,
        bypass=False,
        operation=RearrangeExperts.recorded,
        settings=settings,
    )
