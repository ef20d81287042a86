"""All that a model returns for some inputs, and how far two such answers are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn

from solidify.behaviour import calling
from solidify.model import anatomy

Answers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Output:
    """What a model returned for some inputs: every tensor by where it stands, and what is no tensor by its class."""

    tensors: Answers
    no_tensors: dict[str, str]


def collect(model: nn.Module, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> Output:
    """Runs the model on every case, and returns all that it returns; what it draws at random is the same each time."""
    found = Output({}, {})
    for case, batch in inputs.items():
        with calling.chance_kept():
            calling.set_seed(0)
            answer = anatomy.answer(model, batch)
        for name, value in _yield_leaves(case, answer):
            if isinstance(value, torch.Tensor):
                found.tensors[name] = value
            elif value is not None:
                found.no_tensors[name.partition("/")[2]] = type(value).__name__
    return found


def _yield_leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields what is nested in a model's answer, by path."""
    if isinstance(value, Mapping):
        parts: Any = value.items()
    elif isinstance(value, (tuple, list)):
        parts = enumerate(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f.name, getattr(value, f.name)) for f in fields(value)]
    else:
        yield name, value
        return
    for key, part in parts:
        yield from _yield_leaves(f"{name}/{key}", part)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the root mean square of a difference as a share of `a`'s; of whole numbers, the share that differs."""
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return float((a != b).double().mean()) if a.numel() else 0.0
    there = torch.isfinite(a)
    same = torch.where(there, torch.isfinite(b), (a == b) | (a.isnan() & b.isnan()))
    if not bool(same.all()):
        return float("inf")
    first, second = a[there].double(), b[there].double()
    off, size = (first - second).norm(), first.norm()
    return 0.0 if float(off) == 0 else float(off / size.clamp(min=torch.finfo(torch.float32).tiny))
