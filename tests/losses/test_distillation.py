"""Divergences against their formulas in float64, their limits, and the implementation of TRL."""

from __future__ import annotations

import math

import pytest
import torch

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Term

WORDS = 13
LABELS = torch.tensor([[1, 2, 3, -100, 5, 6], [-100, -100, 3, 4, 5, -100]])
TARGETS = [(r, t) for r in range(2) for t in range(5) if LABELS[r, t + 1] != -100]


def pair(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (2 * torch.randn(2, 6, WORDS, generator=generator, dtype=torch.float64) for _ in range(2))
    return ours.to(dtype), theirs.to(dtype)


def kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def expected(formula: object, temperature: float) -> float:
    """Adds up a divergence of lists of probabilities (reference, model) over target tokens."""
    ours, theirs = pair()
    total = 0.0
    for row, place in TARGETS:
        p = (theirs[row, place] / temperature).softmax(-1).tolist()
        q = (ours[row, place] / temperature).softmax(-1).tolist()
        total += temperature**2 * formula(p, q)  # type: ignore[operator]
    return total


def mixed(beta: float, p: list[float], q: list[float]) -> list[float]:
    return [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]


FORMULAS = {
    "forward_kl": (dict, kl),
    "reverse_kl": (dict, lambda p, q: kl(q, p)),
    "jensen_shannon": (
        lambda: {"beta": 0.3},
        lambda p, q: 0.3 * kl(p, mixed(0.3, p, q)) + 0.7 * kl(q, mixed(0.3, p, q)),
    ),
    "jensen_shannon_continuous": (
        lambda: {"beta": 0.3},
        lambda p, q: 0.7 * kl(p, mixed(0.3, p, q)) + 0.3 * kl(q, mixed(0.3, p, q)),
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_its_formula(name: str, temperature: float) -> None:
    arguments, formula = FORMULAS[name]
    term = getattr(losses, name)(temperature=temperature, **arguments())
    ours, theirs = pair()
    assert term(ours, theirs, LABELS).item() == pytest.approx(expected(formula, temperature), rel=1e-10)
    assert term(ours.float(), theirs.float(), LABELS).item() == pytest.approx(expected(formula, temperature), rel=1e-5)
    assert abs(term(theirs, theirs, LABELS).item()) < 1e-12
    assert Term(getattr(losses, name)).reduction == "token_sum"


@pytest.mark.parametrize("name", FORMULAS)
def test_its_gradient_is_that_of_finite_differences_and_goes_to_the_model_alone(name: str) -> None:
    arguments, _ = FORMULAS[name]
    term = getattr(losses, name)(temperature=1.5, **arguments())
    ours, theirs = pair()
    ours.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: term(x, theirs, LABELS), (ours,), fast_mode=True)
    gradient = torch.autograd.grad(term(ours, theirs, LABELS), ours)[0]
    assert gradient.abs().sum() > 0.1
    hidden = torch.ones(2, 6, dtype=torch.bool)
    for row, place in TARGETS:
        hidden[row, place] = False
    assert not gradient[hidden].any()  # what predicts nothing gets no gradient


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_the_papers_form_is_trls(beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL's own switch for its notice on import
    from trl.experimental.gkd import GKDTrainer

    ours, theirs = pair()
    shifted = LABELS[:, 1:]
    theirs_own = GKDTrainer.generalized_jsd_loss(
        ours[:, :-1], theirs[:, :-1], labels=shifted, beta=beta, temperature=1.3, reduction="sum"
    )
    term = losses.jensen_shannon(beta=beta, temperature=1.3)
    assert term(ours, theirs, LABELS).item() == pytest.approx(1.3**2 * theirs_own.item(), rel=1e-10)


def test_the_papers_form_jumps_at_its_ends_and_the_swapped_one_does_not() -> None:
    ours, theirs = pair()
    for end, inside, limit in ((0.0, 1e-6, losses.forward_kl()), (1.0, 1 - 1e-6, losses.reverse_kl())):
        reached = limit(ours, theirs, LABELS).item()
        assert reached > 1
        for name in ("jensen_shannon", "jensen_shannon_continuous"):
            assert getattr(losses, name)(beta=end)(ours, theirs, LABELS).item() == pytest.approx(reached, rel=1e-9)
        assert losses.jensen_shannon(beta=inside)(ours, theirs, LABELS).item() < 1e-3 * reached
        near = losses.jensen_shannon_continuous(beta=inside)(ours, theirs, LABELS).item()
        assert near == pytest.approx(reached, rel=1e-2)
    half = [t(beta=0.5)(ours, theirs, LABELS) for t in (losses.jensen_shannon, losses.jensen_shannon_continuous)]
    assert half[0].item() == pytest.approx(half[1].item(), rel=1e-12)
    assert half[0].item() <= len(TARGETS) * math.log(2)


def test_half_precision_is_compared_in_float32() -> None:
    ours, theirs = pair(dtype=torch.bfloat16)
    exact = losses.forward_kl()(ours.double(), theirs.double(), LABELS)
    assert losses.forward_kl()(ours, theirs, LABELS).item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: losses.forward_kl(temperature=0.0), "temperature must be above 0"),
        (lambda: losses.jensen_shannon(beta=1.2), "beta must be from 0 to 1"),
        (lambda: losses.forward_kl()(*pair(), LABELS[:, :-1]), "one for one"),
        (lambda: losses.forward_kl()(pair()[0], pair()[1][..., :-1], LABELS), "different vocabularies"),
    ],
)
def test_what_cannot_be_compared_is_refused(make: object, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        make()  # type: ignore[operator]


def test_the_entropy_is_its_formula_and_its_sign_makes_outputs_more_diverse() -> None:
    logits, _ = pair()
    total = 0.0
    for row, place in TARGETS:
        p = logits[row, place].softmax(-1).tolist()
        total -= sum(-x * math.log(x) for x in p)
    term = losses.output_entropy()
    logits.requires_grad_()
    assert term(logits, LABELS).item() == pytest.approx(total, rel=1e-10)
    assert torch.autograd.gradcheck(lambda x: term(x, LABELS), (logits,), fast_mode=True)
    (gradient,) = torch.autograd.grad(term(logits, LABELS), logits)
    assert term(logits - 0.1 * gradient, LABELS) < term(logits, LABELS)
    where = LABELS[:, 1:] != -100
    more, less = ((logits - step * gradient)[:, :-1][where].softmax(-1) for step in (0.1, 0.0))
    assert torch.special.entr(more).sum() > torch.special.entr(less).sum()
