"""TRL's distillation among other terms: answers written during training are counted, and nothing depends on the split.

Run by itself (under torchrun) it takes one step and writes the gradients.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import solidify
import training
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.teaching import GKDTrainer, ObjectiveGKDTrainer
from training import Gradients, arguments, awake, distance, entropy, in_order, in_processes

SPLITS = ((1, 8), (4, 2), (8, 1), (3, 3))  # the last with a smaller last micro-batch
TOLERANCE = 5e-6  # float32 sums in another order


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<eos>": 0, "<pad>": 1, **{f"w{n}": n for n in range(2, 128)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


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
        processing_class=tokenizer(),
        **({"objective": Objective(terms()), "parameter_groups": groups, "group_by": group_by} if terms else {}),
    )
    in_order(trainer)
    return trainer


def step(*args: Any, **more: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Takes one optimizer step over eight rows; returns gradients and the trainer."""
    trainer = prepared(*args, **more)
    watch = Gradients(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    return watch.found, trainer


TERMS: dict[str, Callable[[], list[Term]]] = {
    "the divergence": lambda: [Term("model")],
    "weight penalty": lambda: [Term("model"), Term(losses.weight_penalty, 0.1)],
    "load balance": lambda: [Term("model"), Term(losses.load_balance, 0.1)],
    "router z": lambda: [Term("model"), Term(losses.router_z, 0.01)],
    "KL to the base": lambda: [Term("model"), Term(losses.forward_kl)],
    "a token mean": lambda: [Term("model"), Term(entropy, 0.3)],
    "from hidden states": lambda: [Term("model"), Term(losses.chunked_distillation, arguments={"chunk": 5})],
    "no divergence": lambda: [Term(losses.forward_kl), Term(losses.load_balance, 0.1)],
    "all together": lambda: [
        Term("model", 0.7),
        Term(losses.forward_kl, 0.5),
        Term(losses.load_balance, 0.1),
        Term(losses.router_z, 0.01),
        Term(losses.weight_penalty, 0.1),
        Term(entropy, 0.1),
    ],
}
FAST = ("all together",)


@pytest.mark.parametrize("terms", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in TERMS])
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, terms: str) -> None:
    found: dict[Any, Any] = {}
    for size, steps in SPLITS:
        found[size], trainer = step(awake(trash_artifact), tmp_path, size, steps, TERMS[terms])
        logs = trainer.state.log_history[0]
        weighted = sum(value for key, value in logs.items() if key.startswith("weighted/"))
        assert logs["loss"] == pytest.approx(weighted, rel=1e-6, abs=1e-6)
        assert logs["loss"] == pytest.approx(found.setdefault("loss", logs["loss"]), rel=1e-6, abs=1e-6)
    for size, _ in SPLITS[1:]:
        assert distance(found[1], found[size]) < TOLERANCE


def test_the_loss_is_trls_own(trash_artifact: Path, tmp_path: Path) -> None:
    settings = {"temperature": 2.0, "beta": 0.1}  # TRL samples with the temperature, and does no more
    ours, trainer = step(awake(trash_artifact), tmp_path, 8, 1, TERMS["the divergence"], **settings)
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
    trainer = prepared(awake(trash_artifact), tmp_path, 2, 4, TERMS["the divergence"], lmbda=0.0, seq_kd=True)
    written = recorded(trainer)
    trainer.train()
    assert len(written) == 4
    loss, _, _ = expected(awake(trash_artifact).train(), written, 0.5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_some_batches_keep_their_answers(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = prepared(awake(trash_artifact), tmp_path, 1, 8, TERMS["all together"], lmbda=0.5)
    written = recorded(trainer)
    trainer.train()
    assert 0 < len(written) < 8


def test_a_resumed_training_writes_what_it_would_have_written(trash_artifact: Path, tmp_path: Path) -> None:
    more = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.01, "lmbda": 0.6}

    def fresh(directory: Path) -> Any:
        return prepared(awake(trash_artifact), directory, 2, 2, TERMS["all together"], **more)

    whole, resumed = fresh(tmp_path / "whole"), fresh(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    found = resumed.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(found[name], tensor), name


# TRL 1.16 switches checkpointing off and on by transformers' old names.
def test_activation_checkpointing_changes_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    terms = TERMS["all together"]
    plain, first = step(awake(trash_artifact), tmp_path, 3, 3, terms, lmbda=0.5)
    saved, second = step(awake(trash_artifact), tmp_path, 3, 3, terms, lmbda=0.5, activation_checkpointing=True)
    assert second.state.log_history[0]["loss"] == pytest.approx(first.state.log_history[0]["loss"], rel=1e-6)
    assert distance(plain, saved) < TOLERANCE


# One model teaches another of another size, with transformers' Trainer.

HIDDEN = {"layers": "projection", "reference_layers": "model.norm"}


def student() -> torch.nn.Module:
    """A Llama of half the teacher's width and layers, with a projection into the teacher's width."""
    model = pico.llama(num_hidden_layers=2)
    solidify.add(
        model, "projection", torch.nn.Linear, reads="model.norm", arguments={"in_features": 32, "out_features": 64}
    )
    return model.requires_grad_(True)


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
    trainer = prepared(awake(trash_artifact), tmp_path, 4, 2, TERMS["the divergence"], groups=groups)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate/**.mlp.trash"] == 0.25


def test_rows_are_grouped_where_they_say_how_long_they_are(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = prepared(awake(trash_artifact), tmp_path, 2, 2, TERMS["the divergence"], group_by=("length",))
    del trainer._get_train_sampler  # which reads the rows in their order
    assert trainer._get_train_sampler().lengths == [len(row["input_ids"]) for row in rows()]
    trainer.train()
    assert trainer.state.global_step == 1


def main() -> None:
    """Takes one step with either trainer; the first process writes the gradients."""
    artifact, directory, size, steps = sys.argv[1:5]
    run = (Path(directory), int(size), int(steps))
    found, trainer = step(awake(Path(artifact)), *run, TERMS["all together"])
    found["loss"] = torch.tensor(trainer.state.log_history[0]["loss"])
    alone, _ = step(awake(Path(artifact)), *run, TERMS["the divergence"])
    plain, _ = step(awake(Path(artifact)), *run, None, kind=GKDTrainer)
    if trainer.accelerator.is_main_process:
        for name, gradients in (("ours", found), ("alone", alone), ("plain", plain)):
            save_file(gradients, Path(directory) / f"{name}-{trainer.accelerator.num_processes}")


if __name__ == "__main__":
    main()
