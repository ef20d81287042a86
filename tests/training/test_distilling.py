"""TRL's stable distillation among other terms: what the student writes is counted, and nothing depends on the split.

TRL has a whole step answered at once, so that the same seed writes the same answers for any split of the step. Run by
itself (under torchrun) it takes one step and writes the gradients.
"""

from __future__ import annotations

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
from trl import DistillationConfig, DistillationTrainer

import solidify
from solidify import losses
from solidify.errors import DataError, ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.distilling import ObjectiveDistillationTrainer
from training import (
    DISTILLING,
    HIDDEN,
    TWO_STEPS,
    Step,
    adding,
    arguments,
    assert_alike,
    assert_any_split,
    assert_resumes,
    awake,
    distance,
    in_processes,
    student,
    take,
)

SPLITS = ((8, 1), (4, 2), (1, 8))
TOLERANCE = 5e-6  # float32 sums in another order


def teacher() -> torch.nn.Module:
    """Another family, wider than the student, with opinions."""
    return pico.llama(hidden_size=64, intermediate_size=96, initializer_range=0.3, seed=7)


def prepared(
    model: torch.nn.Module,
    directory: Path,
    size: int,
    steps: int,
    terms: Callable[[], list[Term]] | None,
    *,
    kind: type = ObjectiveDistillationTrainer,
    reference: Any = None,
    groups: Any = (),
    group_by: Any = (),
    **more: Any,
) -> Any:
    settings = {"activation_checkpointing": False, "shuffle_dataset": False, "max_completion_length": 6, "beta": 0.5}
    own = {"parameter_groups": groups, "group_by": group_by}
    prompts = [" ".join(f"w{t}" for t in row["input_ids"][:-4]) for row in pico.ragged(8)]
    return kind(
        model=model,
        teacher_model=teacher(),
        args=arguments(directory, size, steps, kind=DistillationConfig, **{**settings, **more}),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=contract.tokenizer(),
        **({"objective": Objective(terms(), reference=reference), **own} if terms else {}),
    )


def written(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Returns the micro-batches of the last step."""
    return list(trainer._buffered_inputs)


def step(*args: Any, **more: Any) -> Step:
    """Takes one optimizer step over eight prompts; returns gradients and the trainer."""
    return take(prepared(*args, **more))


FAST = ("no divergence", "all together")


@pytest.mark.parametrize("terms", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in DISTILLING])
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, terms: str) -> None:
    def split(size: int, steps: int) -> Step:
        taken = step(awake(trash_artifact), tmp_path, size, steps, DISTILLING[terms])
        assert len(written(taken[1])) == steps
        return taken

    assert_any_split(split, SPLITS, TOLERANCE)


def test_a_term_of_each_micro_batch_would_depend_on_it(trash_artifact: Path, tmp_path: Path) -> None:
    """What a script's `compute_loss` adds; so the invariance above is not that of terms that are linear anyway."""
    whole, _ = step(awake(trash_artifact), tmp_path, 8, 1, None, kind=adding(DistillationTrainer))
    split, _ = step(awake(trash_artifact), tmp_path, 1, 8, None, kind=adding(DistillationTrainer))
    assert distance(whole, split) > 1


def test_the_loss_is_trls_own(trash_artifact: Path, tmp_path: Path) -> None:
    settings = {"temperature": 1.5, "beta": 0.1}
    ours, trainer = step(awake(trash_artifact), tmp_path, 2, 4, DISTILLING["the divergence"], **settings)
    theirs, plain = step(awake(trash_artifact), tmp_path, 2, 4, None, kind=DistillationTrainer, **settings)
    assert distance(theirs, ours) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-6)
    assert trainer.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0
    torch.manual_seed(5)
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    torch.manual_seed(5)
    assert found == pytest.approx(plain.evaluate(plain.train_dataset)["eval_loss"], rel=1e-3)


