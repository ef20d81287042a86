"""Models whose last layer alone learns, trained by a trainer or in a loop, and a count of passes through layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from frozen import batches
from torch import nn
from transformers import TrainerCallback, set_seed

import solidify
from solidify.objective.objective import Objective, Term
from solidify.training.prefix.cached import CachedPrefix, cache_prefix
from solidify.training.trainer import ObjectiveTrainer
from training import arguments

BERT = {**pico.SIZES, "num_hidden_layers": 4, "intermediate_size": 48, "num_labels": 3}
LORA = {"r": 4, "target_modules": ["model.layers.3.self_attn.q_proj"]}


def adapted(model: Any, **declared: Any) -> Any:
    model.config.use_cache = False
    return solidify.attach(model, **(declared or {"lora": LORA})).train()


def olmoe(**settings: Any) -> Any:
    return adapted(pico.olmoe(4, **settings))


def classes(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {**pico.collate(rows), "labels": torch.tensor([len(row["input_ids"]) % 3 for row in rows])}


def trainer(model: Any, directory: Path, *, terms: list[Any] | None = None, cached: bool = True, **more: Any) -> Any:
    """Three epochs of four micro-batches of two rows, two to a step; an evaluation after each epoch."""
    set_seed(0)
    settings = {
        "train_sampling_strategy": "sequential",
        "max_steps": 6,
        "learning_rate": 0.01,
        "eval_strategy": "epoch",
    }
    kind = classes if "BertFor" in type(model.get_base_model()).__name__ else pico.collate
    options = {key: more.pop(key) for key in ("data_collator", "train_dataset", "group_by") if key in more}
    return ObjectiveTrainer(
        model=model,
        args=arguments(directory, 2, 2, **{**settings, **more}),
        eval_dataset=pico.ragged(3, seed=5),
        objective=Objective(terms or [Term("model")]),
        cache_prefix=cached,
        **{"train_dataset": pico.ragged(8), "data_collator": kind, **options},
    )


class Calls:
    """Counts how often the layers below the last were run, by a hook on all modules: no class is changed."""

    def __init__(self, patch: pytest.MonkeyPatch, kind: Any) -> None:
        self.count = 0

        def count(module: nn.Module, args: Any) -> None:
            self.count += isinstance(module, kind)

        patch.setitem(nn.modules.module._global_forward_pre_hooks, id(self), count)


class Counted(TrainerCallback):
    def __init__(self, calls: Calls) -> None:
        self.calls, self.by_epoch = calls, list[int]()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.by_epoch.append(self.calls.count)
        self.calls.count = 0


def losses_of(model: Any, directory: Path, *, rounds: int = 2, **more: Any) -> tuple[list[float], CachedPrefix]:
    """Runs two batches again and again, as a loop of one's own does."""
    found = []
    with cache_prefix(model, directory, keep=True) as cached:
        for _ in range(rounds):
            for batch in batches(2):
                loss = model(**batch, **more).loss
                loss.backward()
                found.append(float(loss.detach()))
    return found, cached
