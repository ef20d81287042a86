"""Loss terms that keep a model near another one."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class KLToBase:
    """`τ² KL(p_base ‖ p)` summed over target tokens, p at temperature τ; the base is the unmodified model.

    Distillation as in Hinton et al. (arXiv 1503.02531), forward direction.
    """

    reduction = "token_sum"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def __call__(self, logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (batch_size, sequence_length, vocab_size) and labels with -100 where nothing is predicted."""
        targets = labels[:, 1:] != -100
        ours = F.log_softmax(logits[:, :-1][targets].float() / self.temperature, dim=-1)
        base = F.log_softmax(reference_logits[:, :-1][targets].float() / self.temperature, dim=-1)
        return self.temperature**2 * F.kl_div(ours, base, log_target=True, reduction="sum")