def test_what_the_student_writes_is_counted(trash_artifact: Path, tmp_path: Path) -> None:
    """Against the divergence of arXiv 2306.13649 in float64, over what was really written in the step."""
    terms = lambda: [Term("model"), Term(losses.load_balance, 0.0)]  # noqa: E731 (with a pass over the window first)
    found, trainer = step(awake(trash_artifact), tmp_path, 2, 4, terms, beta=0.3)
    total, count, model, other = torch.zeros((), dtype=torch.float64), 0, awake(trash_artifact).train(), teacher()
    for batch in written(trainer):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        given = {"input_ids": ids, "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)}
        where = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], 1)[:, 1:].bool()
        q = model(**given).logits[:, :-1][where].double().softmax(-1)
        with torch.no_grad():
            p = other(**given).logits[:, :-1][where].double().softmax(-1)
        m = 0.3 * p + 0.7 * q
        total = total + (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum()
        count += int(where.sum())
    loss = total / count
    loss.backward()
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert distance(reference, found) < 1e-5


@pytest.mark.slow
def test_a_term_reads_the_teacher_as_its_reference(trash_artifact: Path, tmp_path: Path) -> None:
    """The forward divergence from it is TRL's at `beta` 0, whether the hidden states are projected by TRL or by us."""
    theirs, _ = step(awake(trash_artifact), tmp_path, 2, 4, DISTILLING["the divergence"], beta=0.0)
    for term in (losses.forward_kl, losses.chunked_distillation):
        alone = lambda t=term: [Term(t)]  # noqa: E731
        ours, _ = step(awake(trash_artifact), tmp_path, 2, 4, alone, reference=teacher())
        assert distance(theirs, ours) < 1e-5


@pytest.mark.slow
def test_a_resumed_training_writes_what_it_would_have_written(trash_artifact: Path, tmp_path: Path) -> None:
    def fresh(directory: Path) -> Any:
        more = {**TWO_STEPS, "learning_rate": 0.01}
        return prepared(awake(trash_artifact), directory, 2, 2, DISTILLING["all together"], **more)

    assert_resumes(fresh, tmp_path)


@pytest.mark.slow
def test_a_training_goes_on_in_a_later_epoch_with_the_prompts_of_that_epoch(
    trash_artifact: Path, tmp_path: Path
) -> None:
    """Two steps are an epoch, each in an order of its own."""

    def fresh(directory: Path) -> Any:
        more = {"shuffle_dataset": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}
        return prepared(awake(trash_artifact), directory, 2, 2, DISTILLING["the divergence"], **more)

    assert_resumes(fresh, tmp_path, step=3)


def test_activation_checkpointing_changes_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    terms = DISTILLING["all together"]
    plain = step(awake(trash_artifact), tmp_path, 2, 4, terms)
    saved = step(awake(trash_artifact), tmp_path, 2, 4, terms, activation_checkpointing=True)
    assert_alike(plain, saved, TOLERANCE)


def test_a_student_with_an_added_head_learns_from_what_it_reads(tmp_path: Path) -> None:
    """Without PEFT, TRL's loss runs inside the model's call, whose outputs the added head adds to."""
    terms = lambda: [Term("model"), Term(losses.hidden_match, 0.1, arguments=HIDDEN)]  # noqa: E731
    whole, _ = step(student(), tmp_path, 8, 1, terms, reference=teacher())
    split, _ = step(student(), tmp_path, 2, 4, terms, reference=teacher())
    assert distance(whole, split) < TOLERANCE
    assert float(whole["projection.weight"].abs().max()) > 0
    with pytest.raises(ValueError, match="too many values to unpack"):  # so it is in TRL
        step(student(), tmp_path, 2, 4, None, kind=DistillationTrainer)


class Louder(torch.nn.Linear):
    """A head that does more than its weight says."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(rows)


def test_a_head_of_which_trl_would_read_the_weight_alone_is_refused(tmp_path: Path) -> None:
    model = pico.llama(tie_word_embeddings=False)
    model.lm_head = Louder(32, 128, bias=False)
    with pytest.raises(ObjectiveError, match=r"the model's head is Louder, .*the term chunked_distillation"):
        prepared(model, tmp_path, 4, 2, DISTILLING["the divergence"])
    with pytest.raises(ObjectiveError, match=r"a term asks for outputs, .*ask for logits"):
        seen = lambda outputs: outputs.logits.mean()  # noqa: E731
        prepared(pico.llama(), tmp_path, 4, 2, lambda: [Term("model"), Term(seen, name="seen")])
    alone = lambda: [Term(losses.chunked_distillation)]  # noqa: E731 (which runs the head as it is)
    _, trainer = step(model, tmp_path, 4, 2, alone, reference=teacher())
    assert trainer.history[0]["loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["lm_head", "lm_head.weight"])
def test_a_head_that_is_trained_in_full_is_the_one_that_learns(tmp_path: Path, what: str) -> None:
    def attached() -> Any:
        torch.manual_seed(1)
        model = solidify.attach(pico.llama(tie_word_embeddings=False), train=[what])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(2)
        return model

    theirs, _ = step(attached(), tmp_path, 4, 2, DISTILLING["the divergence"], beta=0.0)
    ours, _ = step(attached(), tmp_path, 4, 2, lambda: [Term(losses.forward_kl)], reference=teacher())
    assert distance(theirs, ours) < 1e-5


def test_fewer_prompts_than_a_step_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="a step takes 16 prompts, and there are 8: TRL would train on none"):
        prepared(pico.llama(), tmp_path, 4, 4, DISTILLING["the divergence"])
    plain = prepared(pico.llama(), tmp_path, 4, 4, None, kind=DistillationTrainer)
    plain.train()
    assert plain.state.global_step == 0


def test_prompts_are_not_grouped_and_parameters_are(trash_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be grouped: each row is a prompt .* leave out group_by"):
        prepared(awake(trash_artifact), tmp_path, 4, 2, DISTILLING["the divergence"], group_by=("length",))
    groups = [{"parameters": "**.mlp.trash", "learning_rate": 0.25}]
    _, trainer = step(awake(trash_artifact), tmp_path, 4, 2, DISTILLING["the divergence"], groups=groups)
    assert trainer.state.log_history[0]["learning_rate/**.mlp.trash"] == 0.25


@pytest.mark.slow
def test_two_processes_take_the_step_of_trl(trash_artifact: Path, tmp_path: Path) -> None:
    """Each process writes other answers than one process would, so the same two are compared."""
    in_processes(__file__, trash_artifact, tmp_path)
    ours, plain = (load_file(tmp_path / name) for name in ("ours-2", "plain-2"))
    assert distance(plain, ours) < TOLERANCE


def main() -> None:
    """Takes one step with either trainer; the first process writes the gradients."""
    artifact, directory, size, steps = sys.argv[1:5]
    run = (Path(directory), int(size), int(steps))
    found, trainer = step(awake(Path(artifact)), *run, DISTILLING["the divergence"])
    plain, _ = step(awake(Path(artifact)), *run, None, kind=DistillationTrainer)
    if trainer.accelerator.is_main_process:
        for name, gradients in (("ours", found), ("plain", plain)):
            save_file(gradients, Path(directory) / f"{name}-{trainer.accelerator.num_processes}")


if __name__ == "__main__":
    main()
