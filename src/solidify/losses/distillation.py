"""Loss terms that keep a model near another one: the unmodified base, or a teacher.

All compare the two next-token distributions at target tokens, `p` the reference's and `q` the model's, both at a
temperature τ, times τ² (arXiv 1503.02531, section 2: gradients then keep their size). Sums over target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.losses.arguments import count, positive, share
from solidify.losses.chunking import CHUNK, Head, chunked
from solidify.losses.precision import wide
from solidify.losses.prediction import targets

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (log q, log p) (n, vocab_size) to a scalar


def _compute_kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """Returns Σ KL(a ‖ b) over rows."""
    return F.kl_div(log_b, log_a, log_target=True, reduction="sum")


def _jensen_shannon(beta: float, swapped: bool) -> Divergence:
    def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Sums over rows, from log-probabilities (rows, vocab_size)."""
        if beta == 0:
            return _compute_kl(theirs, ours)
        if beta == 1:
            return _compute_kl(ours, theirs)
        mixture = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
        first, second = (1 - beta, beta) if swapped else (beta, 1 - beta)
        return first * _compute_kl(theirs, mixture) + second * _compute_kl(ours, mixture)

    return divergence


class _Compared:
    """What the terms share: shifting, masking, temperature; `divergence` is what they differ in."""

    reduction = "token_sum"
    shifts = True

    def __init__(self, divergence: Divergence, temperature: float) -> None:
        self._divergence = divergence
        self.temperature = positive("a distillation", "temperature", temperature)

    def __call__(self, logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (batch_size, sequence_length, vocab_size) and labels with -100 where nothing is predicted."""
        _same_vocabulary(logits, reference_logits)
        where = targets(labels, logits.shape[1])
        return self._compare_logits(logits[:, :-1][where], reference_logits[:, :-1][where])

    def _compare_logits(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        log_q = F.log_softmax(wide(ours) / self.temperature, dim=-1)
        log_p = F.log_softmax(wide(theirs) / self.temperature, dim=-1)
        return self.temperature**2 * self._divergence(log_q, log_p)


class ForwardKL(_Compared):
    """`τ² KL(p ‖ q)`: covers all that the reference may say (arXiv 1503.02531). Sum over target tokens."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(lambda ours, theirs: _compute_kl(theirs, ours), temperature)


class ReverseKL(_Compared):
    """`τ² KL(q ‖ p)`: keeps to what the reference holds likely (arXiv 2306.08543, eq. 1). Sum over target tokens."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(_compute_kl, temperature)


class JensenShannon(_Compared):
    """`τ² (β KL(p ‖ m) + (1-β) KL(q ‖ m))`, `m = βp + (1-β)q`: the generalised JSD of GKD (arXiv 2306.13649, eq. 1).

    Inside (0, 1) it tends to 0 at both ends; at the ends themselves it is defined, as in TRL's GKDTrainer, as
    `KL(p ‖ q)` for β = 0 and `KL(q ‖ p)` for β = 1, a jump. `jensen_shannon_continuous` has none. Sum over targets.
    """

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(_jensen_shannon(share("jensen_shannon", "beta", beta), swapped=False), temperature)


class JensenShannonContinuous(_Compared):
    """`τ² ((1-β) KL(p ‖ m) + β KL(q ‖ m))`, `m = βp + (1-β)q`: weights swapped, so that it has no jump.

    Tends to `KL(p ‖ q)` for β to 0 and to `KL(q ‖ p)` for β to 1; equals `jensen_shannon` at β = 1/2. Sum over targets.
    """

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__(_jensen_shannon(share("jensen_shannon_continuous", "beta", beta), swapped=True), temperature)


_BY_NAME: dict[str, Callable[[float, float], _Compared]] = {
    "forward_kl": lambda temperature, beta: ForwardKL(temperature),
    "reverse_kl": lambda temperature, beta: ReverseKL(temperature),
    "jensen_shannon": lambda temperature, beta: JensenShannon(beta, temperature),
    "jensen_shannon_continuous": lambda temperature, beta: JensenShannonContinuous(beta, temperature),
}


class ChunkedDistillation:
    """One of the divergences above, from hidden states: neither model's logits of all rows ever exist together.

    `divergence` is forward_kl, reverse_kl, jensen_shannon or jensen_shannon_continuous; `beta` is for the latter two.
    Rows without a target are dropped before the heads run; `chunk` rows at a time (see `chunking.py`).
    """

    reduction = "token_sum"
    shifts = True

    def __init__(
        self, divergence: str = "forward_kl", temperature: float = 1.0, beta: float = 0.5, chunk: int = CHUNK
    ) -> None:
        if divergence not in _BY_NAME:
            raise ObjectiveError(
                f"chunked_distillation: divergence must be one of {', '.join(_BY_NAME)}, but is {divergence!r}"
            )
        self._term = _BY_NAME[divergence](temperature, beta)
        self.chunk = count("chunked_distillation", "chunk", chunk)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        head: Head,
        reference_hidden_states: torch.Tensor,
        reference_head: Head,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Takes what both decoders returned last (batch_size, sequence_length, hidden_size), and both heads."""

        def compare(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            """Compares one chunk's logits with what the reference's head makes of its rows."""
            with torch.no_grad():
                reference = reference_head(theirs)
            _same_vocabulary(ours, reference)
            return self._term._compare_logits(ours, reference)

        where = targets(labels, hidden_states.shape[1])
        theirs = reference_hidden_states[:, :-1][where].detach()
        return chunked(hidden_states[:, :-1][where], head, compare, [theirs], size=self.chunk)


def _same_vocabulary(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if ours.shape[-1] != theirs.shape[-1]:
        raise ObjectiveError(
            f"the model's vocabulary has {ours.shape[-1]} tokens and the reference's {theirs.shape[-1]}; "
            "distributions over different vocabularies cannot be compared"
        )
