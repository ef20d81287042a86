"""DPO against its formula in float64 and against TRL's own."""

from __future__ import annotations

import math

import pytest
import torch
from trl.trainer.utils import selective_log_softmax

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.losses.preference import sequence_log_probabilities
from solidify.objective.objective import Term

LABELS = torch.tensor(
    [[-100, 2, 3, 4, -100], [-100, -100, 1, 2, 3], [-100, 5, 6, -100, -100], [-100, -100, -100, 7, 1]]
)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(4, 5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    return ours, theirs


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.7, 0.2)])
def test_it_is_its_formula(beta: float, smoothing: float) -> None:
    ours, theirs = pair()

    def log_p(logits: torch.Tensor, row: int) -> float:
        return sum(
            float(logits[row, t].log_softmax(-1)[LABELS[row, t + 1]]) for t in range(4) if LABELS[row, t + 1] != -100
        )

    expected = 0.0
    for chosen, rejected in ((0, 2), (1, 3)):
        margin = beta * (
            (log_p(ours, chosen) - log_p(theirs, chosen)) - (log_p(ours, rejected) - log_p(theirs, rejected))
        )
        expected -= (1 - smoothing) * math.log(1 / (1 + math.exp(-margin))) / 2
        expected -= smoothing * math.log(1 / (1 + math.exp(margin))) / 2
    term = losses.dpo(beta=beta, smoothing=smoothing)
    assert term(ours, theirs, LABELS).item() == pytest.approx(expected, rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: term(x, theirs, LABELS), (ours.requires_grad_(),), fast_mode=True)
    (gradient,) = torch.autograd.grad(term(ours, theirs, LABELS), ours)
    assert gradient.abs().sum() > 0.01


def test_at_the_start_it_is_log_two_to_the_last_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours = pair()[0].to(dtype)
        found = losses.dpo()(ours, ours.clone(), LABELS)
        assert torch.equal(found, torch.tensor(2.0).log())


def test_sequences_are_summed_as_trl_sums_them() -> None:
    ours, _ = pair()
    labels = LABELS[:, 1:]
    each = selective_log_softmax(ours[:, :-1], labels.clamp(min=0)) * (labels != -100)
    assert torch.allclose(sequence_log_probabilities(ours, LABELS), each.sum(1), rtol=1e-12)


def test_minimising_it_prefers_the_chosen() -> None:
    ours, theirs = pair()
    term = losses.dpo()
    ours.requires_grad_()
    (gradient,) = torch.autograd.grad(term(ours, theirs, LABELS), ours)
    before, after = (sequence_log_probabilities(x, LABELS) for x in (ours, ours - 0.5 * gradient))
    assert (after[:2] > before[:2]).all()
    assert (after[2:] < before[2:]).all()


def test_rows_without_pairs_are_refused() -> None:
    ours, theirs = pair()
    with pytest.raises(ObjectiveError, match="it has 3 rows"):
        losses.dpo()(ours[:3], theirs[:3], LABELS[:3])
    with pytest.raises(ObjectiveError, match="beta must be above 0"):
        losses.dpo(beta=0.0)
    with pytest.raises(ObjectiveError, match="smoothing must be from 0"):
        losses.dpo(smoothing=0.5)
    assert Term(losses.dpo).reduction == "sequence_mean"
