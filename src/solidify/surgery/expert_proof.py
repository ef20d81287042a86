"""That what was found in a block belongs to its experts, and nothing besides: shown by renumbering them in a copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, operations
from solidify.model.extent import Extent
from solidify.surgery import (
    contract,
    control,
    expert_averages,
    expert_groups,
    expert_parts,
    expert_tables,
    expert_taking,
)
from solidify.surgery.contract import Call


def refuse_unproved(
    model: PreTrainedModel, plans: Mapping[str, dict[str, Any]], inputs: Mapping[str, Any], extent: Extent
) -> None:
    """Renumbers experts in a copy of each block (of a bounded model, of the first of each kind).

    With all experts renumbered its output must stay, and with a part of what was found it must move: else that part is
    about something else that has as many rows (other experts, slots of a memory).

    Raises:
        SurgeryError: it is not so, as where a router first chooses among groups of experts; or a block is not called.
    """
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
        self.block, self.plan = operations.twin(block), plan
        self.args, self.kwargs = contract.copied(call.args), contract.copied(call.kwargs)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in block.parameters())
        if half and wide:
            self.block.float()
            self.args, self.kwargs = contract.widened(self.args), contract.widened(self.kwargs)
        self.allowed = 5e-2 if half and not wide else 2e-5  # sums in another order
        self.expected = self._run(self.block)

    def _run(self, block: nn.Module) -> torch.Tensor:
        with torch.no_grad(), anatomy.evaluation(block):
            return contract.tensors_in(block(*contract.copied(self.args), **contract.copied(self.kwargs)))[0].double()

    def find_faults(self) -> list[str]:
        """Says what is not as it must be: all together change nothing, and no part of them does alone."""
        parts = [*self.plan["tensors"], *self.plan["lists"], *self.plan.get("tables", {})]
        moved = self._renumber(parts)
        if not moved <= self.allowed:
            return [
                f"when its experts are only renumbered, the output moves by {moved:.1e} of its largest value, so the "
                "experts are not interchangeable (a router or another part that knows them "
                "by number), or their router lies outside: name the block that holds both"
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
            states = [list(item.state_dict().values()) for item in expert_parts.get_path(self.block, part)]
            return any(not a.equal(b) for state in states[1:] for a, b in zip(states[0], state, strict=True))
        tensor = expert_parts.get_path(self.block, part)
        if part in self.plan.get("tables", {}):
            return bool((tensor != tensor[:1, :1]).any())
        rows = tensor.movedim(self.plan["tensors"][part], 0)[: self.plan["size"]]  # (number of experts, ...)
        scores = tensor.is_floating_point() and rows.numel() == len(rows)
        return not scores and bool((rows != rows[:1]).any())

    def _renumber(self, parts: Iterable[str]) -> float:
        """Returns by how much the output moves, of its largest value, when experts are reordered in some parts."""

        some = set(parts)
        holder = torch.nn.Module()
        holder.add_module("block", operations.twin(self.block))
        groups = expert_groups.find_groups(self.block, self.plan["size"])
        # Without groups every expert has another neighbour; with them, groups stay together and stand elsewhere.
        order = [*range(1, self.plan["size"]), 0] if groups is None else groups.renumbered()
        tensors = {path: dim for path, dim in self.plan["tensors"].items() if path in some}
        lists = [path for path in self.plan["lists"] if path in some]
        edit = {"order": order, "tensors": tensors, "lists": lists, "numbers": []}
        expert_taking.take_experts(holder, ["block"], {**edit, "further": self.plan.get("further", {})}, {})
        tables = expert_tables.rewrite(self.block, self.plan, expert_tables.places(order, self.plan["size"]))
        block = holder.get_submodule("block")
        expert_averages.put_tensors(block, {path: table for path, table in tables.items() if path in some})
        found = self._run(block)
        if found.shape != self.expected.shape:
            return float("inf")
        return float((found - self.expected).abs().max() / self.expected.abs().max().clamp(min=1e-30))
