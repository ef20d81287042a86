"""Runs of one step, runs without evaluation data, and heads that text cannot teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from transformers import TrainingArguments
from trl import SFTConfig

from solidify.builtin import tiny_olmoe
from solidify.errors import CheckFailed, DataError, RecipeError
from solidify.recipe import dry_run, schema, stages
from solidify.training import data, defaults
from training import arguments, in_order

WRAPPERS = Path(pico.__file__).parent / "user_modules" / "wrappers.py"


def written(directory: Path, base: Path | str, target: str, expect: str, **changes: Any) -> schema.Recipe:
    """Writes a recipe whose modules are wrapped by one with a scale."""
    document = {
        "base": {"model": str(base)},
        "surgery": [{"replace": target, "expect": expect, "with": f"{WRAPPERS}:Scaled"}],
        "adapter": {"lora": {"r": 2, "target_modules": [f"{target}.original"]}, "train": [f"{target}.scale"]},
        "data": {"train": "lines.jsonl", "max_length": 32},
        "training": {"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8},
        **changes,
    }
    lines = [json.dumps({"text": f"The value of {n} is {n * n} and no other"}) for n in range(40)]
    (directory / "lines.jsonl").write_text("\n".join(lines))
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return schema.load(path)


def verdicts(report: Any, verdict: str) -> set[str]:
    return {finding.name for finding in report.findings if finding.verdict == verdict}


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.1), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_a_short_run_without_evaluation_data_is_no_failure(tmp_path: Path, steps: int, warmup: float) -> None:
    training = {"max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "warmup_steps": warmup}
    o_proj = "model.layers.*.self_attn.o_proj"
    report = stages.run(written(tmp_path, tiny_olmoe.NAME, o_proj, "Linear", training=training), tmp_path / "out")
    assert report.passed and not report.failed
    found = {finding.name: finding for finding in report.findings}
    assert "over " + ("1 log " if steps == 1 else "2 logs ") in found["loss parts sum to the total"].evidence
    assert found["gradient does not depend on accumulation"].verdict == "proved"
    assert not verdicts(report, "not looked at")
    assert "heldout_loss_trained" not in report.measured


def test_the_last_step_is_logged_whatever_the_interval(trash_artifact: Path, tmp_path: Path) -> None:
    from solidify.objective.objective import Objective, Term
    from solidify.training.trainer import ObjectiveTrainer
    from training import awake

    for steps, interval, strategy, logged in ((3, 500, "steps", 1), (5, 2, "steps", 3), (2, 1, "no", 0)):
        trainer = ObjectiveTrainer(
            model=awake(trash_artifact),
            args=arguments(tmp_path, 2, 1, max_steps=steps, logging_steps=interval, logging_strategy=strategy),
            train_dataset=pico.ragged(8),
            data_collator=pico.collate,
            objective=Objective([Term("model")]),
        )
        in_order(trainer)
        trainer.train()
        assert len(trainer.history) == logged


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"logging_steps": 0.01}),
        ({"logging_steps": 7}, {"logging_steps": 7}),
        ({"logging_strategy": "epoch"}, {"logging_strategy": "epoch"}),
        ({"eval_strategy": "steps"}, {"eval_strategy": "steps", "logging_steps": 0.01, "eval_steps": 0.1}),
        ({"max_steps": 1, "warmup_steps": 0.1}, {"max_steps": 1, "warmup_steps": 0, "logging_steps": 0.01}),
        ({"max_steps": 10, "warmup_steps": 0.1}, {"max_steps": 10, "warmup_steps": 0.1, "logging_steps": 0.01}),
    ],
)
def test_defaults_follow_the_length(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert defaults.following(given) == expected


@pytest.mark.parametrize("training", [{"eval_strategy": "steps"}, {"eval_on_start": True}])
def test_evaluating_on_nothing_is_refused_before_the_build(tmp_path: Path, training: dict[str, Any]) -> None:
    o_proj = "model.layers.*.self_attn.o_proj"
    loaded = written(tmp_path, tiny_olmoe.NAME, o_proj, "Linear", training={"max_steps": 1, **training})
    with pytest.raises(RecipeError, match=r"needs data to evaluate on; give `data.eval`"):
        dry_run.plan(loaded)


SMALL = {**pico.SIZES, "intermediate_size": 48}
BERT = ("bert.encoder.layer.*.intermediate.dense", "Linear")
HEADS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "BertForSequenceClassification": (SMALL, BERT),
    "BertForTokenClassification": (SMALL, BERT),
    "LlamaForSequenceClassification": ({**SMALL, "num_key_value_heads": 2}, ("model.layers.*.mlp.up_proj", "Linear")),
    "T5ForConditionalGeneration": (
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        ("**.layer.*.SelfAttention.o", "Linear"),
    ),
    "BertModel": (SMALL, ("encoder.layer.*.intermediate.dense", "Linear")),
    "ViTForImageClassification": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "image_size": 16,
        },
        ("**.fc1", "Linear"),
    ),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_text_cannot_teach_is_refused_by_name_and_still_built(head: str, tmp_path: Path) -> None:
    settings, (target, expect) = HEADS[head]
    pico.make(head, **settings).save_pretrained(tmp_path / "base")
    words = f"{head} has a head that no format here teaches" if head == "BertModel" else f"but {head} learns from"
    with pytest.raises(RecipeError, match=words):
        dry_run.plan(written(tmp_path, tmp_path / "base", target, expect))
    alone = written(tmp_path, tmp_path / "base", target, expect).model_copy(
        update={"adapter": None, "data": None, "training": {}}
    )
    assert dry_run.plan(alone).edits


def test_heads_that_text_teaches_pass() -> None:
    for model in (
        pico.llama(),
        pico.olmoe(),
        pico.make("GPT2LMHeadModel", vocab_size=128, n_embd=32, n_layer=1, n_head=4),
    ):
        data.refuse_untaught(model)
    with pytest.raises(DataError, match="Linear is neither"):
        data.refuse_untaught(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("rate", [0, 0.0, -1e-4, float("nan")])
def test_a_learning_rate_that_teaches_nothing_is_refused_in_the_plan(tmp_path: Path, rate: float) -> None:
    training = {"max_steps": 1, "learning_rate": rate}
    asked = written(tmp_path, tiny_olmoe.NAME, "model.layers.*.self_attn.o_proj", "Linear", training=training)
    with pytest.raises(RecipeError, match="so nothing would be learnt; give it a number above 0"):
        dry_run.plan(asked)


def test_a_part_may_learn_where_the_rest_stands_still() -> None:
    assert not defaults.faults({"learning_rate": 0}, held_out=True, moved=True)
    assert defaults.faults({"learning_rate": -1}, held_out=True, moved=True)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"learning_rate": "abc"}, "training.learning_rate is 'abc', and not a number"),
        ({"learning_rate": "0.001x"}, "training.learning_rate is '0.001x', and not a number"),
        ({"max_steps": "two"}, "training.max_steps is 'two', and not a whole number"),
        ({"max_steps": 1.5}, "training.max_steps is 1.5, and not a whole number"),
        ({"max_steps": True}, "training.max_steps is True, and not a whole number"),
        ({"max_steps": 0}, "training.max_steps is 0; give it a number above 0"),
        ({"max_steps": -7}, "training.max_steps is -7; give it a number above 0"),
        ({"num_train_epochs": 0}, "training.num_train_epochs is 0; give it a number above 0"),
        ({"per_device_train_batch_size": 0}, "training.per_device_train_batch_size is 0; give it at least 1"),
        ({"gradient_accumulation_steps": -1}, "training.gradient_accumulation_steps is -1; give it at least 1"),
        ({"weight_decay": float("nan")}, "training.weight_decay is nan; give it at least 0"),
        ({"packing": "perhaps"}, "training.packing is 'perhaps', and not true or false"),
    ],
    ids=str,
)
def test_a_training_that_cannot_be_is_refused_in_the_plan(tmp_path: Path, training: dict[str, Any], words: str) -> None:
    settings = {"per_device_train_batch_size": 8, **training}
    asked = written(tmp_path, tiny_olmoe.NAME, "model.layers.*.self_attn.o_proj", "Linear", training=settings)
    with pytest.raises(RecipeError) as caught:
        dry_run.plan(asked)
    assert words in str(caught.value)


def test_the_numbers_of_an_honest_training_are_taken() -> None:
    kinds = (TrainingArguments, SFTConfig)
    honest = {
        "learning_rate": 1e-3,
        "max_steps": 5,
        "num_train_epochs": 0.5,
        "logging_steps": 0.1,
        "warmup_steps": 0.1,
        "eval_steps": None,
        "bf16": True,
        "optim": "adamw_torch",
        "lr_scheduler_kwargs": {"min_lr": 0.0},
        "report_to": "none",
        "fsdp": "",
        "max_length": None,
        "save_total_limit": 1,
    }
    assert defaults.of_another_kind(honest, kinds) == []
    values = TrainingArguments(output_dir="x", use_cpu=True).to_dict()  # transformers' own
    assert defaults.of_another_kind({k: v for k, v in values.items() if k != "num_train_epochs"}, kinds) == []


@pytest.mark.slow
def test_what_failed_before_is_why_a_later_stage_cannot_go_on(tmp_path: Path) -> None:
    """An adapter that learnt nothing fails two checks, and then cannot be merged: a failed check, not a wrong input."""
    training = {"max_steps": 1, "learning_rate": 1e-44, "per_device_train_batch_size": 8}
    asked = written(tmp_path, tiny_olmoe.NAME, "model.layers.*.self_attn.o_proj", "Linear", training=training)
    with pytest.raises(CheckFailed, match=r"a check failed:[\s\S]*adapter has an effect[\s\S]*and then: "):
        stages.run(asked, tmp_path / "out")
