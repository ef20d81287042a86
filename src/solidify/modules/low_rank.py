"""A linear layer as two thin ones: the best of their rank, by the singular value decomposition.

    W = U S V^T  (out, in);   down = S_r^(1/2) V_r^T  (rank, in),   up = U_r S_r^(1/2)  (out, rank)
    y = up(down(x)) + b

Of all matrices of that rank the product is nearest to W (Eckart and Young, 1936): what is lost is, in squares, the sum
of the squared singular values after the first `rank`, and in any one direction at most the next of them. At full rank,
the smaller of `in` and `out`, nothing is lost but rounding. The factors have `rank * (in + out)` numbers instead of
`in * out`.

What inputs are like is not looked at: a cut that weighs directions by the inputs (SVD-LLM, arXiv 2403.07378) loses less
of the output; here it is learned back by training.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import torch
from torch import nn


class LowRank(nn.Module):
    """Puts two linear layers, `down` and `up` (with the bias), in the place of one (also transformers' `Conv1D`).

    Either `rank` is given, or `share`: the part of the layer's matrix, in numbers, that both factors together may have.
    """

    def __init__(self, original: nn.Module, rank: int | None = None, share: float | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix(original).shape
        self.transposed = not isinstance(original, nn.Linear)
        self.rank = choose_rank(self.in_features, self.out_features, rank, share)
        self.down = nn.Linear(self.in_features, self.rank, bias=False)
        self.up = nn.Linear(self.rank, self.out_features, bias=getattr(original, "bias", None) is not None)

    def adopt(self, original: nn.Module) -> None:
        """Factors the original's matrix, in float64, and copies its bias."""
        left, strengths, right = torch.linalg.svd(matrix(original).double(), full_matrices=False)
        root = strengths[: self.rank].sqrt()
        self.down.weight.copy_(root[:, None] * right[: self.rank])
        self.up.weight.copy_(left[:, : self.rank] * root)
        if self.up.bias is not None:
            self.up.bias.copy_(original.get_parameter("bias"))

    @property
    def weight(self) -> torch.Tensor:
        """The matrix that both stand for, as the original holds it: some models read a layer's dtype from it."""
        product: torch.Tensor = self.up.weight @ self.down.weight
        return product.T if self.transposed else product

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the whole."""
        return self.up.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in) to (..., out)."""
        output: torch.Tensor = self.up(self.down(hidden_states))
        return output


def matrix(original: nn.Module) -> torch.Tensor:
    """Returns a linear layer's matrix, (out, in)."""
    if isinstance(original, nn.Linear):
        return original.weight
    if type(original).__name__ == "Conv1D":  # transformers', which keeps it transposed
        return original.get_parameter("weight").T
    raise ValueError(f"LowRank takes the place of a linear layer (Linear, Conv1D), but found {type(original).__name__}")


def choose_rank(inside: int, outside: int, rank: int | None, share: float | None) -> int:
    """Returns the rank that is asked for, or the largest whose factors have no more than a share of the numbers."""
    full = min(inside, outside)
    if (rank is None) == (share is None):
        raise ValueError(f"either rank or share is given, but rank is {rank} and share is {share}")
    if share is not None:
        rank = min(full, int(share * inside * outside / (inside + outside)))
    if rank is None or not 1 <= rank <= full:
        raise ValueError(
            f"the rank of a layer from {inside} to {outside} is between 1 and {full}, but is {rank}"
            + (f" for share {share}" if share is not None else "")
        )
    return rank
