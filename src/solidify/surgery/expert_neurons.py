"""The intermediate neurons of experts: where they stand in the tensors, and which of two experts' are alike.

Where they stand is found by sizes, and proved: with the neurons of all experts in another order, a block must compute
what it computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from solidify.errors import SurgeryError
from solidify.surgery import contract
from solidify.surgery.contract import Call

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where the neurons stand in a tensor of an expert: along `dim`, `parts` times, one after the other or by turns."""

    dim: int
    parts: int = 1
    by_turns: bool = False

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor as (neurons, parts, ...)."""
        rows = tensor.movedim(self.dim, 0)
        size, rest = len(rows) // self.parts, rows.shape[1:]
        if self.by_turns:
            return rows.reshape(size, self.parts, *rest)
        return rows.reshape(self.parts, size, *rest).transpose(0, 1)

    def write(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the tensor that `read` has taken apart."""
        rows = rows if self.by_turns else rows.transpose(0, 1)
        return rows.flatten(0, 1).movedim(0, self.dim).contiguous()


Layout = Mapping[str, Place]


def permute(tensors: Tensors, layout: Layout, order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors of an expert with its neurons in another order."""
    return {
        path: layout[path].write(layout[path].read(tensor)[order]) if path in layout else tensor
        for path, tensor in tensors.items()
    }


def find_layout(block: nn.Module, experts: Sequence[Mapping[str, tuple[str, int | None]]], call: Call) -> Layout:
    """Returns where the neurons of a block's experts stand; `experts` says which tensors each expert has.

    Raises:
        SurgeryError: nowhere that could be found.
    """
    parameters = {path: tensor.detach() for path, tensor in block.named_parameters()}
    first = read_expert(parameters, experts[0])
    half = next(iter(first.values())).dtype in (torch.float16, torch.bfloat16)
    expected = _run_with(block, {}, call)
    allowed = (5e-2 if half else 2e-5) * float(expected.abs().max())  # sums in another order
    for layout, size in _list_layouts(first):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        moved = {path: parameters[path].clone() for expert in experts for path, _ in expert.values()}
        for expert in experts:
            write_expert(moved, expert, permute(read_expert(parameters, expert), layout, order))
        if float((_run_with(block, moved, call) - expected).abs().max()) <= allowed:
            return layout
    shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in first.items())
    raise SurgeryError(
        f"where the neurons of its experts stand ({shapes}) was not found: in no order of a dimension that its "
        "matrices share does the block compute what it did, so experts cannot be aligned"
    )


def read_expert(tensors: Tensors, expert: Mapping[str, tuple[str, int | None]]) -> dict[str, torch.Tensor]:
    """Returns the tensors of one expert, by the role that they have in each."""
    return {role: tensors[path] if number is None else tensors[path][number] for role, (path, number) in expert.items()}


def write_expert(
    tensors: Mapping[str, torch.Tensor], expert: Mapping[str, tuple[str, int | None]], values: Tensors
) -> None:
    """Writes the tensors of one expert."""
    for role, (path, number) in expert.items():
        (tensors[path] if number is None else tensors[path][number]).copy_(values[role])


def align(reference: Tensors, other: Tensors, layout: Layout) -> dict[str, torch.Tensor]:
    """Returns the tensors of an expert with its neurons in the order of those of a reference that they are nearest to.

    All pairs are taken in the order of the distance between what comes in and goes out of them, and a pair is matched
    where neither is yet: exact for permuted copies, and greedy, not the best sum of all, otherwise.
    """
    ours, theirs = _describe_neurons(reference, layout), _describe_neurons(other, layout)
    distances = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")
    order = torch.full((len(ours),), -1)
    while bool((order < 0).any()):
        nearest, back = distances.argmin(1), distances.argmin(0)
        rows = torch.arange(len(order))
        mutual = (order < 0) & (back[nearest] == rows)
        order[mutual] = nearest[mutual]
        distances[mutual] = torch.inf
        distances[:, order[mutual]] = torch.inf
    return permute(other, layout, order)


def _describe_neurons(tensors: Tensors, layout: Layout) -> torch.Tensor:
    """Returns the weights into and out of every neuron (neurons, ...)."""
    return torch.cat([place.read(tensors[path]).double().flatten(1) for path, place in layout.items()], dim=1)


def _list_layouts(tensors: Tensors) -> Iterator[tuple[Layout, int]]:
    """Yields where neurons could stand: along one dimension of every matrix, and of none or one of every vector.

    The most neurons come first: half as many, two at a time, change places as well.
    """
    matrices = {path: tensor for path, tensor in tensors.items() if tensor.ndim == 2}
    sizes = {size // parts for tensor in matrices.values() for size in tensor.shape for parts in (1, 2)}
    for size in sorted(sizes, reverse=True):
        choices: list[list[Place | None]] = []
        for tensor in tensors.values():
            places: list[Place | None] = []
            for dim, length in enumerate(tensor.shape):
                places += [Place(dim)] if length == size else []
                places += [Place(dim, 2), Place(dim, 2, by_turns=True)] if length == 2 * size else []
            choices.append(places if tensor.ndim == 2 else [*places, None])
        for chosen in product(*choices):
            yield {path: place for path, place in zip(tensors, chosen, strict=True) if place is not None}, size


def _run_with(block: nn.Module, tensors: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    given: Any = contract.copied(call.args)
    with torch.no_grad():
        output = torch.func.functional_call(block, tensors, given, contract.copied(call.kwargs), strict=False)
    return contract.tensors_in(output)[0].double()
