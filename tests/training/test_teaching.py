"""TRL's distillation among other terms: answers written during training are counted, and nothing depends on the split.

Run by itself (under torchrun) it takes one step and writes the gradients.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pico
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

import training
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.teaching import GKDTrainer, ObjectiveGKDTrainer
from training import (
    DISTILLING,
    HIDDEN,
    TWO_STEPS,
    Gradients,
    Step,
    arguments,
    assert_alike,
    assert_any_split,
    assert_resumes,
    awake,
    distance,
    in_order,
    in_processes,
    student,
    take,
)

SPLITS = ((1, 8), (4, 2), (8, 1), (3, 3))  # the last with a smaller last micro-batch
TOLERANCE = 5e-6  # float32 sums in another order


def rows() -> Dataset:
    """Eight ragged rows: the first third of each is the prompt."""
    made = []
    for row in pico.ragged(8):
        ids = row["input_ids"]
        prompt = len(ids) // 3
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "prompt": prompt})
    return Dataset.from_list(made)


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As TRL's collator does: rows padded on the right, and their prompts, padded on the left."""
    prompts = [row["input_ids"][: row["prompt"]] for row in examples]
    width = max(map(len, prompts))
    return {
        **pico.collate([{key: row[key] for key in ("input_ids", "labels")} for row in examples]),
        "prompts": torch.tensor([[1] * (width - len(ids)) + ids for ids in prompts]),
        "prompt_attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def teacher() -> torch.nn.Module:
    """Another family, wider than the student."""
    return sharpened(pico.llama(hidden_size=64, intermediate_size=96, seed=7))


def sharpened(model: torch.nn.Module) -> torch.nn.Module:
    """Gives a model opinions."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def prepared(
    model: torch.nn.Module,
    directory: Path,
    size: int,
    steps: int,
    terms: Callable[[], list[Term]] | None,
    *,
    kind: type = ObjectiveGKDTrainer,
    groups: Any = (),
    group_by: Any = (),
    **more: Any,
) -> Any:
    from trl.experimental.gkd import GKDConfig

    settings = {"activation_checkpointing": False, "router_aux_loss_coef": 0.0, "lmbda": 0.0, "max_new_tokens": 6}
    trainer = kind(
        model=model,
        teacher_model=teacher(),
        args=arguments(directory, size, steps, kind=GKDConfig, **{**settings, **more}),
        train_dataset=rows(),
        data_collator=collate,
        processing_class=contract.tokenizer(),
        **({"objective": Objective(terms()), "parameter_groups": groups, "group_by": group_by} if terms else {}),
    )
    in_order(trainer)
    return trainer


def step(*args: Any, **more: Any) -> Step:
    """Takes one optimizer step over eight rows; returns gradients and the trainer."""
    return take(prepared(*args, **more))


FAST = ("all together",)


@pytest.mark.parametrize("terms", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in DISTILLING])
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, terms: str) -> None:
    def split(size: int, steps: int) -> Step:
        return step(awake(trash_artifact), tmp_path, size, steps, DISTILLING[terms])

    assert_any_split(split, SPLITS, TOLERANCE)


def test_the_loss_is_trls_own(trash_artifact: Path, tmp_path: Path) -> None:
    settings = {"temperature": 2.0, "beta": 0.1}  # TRL samples with the temperature, and does no more
    ours, trainer = step(awake(trash_artifact), tmp_path, 8, 1, DISTILLING["the divergence"], **settings)
    theirs, plain = step(awake(trash_artifact), tmp_path, 8, 1, None, kind=GKDTrainer, **settings)
    assert distance(theirs, ours) < TOLERANCE
    logged = plain.state.log_history[0]["loss"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(logged, rel=1e-6)
    assert trainer.evaluate(rows())["eval_loss"] == pytest.approx(plain.evaluate(rows())["eval_loss"], rel=1e-3)


def recorded(trainer: Any) -> list[tuple[torch.Tensor, ...]]:
    """Keeps what is written during training, as it was written."""
    kept: list[tuple[torch.Tensor, ...]] = []
    write = trainer.generate_on_policy_outputs

    def writing(*args: Any) -> Any:
        kept.append(write(*args))
        return kept[-1]

    trainer.generate_on_policy_outputs = writing
    return kept


def expected(model: torch.nn.Module, batches: Any, beta: float) -> tuple[torch.Tensor, float, int]:
    """Returns the divergence of arXiv 2306.13649 in float64: its mean over all target tokens, and their number."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    other = teacher()
    for ids, mask, labels in batches:
        where = labels[:, 1:] != -100
        q = torch.softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1][where].double(), -1)
        with torch.no_grad():
            given = other(input_ids=ids, attention_mask=mask).logits
        p = torch.softmax(given[:, :-1][where].double(), -1)
        m = beta * p + (1 - beta) * q
        total = total + (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum()
        count += int(where.sum())
    return total / count, float(total.detach()), count


@pytest.mark.parametrize(("size", "steps"), [pytest.param(2, 4, marks=pytest.mark.slow), (3, 3)])
def test_what_the_student_writes_is_counted(trash_artifact: Path, tmp_path: Path, size: int, steps: int) -> None:
    """Against float64, over what was really written in the step; TRL divides by the tokens that were replaced."""
    settings = {"lmbda": 1.0, "temperature": 1.3, "beta": 0.3}
    terms = lambda: [Term("model"), Term(losses.load_balance, 0.0)]  # noqa: E731 (with a pass over the window first)
    trainer = prepared(awake(trash_artifact), tmp_path, size, steps, terms, **settings)
    written, watch = recorded(trainer), Gradients(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    assert len(written) == steps
    model = awake(trash_artifact).train()
    loss, _, count = expected(model, written, 0.3)
    loss.backward()
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert distance(reference, watch.found) < 1e-5

    plain = prepared(awake(trash_artifact), tmp_path, size, steps, None, kind=GKDTrainer, **settings)
    written = recorded(plain)
    plain.train()
    _, total, count = expected(awake(trash_artifact).train(), written, 0.3)
    replaced = sum(label != -100 for row in rows() for label in row["labels"][1:])
    assert plain.state.log_history[0]["loss"] == pytest.approx(total / replaced, rel=1e-4)
    assert abs(count / replaced - 1) > 0.2


def test_the_teacher_writes_as_often_as_it_is_told(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = prepared(awake(trash_artifact), tmp_path, 2, 4, DISTILLING["the divergence"], lmbda=0.0, seq_kd=True)
    written = recorded(trainer)
    trainer.train()
    assert len(written) == 4
    loss, _, _ = expected(awake(trash_artifact).train(), written, 0.5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_some_batches_keep_their_answers(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = prepared(awake(trash_artifact), tmp_path, 1, 8, DISTILLING["all together"], lmbda=0.5)
    written = recorded(trainer)
    trainer.train()
    assert 0 < len(written) < 8


def test_a_resumed_training_writes_what_it_would_have_written(trash_artifact: Path, tmp_path: Path) -> None:
    def fresh(directory: Path) -> Any:
        more = {**TWO_STEPS, "learning_rate": 0.01, "lmbda": 0.6}
        return prepared(awake(trash_artifact), directory, 2, 2, DISTILLING["all together"], **more)

    assert_resumes(fresh, tmp_path)


# TRL 1.16 switches checkpointing off and on by transformers' old names.
def test_activation_checkpointing_changes_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    terms = DISTILLING["all together"]
    plain = step(awake(trash_artifact), tmp_path, 3, 3, terms, lmbda=0.5)
    saved = step(awake(trash_artifact), tmp_path, 3, 3, terms, lmbda=0.5, activation_checkpointing=True)
    assert_alike(plain, saved, TOLERANCE)


# One model teaches another of another size, with transformers' Trainer.


def larger() -> torch.nn.Module:
    return sharpened(pico.llama(num_hidden_layers=4, hidden_size=64, intermediate_size=96, seed=7))


def distilling(divergence: Any) -> Callable[[], list[Term]]:
    return lambda: [
        Term("model", 0.2),
        Term(divergence, 0.7, name="teacher", arguments={"temperature": 2.0}),
        Term(losses.hidden_match, 0.1, name="hidden", arguments=HIDDEN),
    ]


OTHERS = (losses.reverse_kl, losses.jensen_shannon)


@pytest.mark.parametrize("divergence", [losses.forward_kl, *(pytest.param(d, marks=pytest.mark.slow) for d in OTHERS)])
def test_a_larger_model_teaches_a_smaller_one(tmp_path: Path, divergence: Any) -> None:
    found = {}
    for size, steps in ((8, 1), (3, 3)):
        model = student()
        found[size], trainer = training.step(model, tmp_path, size, steps, distilling(divergence), reference=larger())
    assert distance(found[8], found[3]) < TOLERANCE
    assert float(found[8]["projection.weight"].abs().max()) > 0
    logs = trainer.state.log_history[0]
    assert {"term/model", "term/teacher", "term/hidden", "weighted/teacher", "weighted/hidden"} <= set(logs)
    assert logs["loss"] == pytest.approx(sum(v for k, v in logs.items() if k.startswith("weighted/")), rel=1e-6)
    if divergence is losses.forward_kl:
        batch = pico.collate(pico.ragged(8))
        with torch.no_grad():
            ours, theirs = (m(**batch).logits.double()[:, :-1] / 2 for m in (student(), larger()))
        q, p = (torch.log_softmax(logits, -1) for logits in (ours, theirs))
        each = 4 * (p.exp() * (p - q)).sum(-1)[batch["labels"][:, 1:] != -100]
        assert logs["term/teacher"] == pytest.approx(float(each.mean()), rel=1e-5)


def test_the_student_learns_from_the_teacher(tmp_path: Path) -> None:
    terms = lambda: distilling(losses.forward_kl)()[1:]  # noqa: E731 (nothing but the teacher)
    more = {"max_steps": 25, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    _, trainer = training.step(student(), tmp_path, 8, 1, terms, reference=larger(), **more)
    first, last = trainer.state.log_history[0], trainer.state.log_history[24]
    assert last["term/teacher"] < 0.5 * first["term/teacher"]
    assert last["term/hidden"] < 0.8 * first["term/hidden"]


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = pico.llama(vocab_size=160, hidden_size=64)
    for divergence in (losses.forward_kl, losses.chunked_distillation):
        with pytest.raises(ObjectiveError, match=r"vocabulary has 128 tokens and the reference's 160.*tokenizer"):
            training.step(student(), tmp_path, 8, 1, lambda d=divergence: [Term(d)], reference=other)
    hidden = lambda: [Term(losses.hidden_match, arguments=HIDDEN)]  # noqa: E731 (compares no vocabulary)
    _, trainer = training.step(student(), tmp_path, 8, 1, hidden, reference=other)
    assert trainer.history[0]["term/HiddenMatch"] > 0


@pytest.mark.slow
def test_the_other_trainers_do_not_load_what_is_experimental() -> None:
    script = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import solidify.training.trainer, solidify.training.preference
print("trl.experimental.gkd" in sys.modules)
import solidify.training.teaching
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(trash_artifact: Path, tmp_path: Path) -> None:
    """And TRL's trainer: it divides by the tokens of all ranks, and then averages over the ranks."""
    in_processes(__file__, trash_artifact, tmp_path)
    one, two, plain = (load_file(tmp_path / name) for name in ("ours-1", "ours-2", "plain-2"))
    assert float(two.pop("loss")) == pytest.approx(float(one.pop("loss")), rel=1e-6)
    assert distance(one, two) < TOLERANCE
    assert distance(load_file(tmp_path / "alone-1"), {n: 2 * g for n, g in plain.items()}) < TOLERANCE


def test_parameter_groups_are_for_this_trainer_too(trash_artifact: Path, tmp_path: Path) -> None:
    groups = [{"parameters": "**.mlp.trash", "learning_rate": 0.25}]
    trainer = prepared(awake(trash_artifact), tmp_path, 4, 2, DISTILLING["the divergence"], groups=groups)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate/**.mlp.trash"] == 0.25


def test_rows_are_grouped_where_they_say_how_long_they_are(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = prepared(awake(trash_artifact), tmp_path, 2, 2, DISTILLING["the divergence"], group_by=("length",))
    del trainer._get_train_sampler  # which reads the rows in their order
    assert trainer._get_train_sampler().lengths == [len(row["input_ids"]) for row in rows()]
    trainer.train()
    assert trainer.state.global_step == 1


def main() -> None:
    """Takes one step with either trainer; the first process writes the gradients."""
    artifact, directory, size, steps = sys.argv[1:5]
    run = (Path(directory), int(size), int(steps))
    found, trainer = step(awake(Path(artifact)), *run, DISTILLING["all together"])
    found["loss"] = torch.tensor(trainer.state.log_history[0]["loss"])
    alone, _ = step(awake(Path(artifact)), *run, DISTILLING["the divergence"])
    plain, _ = step(awake(Path(artifact)), *run, None, kind=GKDTrainer)
    if trainer.accelerator.is_main_process:
        for name, gradients in (("ours", found), ("alone", alone), ("plain", plain)):
            save_file(gradients, Path(directory) / f"{name}-{trainer.accelerator.num_processes}")


if __name__ == "__main__":
    main()
