"""TRL's reward loss among other terms: one gradient for any split of the pairs, and TRL's own where it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contract
import pico
import pytest
import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.rewarding import ObjectiveRewardTrainer
from training import TWO_STEPS, Step, arguments, assert_alike, assert_any_split, assert_resumes, in_order, pairs, take

TOLERANCE = 5e-6


def judge_of_texts(**settings: Any) -> torch.nn.Module:
    """An MoE that scores texts, with an adapter whose values are not at their start."""
    model = pico.make(
        "MixtralForSequenceClassification",
        **{**pico.SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "num_local_experts": 4, "num_labels": 1},
        **settings,
    )
    adapted = solidify.attach(model, lora={"r": 4, "target_modules": ["**.q_proj"]}, train=["score"])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


def score_size(logits: torch.Tensor) -> torch.Tensor:
    """A user's term on scores, as a mean over sequences."""
    return logits.float().square().mean()


score_size.reduction = "sequence_mean"  # type: ignore[attr-defined]


def prepared(
    directory: Path, size: int, steps: int, terms: Any, *, kind: type = ObjectiveRewardTrainer, **more: Any
) -> Any:
    margins = [{**row, "margin": 0.1 * number} for number, row in enumerate(pairs())]
    trainer = kind(
        judge_of_texts(),
        args=arguments(directory, size, steps, kind=RewardConfig, activation_checkpointing=False, **more),
        train_dataset=Dataset.from_list(margins),
        processing_class=contract.tokenizer(),
        **({"objective": Objective(terms())} if terms else {}),
    )
    in_order(trainer)
    return trainer


def everything() -> list[Term]:
    return [
        Term("model", 0.7),
        Term(losses.load_balance, 0.1),
        Term(losses.router_z, 0.01),
        Term(losses.weight_penalty, 0.1),
        Term(score_size, 0.1),
    ]


def test_the_gradient_does_not_depend_on_the_split(tmp_path: Path) -> None:
    def split(size: int, steps: int) -> Step:
        return take(prepared(tmp_path, size, steps, everything, center_rewards_coefficient=0.1))

    assert_any_split(split, ((8, 1), (1, 8), (3, 3)), TOLERANCE)


def test_the_loss_is_trls_own(tmp_path: Path) -> None:
    settings = {"center_rewards_coefficient": 0.1, "max_steps": 3}
    ours = take(prepared(tmp_path, 4, 2, lambda: [Term("model")], **settings))
    theirs = take(prepared(tmp_path, 4, 2, None, kind=RewardTrainer, **settings))
    assert_alike(theirs, ours, TOLERANCE)
    logged = [[log["loss"] for log in taken[1].state.log_history if "loss" in log] for taken in (ours, theirs)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-6)
    assert ours[1].state.log_history[0]["accuracy"] == theirs[1].state.log_history[0]["accuracy"]
    found, expected = (taken[1].evaluate(taken[1].train_dataset)["eval_loss"] for taken in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes(lambda directory: prepared(directory, 4, 2, everything, **TWO_STEPS), tmp_path)


def test_a_term_on_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="the term entropy asks for labels, but a reward model predicts no tokens"):
        prepared(tmp_path, 4, 2, lambda: [Term("model"), Term(losses.output_entropy, name="entropy")])
