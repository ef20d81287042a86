"""Computes a sum over rows through a model's head chunk by chunk, so that the logits of all rows never exist together.

Gradients are computed in the forward pass: what is kept is the gradient of the rows and of the head's trainable
parameters, never logits. The idea is Liger's fused linear cross-entropy (arXiv 2410.10989) and Cut Cross-Entropy
(arXiv 2411.09009), here without a kernel and for any head and any loss that is a sum over rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from solidify.errors import ObjectiveError
from solidify.losses.precision import wide

CHUNK = 512  # rows; float32 logits of one chunk over 50 000 tokens are 0.1 GB

Head = Callable[[torch.Tensor], torch.Tensor]


def chunked(
    rows: torch.Tensor,
    head: Head,
    loss: Callable[..., torch.Tensor],
    beside: Sequence[torch.Tensor] = (),
    *,
    size: int = CHUNK,
) -> torch.Tensor:
    """Returns `Σ loss(head(rows), *beside)` as a float32 scalar, `size` rows at a time.

    Args:
        rows: (n, hidden_size), what the head reads; may require a gradient.
        head: rows (m, hidden_size) to logits (m, vocab_size); its trainable parameters are found in its graph.
        loss: a chunk's logits, as float32, and a chunk of each tensor in `beside` to a scalar: a sum over the rows.
        beside: tensors (n, ...) that are cut with the rows (labels, what a teacher returned); they get no gradient.
        size: rows in a chunk.

    Raises:
        ObjectiveError: `size` is not positive.
    """
    if size < 1:
        raise ObjectiveError(f"a chunk must have at least one row, but its size is {size}")
    if not len(rows):  # a sum of nothing, still a part of the graph
        return wide(rows).sum()
    step = _Step(head, loss, size)
    leaves = trainable(head, rows) if torch.is_grad_enabled() else []
    if leaves or (torch.is_grad_enabled() and rows.requires_grad):
        result: torch.Tensor = _Chunked.apply(rows, step, tuple(beside), *leaves)  # type: ignore[no-untyped-call]
        return result
    with torch.no_grad():
        return torch.stack([part for _, part in step.parts(rows, beside)]).sum()


def trainable(head: Head, rows: torch.Tensor) -> list[torch.Tensor]:
    """Returns the leaves that a gradient reaches through the head (its weight, its LoRA, a tied embedding).

    They are read off the graph of one row, so that a head may be any callable.
    """
    devices = [rows.device] if rows.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        row = rows[:1].detach().requires_grad_()
        pending: list[Any] = [head(row).grad_fn]
    seen: set[Any] = set()
    leaves: dict[int, torch.Tensor] = {}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # only nodes that accumulate into a leaf have one
        if leaf is not None and leaf is not row:
            leaves[id(leaf)] = leaf
        pending += [following for following, _ in node.next_functions]
    return list(leaves.values())


class _Step:
    """What is done with one chunk."""

    def __init__(self, head: Head, loss: Callable[..., torch.Tensor], size: int) -> None:
        self.head = head
        self.loss = loss
        self.size = size

    def parts(self, rows: torch.Tensor, others: Sequence[torch.Tensor]) -> Any:
        """Yields, chunk by chunk, the rows as they were given to the head, and their loss."""
        for start in range(0, len(rows), self.size):
            chunk = rows[start : start + self.size]
            if torch.is_grad_enabled():
                chunk = chunk.detach().requires_grad_()
            yield chunk, self.loss(wide(self.head(chunk)), *(t[start : start + self.size] for t in others))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, step: _Step, others: tuple[torch.Tensor, ...], *leaves: Any) -> Any:
        """Computes the loss and, chunk by chunk, all gradients; those of parameters are added up in float32."""
        total = torch.zeros((), device=rows.device)
        of_rows = torch.empty_like(rows)
        of_leaves = [wide(torch.zeros_like(leaf)) for leaf in leaves]
        start = 0
        with torch.enable_grad():
            for chunk, part in step.parts(rows, others):
                found = torch.autograd.grad(part, [chunk, *leaves], allow_unused=True)
                total = total + part.detach()
                of_rows[start : start + len(chunk)] = found[0] if found[0] is not None else 0
                for sum_, gradient in zip(of_leaves, found[1:], strict=True):
                    if gradient is not None:
                        sum_ += gradient
                start += len(chunk)
        ctx.save_for_backward(of_rows, *(g.to(leaf.dtype) for g, leaf in zip(of_leaves, leaves, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> Any:
        """Scales the gradients; never in place, so that a second backward pass sees them as they were."""
        of_rows, *of_leaves = (g * above.to(g.dtype) for g in ctx.saved_tensors)
        return of_rows, None, None, *of_leaves
