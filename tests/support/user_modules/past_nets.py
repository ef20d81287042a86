"""Modules that compute with a layer's weight past the layer, and some that do not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.down(F.relu(self.rise(x))))

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


class Asking(Called):
    """Asks the weight for its dtype, and looks at it without a gradient."""

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.up.weight.detach().isnan().any()
        return self.up(x.to(self.up.weight.dtype))


class ByParameters(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, next(self.up.parameters()))


class ByTable(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dict(self.up.named_parameters())["weight"], self.up.bias)


class InTraining(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return F.linear(x, F.dropout(self.up.weight, 0.1), self.up.bias)
        return self.up(x)


class Both(Called):
    """Calls the layer, and decodes with its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + F.linear(F.relu(self.up(x)), self.up.weight.t()))


class Counting(Called):
    """Remembers in a number how often it was called in training."""

    calls = 0

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return self.up(x)
