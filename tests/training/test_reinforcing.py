"""TRL's policy optimisation among other terms: what is written is counted, and the loss is TRL's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contract
import pico
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.reinforcing import ObjectiveGRPOTrainer
from training import (
    DISTILLING,
    TWO_STEPS,
    Step,
    adding,
    arguments,
    assert_alike,
    assert_any_split,
    assert_resumes,
    awake,
    distance,
    take,
)

TOLERANCE = 5e-6


def even_tokens(completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """The share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def prepared(
    model: Any, directory: Path, size: int, steps: int, terms: Any, *, kind: type = ObjectiveGRPOTrainer, **more: Any
) -> Any:
    settings = {
        "activation_checkpointing": False,
        "shuffle_dataset": False,
        "max_completion_length": 6,
        "num_generations": 2,
        "router_aux_loss_coef": 0.0,
        **more,
    }
    prompts = [" ".join(f"w{t}" for t in row["input_ids"][:-4]) for row in pico.ragged(8)]
    return kind(
        model,
        even_tokens,
        args=arguments(directory, size, steps, kind=GRPOConfig, **settings),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=contract.tokenizer(),
        **({"objective": Objective(terms())} if terms else {}),
    )


def model_alone() -> list[Term]:
    return [Term("model")]


LOSSES = ["dapo", "grpo", "bnpo", "dr_grpo"]
FAST = ("dapo", "bnpo")


@pytest.mark.parametrize(
    "loss", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in LOSSES]
)
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, loss: str) -> None:
    """One seed writes the same answers for any split of the step."""

    def split(size: int, steps: int) -> Step:
        terms = DISTILLING["all together"]
        return take(prepared(awake(trash_artifact), tmp_path, size, steps, terms, loss_type=loss, beta=0.1))

    assert_any_split(split, ((8, 1), (2, 4)), TOLERANCE)


@pytest.mark.parametrize(
    "loss", [kind if kind == "dapo" else pytest.param(kind, marks=pytest.mark.slow) for kind in LOSSES]
)
def test_the_loss_is_trls_own(trash_artifact: Path, tmp_path: Path, loss: str) -> None:
    settings = {"loss_type": loss, "beta": 0.1, "max_steps": 3, "num_iterations": 2}
    ours = take(prepared(awake(trash_artifact), tmp_path, 8, 1, model_alone, **settings))
    theirs = take(prepared(awake(trash_artifact), tmp_path, 8, 1, None, kind=GRPOTrainer, **settings))
    assert_alike(theirs, ours, TOLERANCE)
    for one, other in zip(ours[1].state.log_history, theirs[1].state.log_history, strict=True):
        for key in ("loss", "reward", "kl", "entropy", "num_tokens"):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4, abs=1e-6), key
    assert ours[1].state.log_history[0]["reward_std"] > 0, "there was something to learn"


def test_a_step_may_read_part_of_what_was_written(trash_artifact: Path, tmp_path: Path) -> None:
    """Answers for two steps are written at once: each step's micro-batches are its own, as TRL's."""
    settings = {"steps_per_generation": 4, "max_steps": 2}
    ours = take(prepared(awake(trash_artifact), tmp_path, 2, 2, model_alone, **settings))
    theirs = take(prepared(awake(trash_artifact), tmp_path, 2, 2, None, kind=GRPOTrainer, **settings))
    assert_alike(theirs, ours, TOLERANCE)


@pytest.mark.slow
def test_a_script_multiplies_what_it_adds(trash_artifact: Path, tmp_path: Path) -> None:
    """What a script adds in `compute_loss` counts once a micro-batch; so the invariance above is not for nothing."""
    whole, _ = take(prepared(awake(trash_artifact), tmp_path, 8, 1, None, kind=adding(GRPOTrainer)))
    split, _ = take(prepared(awake(trash_artifact), tmp_path, 2, 4, None, kind=adding(GRPOTrainer)))
    assert distance(whole, split) > 1


@pytest.mark.slow
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(trash_artifact: Path, tmp_path: Path) -> None:
    def fresh(directory: Path) -> Any:
        torch.manual_seed(3)
        terms = DISTILLING["all together"]
        return prepared(awake(trash_artifact), directory, 4, 2, terms, beta=0.1, **TWO_STEPS)

    assert_resumes(fresh, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4])
def test_a_training_goes_on_in_a_later_epoch_with_the_prompts_of_that_epoch(
    trash_artifact: Path, tmp_path: Path, step: int
) -> None:
    """Two steps are an epoch, each in an order of its own: checkpoint 4 stands between two, checkpoint 3 within one."""

    def fresh(directory: Path) -> Any:
        torch.manual_seed(3)
        more = {"shuffle_dataset": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
        return prepared(awake(trash_artifact), directory, 4, 2, model_alone, **more)

    assert_resumes(fresh, tmp_path, step=step)


@pytest.mark.slow
def test_a_training_goes_on_where_answers_for_several_steps_begin(trash_artifact: Path, tmp_path: Path) -> None:
    """Answers to four prompts are written for two steps at once: the third begins new ones, in a new process too.

    Between two such steps they are written again, in another order; the next prompts are those of their own step.
    """

    def fresh(directory: Path) -> Any:
        torch.manual_seed(3)
        more = {"steps_per_generation": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 1}
        return prepared(awake(trash_artifact), directory, 2, 2, model_alone, **more)

    assert_resumes(fresh, tmp_path, step=2)
    trainer, prompts = fresh(tmp_path / "middle"), []
    inner = trainer.runner.complete

    def watch(model: Any, batches: Sequence[Any]) -> list[Any]:
        found: list[Any] = inner(model, batches)
        ids = {
            tuple(row[mask.bool()].tolist())
            for b in found
            for row, mask in zip(b["prompt_ids"], b["prompt_mask"], strict=True)
        }
        prompts.append(ids)
        return found

    trainer.runner.complete = watch
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    rows = trainer.train_dataset["prompt"]
    first, second = (
        {tuple(trainer.processing_class(text)["input_ids"]) for text in half} for half in (rows[:4], rows[4:])
    )
    assert len(prompts) == 2 and prompts[0] <= second and prompts[1] <= first


REFUSED = {
    "the entropy of each micro-batch": ({"entropy_coef": 0.1}, "entropy_coef and use_adaptive_entropy take a mean"),
    "the tokens of each micro-batch, sorted": ({"top_entropy_quantile": 0.5}, "sorts the tokens of each micro-batch"),
    "the auxiliary loss": ({"router_aux_loss_coef": 0.1}, "TRL adds the auxiliary loss of each micro-batch"),
    "the auxiliary loss of the configuration": ({"router_aux_loss_coef": None}, "TRL adds the auxiliary loss of each"),
    "too few prompts": ({"generation_batch_size": 64}, "64 answers are written at once, 2 to each of 32 prompts"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_depends_on_the_split_is_refused(trash_artifact: Path, tmp_path: Path, what: str) -> None:
    settings, words = REFUSED[what]
    with pytest.raises(ObjectiveError, match=words):
        prepared(awake(trash_artifact), tmp_path, 4, 2, model_alone, **settings)


def test_a_term_that_asks_for_outputs_is_refused(trash_artifact: Path, tmp_path: Path) -> None:
    def terms() -> list[Term]:
        return [Term("model"), Term(lambda outputs: outputs.logits.mean(), name="mine"), Term(losses.load_balance)]

    with pytest.raises(ObjectiveError, match="a term asks for outputs, which TRL's pass does not build"):
        prepared(awake(trash_artifact), tmp_path, 4, 2, terms)
