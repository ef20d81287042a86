from __future__ import annotations

from typing import Any

import pytest
import torch

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture
from solidify.objective.objective import Objective, Term
from solidify.objective.observation import Observation
from solidify.objective.window import Counts, Window, count


def constant(model: torch.nn.Module, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.ones(())


def of_tokens(logits: torch.Tensor) -> torch.Tensor:
    return logits.mean()


class Small:
    reduction = "token_sum"

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, labels: torch.Tensor) -> torch.Tensor:
        return self.scale * (labels != -100).sum().float()


WINDOW = Window(micro_batches=4, target_tokens=20, attended_tokens=40, sequences=8)
COUNTS = Counts(target_tokens=5, attended_tokens=10, sequences=2)


def shown(labels: Any = None, logits: Any = None) -> Observation:
    empty = {"inputs": {}, "attention_mask": None, "mask": None}
    return Observation(model=torch.nn.Identity(), labels=labels, make_logits=lambda: logits, **empty)


def part(term: Term, **fields: Any) -> Any:
    return term.part(shown(**fields), COUNTS, WINDOW, torch.tensor(3.0), term.weight.at(1, 1))


def test_what_a_term_asks_for_says_what_it_is() -> None:
    assert Term(constant).reduction == "constant"
    assert Term(of_tokens).reduction == "token_mean"
    assert Term(Small, arguments={"scale": 1.0}).reduction == "token_sum"
    assert Term(losses.trash_budget, arguments={"target": 0.5}).reduction == "statistic"
    assert Term(losses.trash_controller, arguments={"target": 0.5}).reduction == "none"
    assert Term(losses.weight_penalty).reduction == "constant"


def test_an_image_is_one_whatever_its_channels() -> None:
    counts = count({"pixel_values": torch.zeros(4, 3, 8, 8), "labels": torch.zeros(4)}, shifts=False)
    assert counts == Counts(target_tokens=4, attended_tokens=4, sequences=4)


def test_shares_are_those_of_the_kind() -> None:
    assert part(Term(constant, 2.0, arguments={"scale": 6.0})).loss == pytest.approx(2 * 6 / 4)
    assert part(Term(of_tokens), logits=torch.ones(2)).value == pytest.approx(5 / 20)
    assert part(Term(Small, arguments={"scale": 3.0}), labels=torch.ones(5)).value == pytest.approx(3 * 5 / 20)
    assert part(Term("model", 0.5)).loss == 1.5


def test_ranks_are_undone_by_the_mean_over_ranks() -> None:
    window = Window(4, 20, 40, 8, ranks=2)
    doubled = Term(of_tokens).part(shown(logits=torch.ones(2)), COUNTS, window, torch.zeros(()), 1.0)
    assert doubled.value == pytest.approx(2 * 5 / 20)
    once = Term(constant).part(shown(), COUNTS, window, torch.zeros(()), 1.0)
    assert once.value == pytest.approx(1 / 4)


def test_without_target_tokens_a_term_is_not_even_called() -> None:
    def explodes(logits: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")

    counts = Counts(0, 10, 2)
    assert Term(explodes).part(shown(), counts, WINDOW, torch.zeros(()), 1.0).value == 0.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Term("models"), "but is the string 'models'"),
        (lambda: Term(3), "is of type int, which cannot be called"),
        (lambda: Term(constant, arguments={"skale": 1}), "it has no parameter 'skale'"),
        (lambda: Term(Small), "cannot be built: .*missing 1 required positional argument: 'scale'"),
        (lambda: Term(lambda batch: batch), "its parameter 'batch' is neither in `arguments` nor"),
        (lambda: Term(losses.trash_budget, arguments={"target": 1.5}), "between 0 and 1, but is 1.5"),
        (lambda: Objective([]), "at least one term"),
        (lambda: Objective([Term(constant), Term(constant)]), "two terms are called 'constant'"),
        (
            lambda: Objective([Term(losses.trash_controller, arguments={"target": 0.5})]),
            "no term of the objective is a loss",
        ),
        (lambda: Capture(), "in exactly one way"),
        (lambda: Capture(modules="a", class_name="b"), "in exactly one way"),
    ],
)
def test_declarations_that_make_no_sense_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        make()


def test_unknown_reductions_and_results_that_are_no_scalar_are_refused() -> None:
    def odd(logits: torch.Tensor) -> torch.Tensor:
        return logits

    with pytest.raises(ObjectiveError, match=r"returned a tensor of shape \[2\], not a scalar"):
        part(Term(odd), logits=torch.ones(2))
    odd.reduction = "batchmean"  # type: ignore[attr-defined]
    with pytest.raises(ObjectiveError, match="declares the reduction 'batchmean'"):
        Term(odd)

    def number(model: torch.nn.Module) -> float:
        return 1.0

    with pytest.raises(ObjectiveError, match="returned float, not a tensor"):
        part(Term(number))
