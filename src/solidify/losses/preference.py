"""Loss terms on preferences: pairs of a chosen and a rejected answer."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.losses.arguments import number, positive
from solidify.losses.precision import wide
from solidify.losses.prediction import targets


class DPO:
    """`-log σ(β ((log π_w - log π⁰_w) - (log π_l - log π⁰_l)))`, mean over pairs (arXiv 2305.18290, eq. 7).

    The rows of a batch are pairs: the first half chosen (w), the second half rejected (l), in the same order, as TRL's
    preference collator lays them out. `log π` is the sum of log-probabilities over a row's target tokens, π⁰ the
    reference's: the unmodified base, or `Objective(..., reference=model)`. Exactly log 2 while both say the same.
    `smoothing` is the probability that a preference is the wrong way round (cDPO). Mean over sequences
    (`sequence_mean`); dropout in the model that is trained, none in the reference.
    """

    reduction = "sequence_mean"
    shifts = True

    def __init__(self, beta: float = 0.1, smoothing: float = 0.0) -> None:
        positive("dpo", "beta", beta)
        if not 0 <= number("dpo", "smoothing", smoothing) < 0.5:
            raise ObjectiveError(f"dpo: smoothing must be from 0 to below 1/2, but is {smoothing}")
        self.beta = beta
        self.smoothing = smoothing

    def __call__(self, logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (2 pairs, sequence_length, vocab_size) and labels with -100 where nothing is predicted.

        Raises:
            ObjectiveError: the number of rows is odd.
        """
        if len(labels) % 2:
            raise ObjectiveError(
                "dpo: a batch must consist of pairs, all chosen answers before all rejected ones, but it has "
                f"{len(labels)} rows"
            )
        ours, theirs = sequence_log_probabilities(logits, labels), sequence_log_probabilities(reference_logits, labels)
        chosen, rejected = (ours - theirs.detach()).chunk(2)
        margin = self.beta * (chosen - rejected)
        loss = -(1 - self.smoothing) * F.logsigmoid(margin) - self.smoothing * F.logsigmoid(-margin)
        return loss.mean()


def sequence_log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns for every row the sum of its target tokens' log-probabilities (batch_size,), in float32."""
    where = targets(labels, logits.shape[1])
    rows = where.nonzero()[:, 0]
    each = -F.cross_entropy(wide(logits[:, :-1][where]), labels[:, 1:][where], reduction="none")
    return each.new_zeros(len(labels)).index_add(0, rows, each)
