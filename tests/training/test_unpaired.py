"""TRL's loss of single answers among other terms: one gradient for any split, and TRL's own for one micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pico
import pytest
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.unpaired import ObjectiveKTOTrainer
from training import (
    TWO_STEPS,
    Step,
    arguments,
    assert_alike,
    assert_any_split,
    assert_resumes,
    awake,
    distance,
    everything,
    logged,
    pairs,
    take,
)

TOLERANCE = 5e-6


def answers() -> Dataset:
    """Eight answers of different lengths, five of them good."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 != 1} for n, row in enumerate(pairs())
    ]
    return Dataset.from_list(rows)


def prepared(
    model: Any,
    directory: Path,
    size: int,
    steps: int,
    terms: Any,
    *,
    kind: type = ObjectiveKTOTrainer,
    reference: Any = None,
    **more: Any,
) -> Any:
    settings = {"router_aux_loss_coef": 0.0, "activation_checkpointing": False, "beta": 0.5, **more}

    def made(batch: int) -> Any:
        return kind(
            model,
            reference,
            args=arguments(directory, batch, steps, kind=KTOConfig, **settings),
            train_dataset=answers(),
            processing_class=contract.tokenizer(),
            **({"objective": Objective(terms())} if terms else {}),
        )

    # TRL pairs answers with other prompts within a micro-batch when it reads the rows: all splits read the same here.
    trainer = made(8)
    trainer.args.per_device_train_batch_size = size
    trainer._train_batch_size = size
    return trainer


@pytest.mark.parametrize("loss", ["kto", pytest.param("apo_zero_unpaired", marks=pytest.mark.slow)])
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, loss: str) -> None:
    def split(size: int, steps: int) -> Step:
        return take(prepared(awake(trash_artifact), tmp_path, size, steps, everything, loss_type=loss))

    assert_any_split(split, ((8, 1), (2, 4), (3, 3)), TOLERANCE)


def test_the_loss_is_trls_own_in_one_micro_batch_and_not_in_several(trash_artifact: Path, tmp_path: Path) -> None:
    """TRL's estimate of the divergence is each micro-batch's own: in several it makes another loss."""

    def taken(size: int, steps: int, terms: Any, **more: Any) -> Step:
        other = pico.olmoe(seed=1)
        other.lm_head.weight.data.mul_(20)  # so sure of other answers that these are less likely to it
        return take(prepared(awake(trash_artifact), tmp_path, size, steps, terms, reference=other, **more))

    ours = taken(8, 1, lambda: [Term("model")], max_steps=3)
    theirs = taken(8, 1, None, kind=KTOTrainer, max_steps=3)
    assert_alike(theirs, ours, TOLERANCE)
    for one, other in zip(ours[1].state.log_history, theirs[1].state.log_history, strict=True):
        assert one.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
        assert one.get("kl", 0) == pytest.approx(other.get("kl", 0), rel=1e-4, abs=1e-6)
    ours, theirs = taken(3, 3, lambda: [Term("model")]), taken(3, 3, None, kind=KTOTrainer)
    whole = taken(8, 1, None, kind=KTOTrainer)
    assert logged(whole)["kl"] > 0
    assert logged(ours)["kl"] == pytest.approx(logged(whole)["kl"], rel=1e-4)
    assert distance(whole[0], ours[0]) < TOLERANCE < 0.01 < distance(whole[0], theirs[0])


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(trash_artifact: Path, tmp_path: Path) -> None:
    fresh = lambda directory: prepared(awake(trash_artifact), directory, 4, 2, everything, **TWO_STEPS)  # noqa: E731
    assert_resumes(fresh, tmp_path)


def test_what_depends_on_the_split_is_refused(trash_artifact: Path, tmp_path: Path) -> None:
    for given in (0.1, None):  # TRL takes the model's own then
        with pytest.raises(ObjectiveError, match=r"router_aux_loss_coef is .*: TRL adds the auxiliary loss of each"):
            prepared(awake(trash_artifact), tmp_path, 8, 1, lambda: [Term("model")], router_aux_loss_coef=given)
