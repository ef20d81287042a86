"""Loss terms on what the model predicts: next tokens, and how sure it is of them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.losses.arguments import count, number
from solidify.losses.chunking import CHUNK, Head, chunked
from solidify.losses.precision import wide


def targets(labels: torch.Tensor, length: int) -> torch.Tensor:
    """Returns which positions predict a target: (batch_size, length - 1), True where the next label is not -100.

    Raises:
        ObjectiveError: what was returned has another length than the labels, so that rows cannot be told apart,
            or there is one label a row.
    """
    if labels.ndim != 2:
        raise ObjectiveError(
            f"a term on target tokens needs a label for each of them, but labels are {list(labels.shape)}"
        )
    if labels.shape[1] != length:
        raise ObjectiveError(
            f"the labels have {labels.shape[1]} positions a row, but the model returned {length}; a term on target "
            "tokens needs one for one"
        )
    return labels[:, 1:] != -100


class NextToken:
    """`-Σ log p(next token)` over target tokens: the model's own loss, computed without ever building its logits.

    Rows without a target are dropped before the head runs, the others go through it `chunk` at a time, and gradients
    are computed with each chunk (see `chunking.py`). The softmax is in float32. Sum over target tokens (`token_sum`).
    Equal to cross-entropy to float32 rounding; with an objective of this term alone the forward pass needs no logits.
    """

    reduction = "token_sum"
    shifts = True

    def __init__(self, chunk: int = CHUNK, label_smoothing: float = 0.0) -> None:
        if not 0 <= number("next_token", "label_smoothing", label_smoothing) < 1:
            raise ObjectiveError(f"next_token: label_smoothing must be from 0 to below 1, but is {label_smoothing}")
        self.chunk = count("next_token", "chunk", chunk)
        self.label_smoothing = label_smoothing

    def __call__(self, hidden_states: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        """Takes hidden_states (batch_size, sequence_length, hidden_size), the model's head, and labels."""
        where = targets(labels, hidden_states.shape[1])
        return chunked(hidden_states[:, :-1][where], head, self._sum_losses, [labels[:, 1:][where]], size=self.chunk)

    def _sum_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)


class OutputEntropy:
    """`-Σ H(p)` over target tokens, `H(p) = -Σ_v p_v log p_v`: the confidence penalty of arXiv 1701.06548 (section 3).

    A positive weight makes the outputs more diverse, a negative one sharper. Sum over target tokens (`token_sum`).
    """

    reduction = "token_sum"
    shifts = True

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (batch_size, sequence_length, vocab_size) and labels with -100 where nothing is predicted."""
        where = targets(labels, logits.shape[1])
        log_p = F.log_softmax(wide(logits[:, :-1][where]), dim=-1)
        return (log_p.exp() * log_p).sum()
