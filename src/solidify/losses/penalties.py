"""Loss terms on parameters: they ask for no data and count once per optimizer step.

`parameters` is a pattern or a list of patterns on names of the plain model, also under PEFT; the parts of a LoRA update
are named by its target. Default: all that is trained. Sharded parameters (FSDP2's DTensor) are not supported: torch
refuses to mix them with plain tensors.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.losses.arguments import count, positive
from solidify.losses.precision import wide
from solidify.losses.selection import Patterns, chosen, matrices


class WeightPenalty:
    """`½ Σ‖θ‖²` for l2, `Σ|θ|` for l1, over the parameters that `parameters` names (default: what is trained).

    Counted once per optimizer step. AdamW's decoupled weight decay is something else: it is not in the loss.
    """

    reduction = "constant"

    def __init__(self, parameters: Patterns = None, norm: str = "l2") -> None:
        if norm not in ("l1", "l2"):
            raise ObjectiveError(f"weight_penalty: norm must be l1 or l2, but is {norm!r}")
        self.parameters = parameters
        self.norm = norm

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32."""
        found = [wide(each.parameter) for each in chosen("weight_penalty", model, self.parameters)]
        return torch.stack([p.square().sum() / 2 if self.norm == "l2" else p.abs().sum() for p in found]).sum()


class GroupLasso:
    """`Σ_g √|g| sqrt(‖θ_g‖² + ε)`: drives whole groups to zero together (group lasso, Yuan and Lin, 2006).

    `groups`: `rows` (of every matrix; of LoRA's A these are its ranks), `columns`, `experts` (first dimension of
    parameters with three), `tensors` (each parameter a group). ε inside the root gives a zero group the gradient 0.
    """

    reduction = "constant"
    GROUPS: ClassVar[tuple[str, ...]] = ("rows", "columns", "experts", "tensors")

    def __init__(self, groups: str = "rows", parameters: Patterns = None, epsilon: float = 1e-12) -> None:
        if groups not in self.GROUPS:
            raise ObjectiveError(f"group_lasso: groups must be one of {', '.join(self.GROUPS)}, but is {groups!r}")
        self.groups = groups
        self.parameters = parameters
        self.epsilon = positive("group_lasso", "epsilon", epsilon)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32.

        Raises:
            ObjectiveError: a named parameter has no such groups (a vector has no rows, a matrix no experts).
        """
        return torch.stack([self._compute_penalty(stack) for stack in self._build_stacks(model)]).sum()

    def _build_stacks(self, model: nn.Module) -> list[torch.Tensor]:
        """Returns float32 tensors (groups, elements)."""
        if self.groups == "tensors":
            found = chosen("group_lasso", model, self.parameters)
            return [wide(each.parameter).reshape(1, -1) for each in found]
        stacks = matrices("group_lasso", model, self.parameters)
        if self.groups == "experts":
            flat = [name for name, stack in stacks.items() if len(stack) == 1]
            if flat:
                raise ObjectiveError(f"group_lasso: {', '.join(flat)} has no dimension of experts; name `parameters`")
            return [stack.flatten(1) for stack in stacks.values()]
        turned = [stack if self.groups == "rows" else stack.mT for stack in stacks.values()]
        return [stack.flatten(0, 1) for stack in turned]

    def _compute_penalty(self, groups: torch.Tensor) -> torch.Tensor:
        norms = (groups.square().sum(1) + self.epsilon).sqrt()
        return math.sqrt(groups.shape[1]) * norms.sum()


class Orthogonality:
    """`Σ ‖W Wᵀ - I‖²_F` over matrices, on the smaller side (soft orthogonality of arXiv 1810.09102).

    `normalize` divides every row by its norm first, so that only directions count: for a router, whose rows are its
    experts, `‖Ŵ Ŵᵀ - I‖²_F` then keeps experts apart (the rows are then used even if there are more than columns).
    """

    reduction = "constant"

    def __init__(self, parameters: Patterns = None, normalize: bool = False) -> None:
        self.parameters = parameters
        self.normalize = normalize

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32."""
        found = matrices("orthogonality", model, self.parameters).values()
        return torch.stack([self._compute_penalty(stack) for stack in found]).sum()

    def _compute_penalty(self, stack: torch.Tensor) -> torch.Tensor:
        if self.normalize:
            stack = F.normalize(stack, dim=-1)
        elif stack.shape[1] > stack.shape[2]:
            stack = stack.mT
        products = stack @ stack.mT
        return (products - torch.eye(products.shape[-1], device=products.device)).square().sum()


class Spectral:
    """`Σ σ_max(W)²` over matrices (arXiv 1705.10941), σ_max by power iteration (arXiv 1802.05957, algorithm 1).

    The vectors are remembered from step to step (and in checkpoints); one iteration an optimizer step, `start` in the
    first. Within a step the weights do not change and neither do the vectors, so that the value is one for all
    micro-batches: whether the weights changed is seen by `Wᵀu`, which is compared with what it was. (Tensors' version
    counters would not do: torch 2.13's fused optimizers do not count.) The gradient is that of `uᵀWv` at fixed u and v.
    """

    reduction = "constant"

    def __init__(self, parameters: Patterns = None, start: int = 20) -> None:
        self.parameters = parameters
        self.start = count("spectral", "start", start)
        self.left: dict[str, torch.Tensor] = {}
        self.right: dict[str, torch.Tensor] = {}

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32."""
        terms = []
        for name, stack in matrices("spectral", model, self.parameters).items():
            left, right = self._find_vectors(name, stack.detach())
            terms.append((left * (stack @ right)).sum((1, 2)).square().sum())
        return torch.stack(terms).sum()

    def _find_vectors(self, name: str, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns left and right singular vectors (experts, rows, 1) and (experts, columns, 1)."""
        if name in self.left:
            left = self.left[name].to(stack)
            right = _normalize_vectors(stack.mT @ left)
            steps = int(not torch.equal(right, self.right[name].to(stack)))
        else:
            generator = torch.Generator().manual_seed(len(self.left))
            left = _normalize_vectors(torch.randn(*stack.shape[:2], 1, generator=generator, dtype=torch.float32)).to(
                stack
            )
            right = _normalize_vectors(stack.mT @ left)
            steps = self.start
        for _ in range(steps):
            left = _normalize_vectors(stack @ right)
            right = _normalize_vectors(stack.mT @ left)
        self.left[name], self.right[name] = left, right
        return left, right


def _normalize_vectors(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors, dim=1)
