"""Modules that compute one thing in evaluation, and in training what something set on them says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Drops rows by a probability that whoever builds a stack sets afterwards (stochastic depth)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self._drop_prob = width, 0.0
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        return x * (torch.rand(len(x), 1) > self._drop_prob) if self.training else x


def dropped() -> nn.Module:
    module = nn.Sequential(Block(), Block())
    for block in module:
        block._drop_prob = 0.5
    return module


class Rates(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.rates = width, [0.0]
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.lin(x), self.rates[0], self.training)


def rated() -> nn.Module:
    module = Rates()
    module.rates = [0.5]
    return module


def keep(x: torch.Tensor) -> torch.Tensor:
    return x


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, 0.5)


class Noisy(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.noise: Callable[[torch.Tensor], torch.Tensor] = keep
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.noise(self.lin(x)) if self.training else self.lin(x)


def noisy() -> nn.Module:
    module = Noisy()
    module.noise = halve
    return module


class Settings(nn.Module):
    def __init__(self, width: int = 16, **more: Any) -> None:
        super().__init__()
        self.width, self.more = width, more
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.lin(x), self.more.get("p", 0.0), self.training)


class Counted(nn.Module):
    """Two parts write into and read one list."""

    def __init__(self, width: int, seen: list[int]) -> None:
        super().__init__()
        self.seen = seen
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen[0] += 1
            return self.lin(x) * self.seen[0]
        return self.lin(x)


def counted() -> nn.Module:
    seen = [0]
    return nn.Sequential(Counted(16, seen), Counted(16, seen))


class Slotted(nn.Module):
    __slots__ = ("rate",)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.rate = width, 0.0
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.lin(x), self.rate, self.training)


def slotted() -> nn.Module:
    module = Slotted()
    module.rate = 0.5
    return module


class Masked(nn.Module):
    """Draws what only training uses, and keeps it where no state holds it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width, self.mask = width, np.random.default_rng().random(width)
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * torch.as_tensor(self.mask).to(x) if self.training else self.lin(x)


class Refused(Slotted):
    """Has a tensor and a buffer that no state holds, and a slot that differs when it is built part by part."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__(width)
        self.table = more * torch.ones(width)
        self.register_buffer("mask", torch.ones(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.table * self.mask


class Spectral(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.randn(width // 2 + 1, dtype=torch.cfloat))
        self.lin = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(torch.fft.irfft(torch.fft.rfft(x) * self.scale, n=self.width))


class Ordered(nn.Module):
    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = widths
        self.layers = nn.ModuleDict({name: nn.Linear(width, width) for name, width in widths.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x
