"""The layouts of low-rank updates of experts, as pure functions of tensors; docs/expert_lora.md has the formulas.

Between all of them stand `Factors`: for each of E experts an A of shape (rank, in_features) and a B of shape
(out_features, rank), so that the update of expert e is `scale * B[e] @ A[e]`, of shape (out_features, in_features).
Every function moves numbers and computes none, so that a way there and back gives the same bits.

Sources: PEFT 0.21.2 `tuners/lora/layer.py`, `ParamWrapper` (fused) and `utils/transformers_weight_conversion.py` (one
by one); unsloth-zoo `temporary_patches/moe_utils.py` before and after its pull requests 1232 and 1269 (grouped); vLLM
`lora/model_manager.py` at 01533aa, `_stack_moe_lora_weights` and `_slice_moe_lora_ep` (fused and stacked).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

PEFT, GROUPED = "peft", "grouped"
ORDERS = (PEFT, GROUPED)
NAMES = {
    PEFT: "PEFT's fused layout",
    GROUPED: "the fused layout grouped by expert, as unsloth-zoo trained it before September 2026",
    "lists": "one by one, as transformers 4 and vLLM have them",
    "stacked": "stacked by expert, as vLLM's adapters with shared factors have them",
}


class Factors(NamedTuple):
    """The update of E experts: `a` is (experts, rank, in_features), `b` is (experts, out_features, rank)."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """The rank of each expert's update."""
        return self.a.shape[1]


def unpack(a: torch.Tensor, b: torch.Tensor, experts: int, order: str = PEFT) -> Factors:
    """Takes two matrices of all experts apart: (experts * rank, in_features) and (out_features, experts * rank).

    The rows of A stand expert by expert in every order. The columns of B stand rank by rank in PEFT's (column
    `k * experts + e`), and expert by expert in the grouped one (column `e * rank + k`).

    Raises:
        ValueError: the matrices are not of that many experts, or of different ranks.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % experts:
        raise ValueError(
            f"factors of shapes {list(a.shape)} and {list(b.shape)} are not those of {experts} experts: the rows of "
            "the first and the columns of the second must be as many, and a multiple of the experts"
        )
    rank = a.shape[0] // experts
    by_expert = a.reshape(experts, rank, a.shape[1])
    if order == PEFT:
        return Factors(by_expert, b.reshape(b.shape[0], rank, experts).permute(2, 0, 1).contiguous())
    if order == GROUPED:
        return Factors(by_expert, b.reshape(b.shape[0], experts, rank).permute(1, 0, 2).contiguous())
    raise ValueError(f"the order {order!r} is none of {', '.join(ORDERS)}")


def pack(factors: Factors, order: str = PEFT) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts the factors of all experts into two matrices; undoes `unpack`."""
    a, b = factors
    rows = a.reshape(-1, a.shape[2]).contiguous()
    axes = {PEFT: (1, 2, 0), GROUPED: (1, 0, 2)}
    if order not in axes:
        raise ValueError(f"the order {order!r} is none of {', '.join(ORDERS)}")
    return rows, b.permute(*axes[order]).reshape(b.shape[1], -1).contiguous()


def turn(factors: Factors) -> Factors:
    """Swaps input and output: the update of the transposed weight. PEFT until 0.19.0 stored most experts like that."""
    return Factors(factors.b.mT.contiguous(), factors.a.mT.contiguous())


def from_list(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Factors:
    """Stacks the (A, B) of single experts: (rank, in_features) and (out_features, rank), as a linear layer has them.

    Raises:
        ValueError: they differ in shape.
    """
    shapes = {(tuple(a.shape), tuple(b.shape)) for a, b in pairs}
    if len(shapes) != 1:
        raise ValueError(f"the experts' factors have different shapes: {sorted(shapes)}")
    return Factors(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]))


def to_list(factors: Factors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Takes the experts apart; undoes `from_list`."""
    return [(a.contiguous(), b.contiguous()) for a, b in zip(*factors, strict=True)]


def from_stacked(a: torch.Tensor, b: torch.Tensor, experts: int) -> Factors:
    """Reads tensors of three axes whose first one is the expert, or of size 1 where all experts share the factor.

    Raises:
        ValueError: the first axis has another size.
    """
    if a.ndim != 3 or b.ndim != 3 or not {a.shape[0], b.shape[0]} <= {1, experts} or a.shape[1] != b.shape[2]:
        raise ValueError(
            f"stacked factors of shapes {list(a.shape)} and {list(b.shape)} are not those of {experts} experts"
        )
    return Factors(a.expand(experts, -1, -1).contiguous(), b.expand(experts, -1, -1).contiguous())


def fuse(gate: Factors, up: Factors, *, interleaved: bool = False) -> Factors:
    """Joins the updates of two weights that are one in memory: (out_features of both, in_features).

    Where both share A bit for bit, so does the result, with its rank. Otherwise the ranks add up: B has the two as
    blocks, and zeros beside them. `scale` is that of each of the two: who stores `alpha / rank` must raise alpha.
    """
    shared = gate.a.shape == up.a.shape and torch.equal(gate.a, up.a)
    if shared:
        return Factors(gate.a, _join_rows(gate.b, up.b, interleaved))
    left = torch.cat([gate.b, gate.b.new_zeros(*gate.b.shape[:2], up.rank)], dim=2)
    right = torch.cat([up.b.new_zeros(*up.b.shape[:2], gate.rank), up.b], dim=2)
    return Factors(torch.cat([gate.a, up.a], dim=1), _join_rows(left, right, interleaved))


def split(fused: Factors, *, interleaved: bool = False) -> tuple[Factors, Factors]:
    """Takes the update of a fused weight apart; undoes `fuse`.

    Blocks with zeros beside them get their own halves of the rank. Any other update is split in B alone: both parts
    have the whole rank, and the same A.
    """
    top, bottom = _part_rows(fused.b, interleaved)
    half, odd = divmod(fused.rank, 2)
    if not odd and not torch.any(top[..., half:]) and not torch.any(bottom[..., :half]):
        first = Factors(fused.a[:, :half].contiguous(), top[..., :half].contiguous())
        return first, Factors(fused.a[:, half:].contiguous(), bottom[..., half:].contiguous())
    return Factors(fused.a, top.contiguous()), Factors(fused.a, bottom.contiguous())


def _join_rows(first: torch.Tensor, second: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Joins (experts, rows, rank) along the rows: one after the other, or alternating."""
    if interleaved:
        return torch.stack([first, second], dim=2).flatten(1, 2)
    return torch.cat([first, second], dim=1)


def _part_rows(joined: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return joined[:, 0::2], joined[:, 1::2]
    first, second = joined.chunk(2, dim=1)
    return first, second
