"""The tensors of merged experts: averages over a cluster, of the router's rows too, after neurons are aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError
from solidify.model.extent import Extent
from solidify.surgery import contract, control, expert_neurons, expert_parts
from solidify.surgery.expert_neurons import Layout

_Parts = Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class Merging:
    """What becomes one: for each block, each new expert's old ones with their shares; and where the shares are from.

    A `planned` merging has stand-ins for clusters that are found later.
    """

    parts: Mapping[str, _Parts]
    weights: str
    planned: bool = False

    def describe(self, name: str) -> dict[str, Any]:
        """Says of one block what becomes one; of a planned merging, how many experts are left."""
        clusters = [list(part) for part in self.parts[name]]
        experts = {"into": len(clusters)} if self.planned else {"clusters": clusters}
        return {**experts, "weights": self.weights}

    def renumber(self, name: str) -> list[list[int]]:
        """Returns the new number of each old expert of a block: that of its cluster."""
        numbers = {expert: [new] for new, part in enumerate(self.parts[name]) for expert in part}
        return [numbers[expert] for expert in sorted(numbers)]

    def find_layouts(
        self,
        model: PreTrainedModel,
        plans: Mapping[str, Mapping[str, Any]],
        inputs: Mapping[str, torch.Tensor],
        extent: Extent,
    ) -> dict[str, Layout]:
        """Returns where the neurons of each block's experts stand, found at the first block of each kind.

        Raises:
            SurgeryError: it is not found.
        """
        first = control.first_of_each_kind(model, list(plans))
        calls = contract.record(model, tuple(first), inputs, partly=not extent.whole)
        found: dict[object, Layout] = {}
        for name, kind in first.items():
            block = model.get_submodule(name)
            try:
                found[kind] = expert_neurons.find_layout(block, _list_experts(block, plans[name]), calls[name])
            except SurgeryError as error:
                raise SurgeryError(f"{name}: {error}") from error
        return {name: found[control.kind_of(model.get_submodule(name))] for name in plans}

    def average(self, name: str, block: nn.Module, plan: Mapping[str, Any], layout: Layout) -> dict[str, torch.Tensor]:
        """Returns the new tensors of one block by path, each with its experts as they will be numbered."""
        experts, parts = _list_experts(block, plan), self.parts[name]
        tensors = {path: tensor.detach() for path, tensor in block.named_parameters()}
        found: dict[str, torch.Tensor] = {}
        own: set[str] = set()
        for number, part in enumerate(parts):
            heaviest = plan["order"][number]
            reference = expert_neurons.read_expert(tensors, experts[heaviest])
            total: dict[str, torch.Tensor] = {}
            for expert, share in part.items():
                values = expert_neurons.read_expert(tensors, experts[expert])
                if expert != heaviest:
                    values = expert_neurons.align(reference, values, layout)
                total = {role: share * value.double() + total.get(role, 0.0) for role, value in values.items()}
            for role, (path, index) in experts[heaviest].items():
                own.add(path)
                value = total[role].to(tensors[path].dtype)
                if index is None:
                    found[_renumber(path, plan["lists"], number)] = value
                else:
                    rest = tensors[path][plan["size"] :]
                    stack = found.setdefault(path, torch.cat([rest.new_empty(len(parts), *value.shape), rest]))
                    stack[number] = value
        return found | self._average_rows(name, block, plan, own)

    def _average_rows(
        self, name: str, block: nn.Module, plan: Mapping[str, Any], own: set[str]
    ) -> dict[str, torch.Tensor]:
        """Returns what the router has for each new expert: averages of rows; of what is no float, the heaviest's."""
        found = {}
        for path, dim in plan["tensors"].items():
            tensor = expert_parts.get_path(block, path).detach()
            if path in own or not tensor.is_floating_point():
                continue
            rows = tensor.movedim(dim, 0)
            averages = [sum(share * rows[e].double() for e, share in part.items()) for part in self.parts[name]]
            new = torch.stack([*(torch.as_tensor(each) for each in averages), *rows[plan["size"] :].double()])
            found[path] = new.to(tensor.dtype).movedim(0, dim)
        return found


def put_tensors(block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts new tensors in the places of those that are there."""
    for path, value in tensors.items():
        owner, _, key = path.rpartition(".")
        holder = block.get_submodule(owner)
        old = getattr(holder, key)
        if isinstance(old, nn.Parameter):
            holder.register_parameter(key, nn.Parameter(value.contiguous(), requires_grad=old.requires_grad))
        else:
            setattr(holder, key, value.contiguous())


def _list_experts(block: nn.Module, plan: Mapping[str, Any]) -> list[dict[str, tuple[str, int | None]]]:
    """Returns, for each expert, its tensors by role: the path of the tensor, and the row of a stack."""
    experts: list[dict[str, tuple[str, int | None]]] = [{} for _ in range(plan["size"])]
    for path, (_, number) in expert_parts.expert_tensors(block, plan).items():
        if number is None:
            for expert, own in enumerate(experts):
                own[path] = (path, expert)
        else:
            experts[number][_renumber(path, plan["lists"], 0)] = (path, None)
    return experts


def _renumber(path: str, lists: Sequence[str], number: int) -> str:
    """Returns the path of a list's tensor with another number of the expert."""
    inside = next(each for each in lists if path.startswith(f"{each}."))
    return f"{inside}.{number}.{path.removeprefix(f'{inside}.').partition('.')[2]}"
