"""Modules whose tensors no file brings back as they are, some that it does, and modules that count their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class InBuffer(Plain):
    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("held", make())


class InAttribute(Plain):
    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.held: Any = [make()]


class ComplexParameter(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class Transposed(Plain):
    """A weight, and a mask, that lie in memory by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.inner.weight = nn.Parameter(torch.randn(8, 3).t())
        self.register_buffer("mask", torch.rand(3, 4).t()[:, :1].expand(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.mask[0]


class LastChannels(Plain):
    """A convolution of one channel, whose weight is contiguous in two orders of memory, and chosen for by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 2, 2).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x[:, None, None].expand(-1, 1, 2, -1)).flatten(1)


class CountingInAttribute(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x)


class CountingInParameter(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.data += 1
        return self.inner(x)


class Remembering(Plain):
    """Remembers what it was called with, which further calls do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.width = x.shape[-1]
        return self.inner(x)


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def quantised() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def without_values() -> torch.Tensor:
    return torch.ones(3, device="meta")


def conjugated() -> torch.Tensor:
    return torch.ones(3, dtype=torch.complex64).conj()


def wide() -> torch.Tensor:
    return torch.ones(3, dtype=torch.complex128)


class Naming(Plain):
    """Holds half a character."""

    def __init__(self) -> None:
        super().__init__()
        self.title = "\ud800"
