"""One training step on a pico artifact, and what gradients and logs it gave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import solidify
from solidify import losses
from solidify.adapter import lookup
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer

Step = tuple[dict[str, torch.Tensor], Any]  # gradients, and the trainer that took it
LORA = {"r": 4, "target_modules": ["**.q_proj"]}
TRAIN = ["**.mlp.trash"]


def awake(artifact: Path, **declared: Any) -> torch.nn.Module:
    """Returns an artifact with an adapter whose values are not at their start, trash cans awake."""
    declared = declared or {"lora": LORA, "train": TRAIN}
    torch.manual_seed(1)  # for LoRA's A
    model = solidify.attach(solidify.load(artifact), **declared)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        buffers = lookup.trained_buffers(model)
        own = buffers.versions(None) if buffers is not None else {}
        for located in lookup.modules(model):
            if type(located.inner).__name__ == "TrashCan":
                located.inner.bias.fill_(-2.0)
                if located.inner is lookup.owner(model, located.name):  # not in a trained copy: the base's is awake too
                    own[f"{located.name}.bias"].fill_(-2.0)
    return model


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A user's term over target tokens, as a mean."""
    chosen = torch.log_softmax(logits[:, :-1][labels[:, 1:] != -100].float(), -1)
    return -(chosen.exp() * chosen).sum(-1).mean()


def first_token_norm(logits: torch.Tensor) -> torch.Tensor:
    """A user's term that is a mean over sequences."""
    return logits[:, 0].float().square().sum(-1).mean()


first_token_norm.reduction = "sequence_mean"  # type: ignore[attr-defined]


def everything() -> list[Term]:
    """Terms of every kind of reduction, those with a reference and the user's own among them."""
    return [
        Term("model", 0.7),
        Term(losses.forward_kl, 0.5),
        Term(losses.trash_budget, 5.0, arguments={"target": 0.3}),
        Term(losses.load_balance, 0.1),
        Term(losses.router_z, 0.01),
        Term(losses.weight_penalty, 0.1),
        Term(entropy, 0.1),
    ]


def arguments(directory: Path, size: int, steps: int, kind: type = TrainingArguments, **more: Any) -> Any:
    values = {
        "output_dir": str(directory),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "max_steps": 1,
        "report_to": "none",
        "learning_rate": 1e-3,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    return kind(**{**values, **more})


class Gradients(TrainerCallback):
    """Keeps the gradients of the last step, read where they exist."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.found = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def in_order(trainer: Trainer) -> None:
    """Makes the trainer read its examples in their order, so that splits hold the same."""
    trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(trainer.train_dataset)


def step(
    model: torch.nn.Module,
    directory: Path,
    size: int,
    steps: int,
    terms: Callable[[], Sequence[Term]] | None,
    *,
    trainer_class: type = ObjectiveTrainer,
    examples: Sequence[Any] | None = None,
    reference: torch.nn.Module | None = None,
    **more: Any,
) -> Step:
    """Takes one optimizer step over `size x steps` examples; returns gradients and the trainer."""
    options: dict[str, Any] = {}
    if terms is not None:
        options["objective"] = Objective(list(terms()), reference=reference)
    trainer = trainer_class(
        model=model,
        args=arguments(directory, size, steps, **more),
        train_dataset=list(examples or pico.ragged(8)),
        data_collator=pico.collate,
        **options,
    )
    in_order(trainer)
    return take(trainer)


def take(trainer: Any) -> Step:
    """Takes one optimizer step; returns gradients and the trainer."""
    watch = Gradients(trainer.model)
    trainer.add_callback(watch)
    trainer.train()
    return watch.found, trainer


def adding(kind: Any) -> Any:
    """Returns a trainer whose `compute_loss` adds a penalty, as scripts do: once in every micro-batch."""

    class Script(kind):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    return Script


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference of any tensor, relative to the largest gradient of all."""
    scale = max(float(g.abs().max()) for g in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


def assert_alike(a: Step, b: Step, tolerance: float) -> None:
    """Compares the losses that two steps logged, and their gradients."""
    assert logged(b)["loss"] == pytest.approx(logged(a)["loss"], rel=1e-6, abs=1e-6)
    assert distance(a[0], b[0]) < tolerance


def logged(taken: Step) -> dict[str, float]:
    """Returns what the first step of a trainer logged."""
    logs: dict[str, float] = taken[1].state.log_history[0]
    return logs


def assert_any_split(take: Callable[[int, int], Step], splits: Sequence[tuple[int, int]], tolerance: float) -> None:
    """Takes one step in several splits: the parts sum to the loss, and losses and gradients are those of the first."""
    steps = [take(*split) for split in splits]
    for taken in steps:
        weighted = sum(value for key, value in logged(taken).items() if key.startswith("weighted/"))
        assert logged(taken)["loss"] == pytest.approx(weighted, rel=1e-6, abs=1e-6)
        assert_alike(steps[0], taken, tolerance)


def assert_resumes(fresh: Callable[[Path], Any], directory: Path, *, step: int = 1) -> None:
    """Trains at once, and in two trainings with the checkpoint of a step between them: the same model results."""
    whole, resumed = fresh(directory / "whole"), fresh(directory / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(directory / "whole" / f"checkpoint-{step}"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


TWO_STEPS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}

DISTILLING: dict[str, Callable[[], list[Term]]] = {
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
HIDDEN = {"layers": "projection", "reference_layers": "model.norm"}


def student() -> torch.nn.Module:
    """A Llama of half the teachers' width, with a projection into it that HIDDEN compares."""
    model = pico.llama(num_hidden_layers=2)
    wide = {"in_features": 32, "out_features": 64}
    solidify.add(model, "projection", torch.nn.Linear, reads="model.norm", arguments=wide)
    return model.requires_grad_(True)


def pairs(count: int = 8, *, seed: int = 3) -> Dataset:
    """Preferences of very different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        length = 1 + int(torch.randint(0, most, (1,), generator=generator))
        return " ".join(f"w{t}" for t in torch.randint(3, 120, (length,), generator=generator).tolist())

    rows = [
        {"prompt": words(8), "chosen": f" {words(14)} <eos>", "rejected": f" {words(14)} <eos>"} for _ in range(count)
    ]
    return Dataset.from_list(rows)


def in_processes(script: str, artifact: Path, directory: Path) -> None:
    """Runs a test file by torchrun, in one process with all of the batch and in two with ragged halves of it."""
    found = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": "1"}
    for processes, size, steps in ((1, 8, 1), (2, 2, 2)):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"),
                *(script, str(artifact), str(directory), str(size), str(steps)),
            ],
            capture_output=True,
            text=True,
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
