"""One training step on a pico artifact, and what gradients and logs it gave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pico
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import solidify
from solidify import losses
from solidify.adapter import lookup
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer

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
        for place in lookup.modules(model):
            if type(place.inner).__name__ == "TrashCan":
                place.inner.bias.fill_(-2.0)
                if place.inner is lookup.owner(model, place.name):  # not in a trained copy: the base's is awake too
                    own[f"{place.name}.bias"].fill_(-2.0)
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
) -> tuple[dict[str, torch.Tensor], Any]:
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
    watch = Gradients(model)
    trainer.add_callback(watch)
    trainer.train()
    return watch.found, trainer


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Returns the largest difference of any tensor, relative to the largest gradient of all."""
    scale = max(float(g.abs().max()) for g in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


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
