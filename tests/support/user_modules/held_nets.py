"""A module that holds a value, and classes of values."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import nn


class Held(nn.Module):
    """Is built part by part: its constructor keeps no width."""

    def __init__(self, width: int, value: Any) -> None:
        super().__init__()
        self.lin, self.value = nn.Linear(16, width), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class Rate(float):
    def half(self) -> float:
        return self / 2


class Word(str):
    __slots__ = ()


class Ways(enum.Flag):
    HERE = 1
    THERE = 2


def hold_itself() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nest(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Row(list[Any]):
    """A list of a class of its own."""


def remember() -> Row:
    """A list that holds more than its items."""
    row = Row([1])
    row.note = "x"  # type: ignore[attr-defined]
    return row
