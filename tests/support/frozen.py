"""A small model whose last layer alone learns, modules to put around parts of it, and a training both ways."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from torch import nn

import solidify
from solidify.training.prefix.cached import CachedPrefix

Act = Callable[[Any], Any]


def nothing(_: Any) -> None:
    """Leaves a model as it is."""


def small(prepare: Act = nothing) -> Any:
    """A model of which the attention of the last layer learns."""
    torch.manual_seed(0)
    model = pico.llama(num_hidden_layers=4)
    model.config.use_cache = False
    prepare(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.layers[3].self_attn.parameters():
        parameter.requires_grad_(True)
    return model.train()


def train(model: Any, between: Act = nothing, after: int = 1) -> list[float]:
    """Six steps over two batches in turn; `between` acts on the model after one of them."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    torch.manual_seed(2)
    batches = [pico.collate(pico.ragged(3, seed=seed)) for seed in range(2)]
    found = []
    for step in range(6):
        loss = model(**batches[step % 2]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        if step == after:
            between(model)
    return found


def both(
    directory: Path, prepare: Act = nothing, between: Act = nothing, after: int = 1
) -> tuple[list[float], list[float], CachedPrefix]:
    """Trains plainly and with a prefix; returns the losses of both."""
    plain = train(small(prepare), between, after)
    model = small(prepare)
    with solidify.cache_prefix(model, directory) as cached:
        return plain, train(model, between, after), cached


class Around(nn.Module):
    """A module around another, of which each kind below makes something else in training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0
        self.list = [0]
        self.loose = torch.zeros(1)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(hidden_states)
        return found


def put(kind: type[Around], layer: int) -> Act:
    """Returns what puts a module around the feed-forward part of a layer."""

    def act(model: Any) -> None:
        random.seed(0)
        np.random.seed(0)
        model.model.layers[layer].mlp = kind(model.model.layers[layer].mlp)

    return act


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    """Batches of three rows, each another."""
    return [pico.collate(pico.ragged(3, seed=seed)) for seed in range(count)]
