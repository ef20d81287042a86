"""Weights that move: with the step, or so that something measured stays at a target; a checkpoint keeps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective
from solidify.objective.term import Term
from solidify.objective.weights import Constant, Constraint, Schedule, make
from training import awake, step


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (Schedule(0.0, 1.0), [0, 1 / 3, 2 / 3, 1]),
        (Schedule(1.0, 0.0, shape="cosine"), [1, 0.75, 0.25, 0]),
        (Schedule(1.0, 8.0, shape="exponential"), [1, 2, 4, 8]),
        (Schedule(0.0, 1.0, begin=1, length=2), [0, 0, 1, 1]),
        (Schedule(0.0, 1.0, begin=0.25, length=0.5), [0, 0, 1, 1]),
        (Schedule(2.0, 3.0, length=1), [2, 3, 3, 3]),
        (Constant(0.3), [0.3] * 4),
    ],
)
def test_schedules(weight: Any, expected: list[float]) -> None:
    assert [weight.at(n, 4) for n in range(1, 5)] == pytest.approx(expected)


def test_a_multiplier_grows_while_its_bound_is_broken_and_never_turns() -> None:
    weight = Constraint(0.5, rate=0.1)
    seen = []
    for measured in (0.9, 0.9, 0.1, 0.1, 0.1):
        weight.observe(measured)
        seen.append(weight.at(1, 1))
    assert seen == pytest.approx([0.04, 0.08, 0.04, 0.0, 0.0])
    raised = Constraint(0.5, "at_least", rate=0.1)
    raised.observe(0.1)
    assert raised.at(1, 1) == pytest.approx(-0.04)  # minimising then raises the term
    equal = Constraint(0.5, "equal", rate=0.1)
    equal.observe(0.1)
    assert equal.at(1, 1) == pytest.approx(-0.04)
    followed = Constraint(0.9, "at_least", factor=1.2, start=1e-3, measure="zeros")
    followed.observe(0.2)  # too few zeros: the L1 term that makes them gets a larger weight
    assert followed.at(1, 1) == pytest.approx(1.2e-3)
    followed.observe(0.95)
    assert followed.at(1, 1) == pytest.approx(1e-3)
    bounded = Constraint(0.0, rate=100.0, largest=2.0)
    bounded.observe(1.0)
    assert bounded.at(1, 1) == 2.0
    damped = Constraint(0.5, rate=0.1, damping=1.0)
    damped.observe(0.9)
    assert damped.at(1, 1) == pytest.approx(0.04 + 0.4)
    smooth = Constraint(0.0, rate=1.0, momentum=0.5)
    smooth.observe(1.0)
    smooth.observe(0.0)
    assert smooth.at(1, 1) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Schedule(0, 1, shape="stairs"), "`shape` must be one of linear, cosine, exponential, but is 'stairs'"),
        (lambda: Schedule(0, 1, shape="exponential"), "needs a positive start and end"),
        (lambda: Schedule(0, 1, begin=-1), "must not be negative"),
        (lambda: Schedule(0, 1).at(1, 0), "the number of steps is unknown"),
        (lambda: Constraint(1, "under"), "`bound` must be one of"),
        (lambda: Constraint(1, factor=0.5, start=1), "a `factor` must be above 1"),
        (lambda: Constraint(1, factor=2), "needs a `start` above 0"),
        (lambda: Constraint(1, "equal", factor=2, start=1), "`equal` needs a `rate`"),
        (lambda: Constraint(1, momentum=1), "`momentum` must be"),
        (lambda: make({"schedule": {"start": 0, "stop": 1}}), "the weight's schedule does not fit: .*'stop'"),
        (lambda: make({"shedule": {}}), "a weight must be a number, {schedule: ...} or {constraint: ...}"),
        (lambda: make(math.nan), "must be finite"),
        (lambda: make("heavy"), "but is of type str"),
        (
            lambda: Objective([Term("model"), Term(losses.weight_penalty, Constraint(1, measure="modle"))]),
            "follows 'modle', which is not a loss term",
        ),
    ],
)
def test_weights_that_cannot_be_are_refused(build: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        build()


def test_the_trainer_moves_a_scheduled_weight_and_logs_it(trash_artifact: Path, tmp_path: Path) -> None:
    terms = lambda: [Term("model"), Term(losses.weight_penalty, {"schedule": {"start": 1.0, "end": 0.0}})]  # noqa: E731
    _, trainer = step(awake(trash_artifact), tmp_path, 4, 1, terms, max_steps=3)
    assert [logs["weight/WeightPenalty"] for logs in trainer.history] == pytest.approx([1, 0.5, 0])
    for logs in trainer.history:
        weighted = logs["weight/WeightPenalty"] * logs["term/WeightPenalty"]
        assert logs["weighted/WeightPenalty"] == pytest.approx(weighted, abs=1e-9)
        assert logs["loss"] == pytest.approx(logs["weighted/model"] + weighted, rel=1e-6)


def held(artifact: Path, steps: int, *, stop: int = 0) -> tuple[list[float], Any, Any, Any]:
    model = awake(artifact)
    weight = Constraint(0.4, "equal", rate=0.1, damping=5.0)
    engine = ObjectiveEngine(
        Objective([Term("model"), Term(losses.kept_share, weight, name="kept")]), model, steps=steps
    )
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    batch, seen = pico.collate(pico.ragged(8)), []
    for _ in range(stop or steps):
        engine.begin([batch])
        engine.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(engine.end()["term/kept"])
    return seen, engine, model, optimizer


def test_a_constraint_holds_the_kept_share_at_its_target(trash_artifact: Path) -> None:
    seen, _, _, _ = held(trash_artifact, 120)
    assert abs(seen[0] - 0.4) > 0.1
    assert sum(seen[-20:]) / 20 == pytest.approx(0.4, abs=0.02)


def test_a_multiplier_comes_back_from_a_checkpoint(trash_artifact: Path, tmp_path: Path) -> None:
    _, first, _, _ = held(trash_artifact, 10)
    torch.save(first.state_dict(), tmp_path / "engine.pt")
    second = ObjectiveEngine(
        Objective(
            [Term("model"), Term(losses.kept_share, Constraint(0.4, "equal", rate=0.1, damping=5.0), name="kept")]
        ),
        awake(trash_artifact),
        steps=10,
    )
    second.load_state_dict(torch.load(tmp_path / "engine.pt", weights_only=True))
    ours, theirs = (engine.objective.terms[1].weight for engine in (first, second))
    assert vars(ours) == vars(theirs)
    assert ours.multiplier != 0 and second.step == 10
