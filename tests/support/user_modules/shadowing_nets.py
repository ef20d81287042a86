"""Modules with names of the file that is generated for an artifact, or of Python's."""

from __future__ import annotations

import torch
from torch import nn


class WrappedConfig(nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.lin = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class SolidWrappedModel(WrappedConfig):
    pass


class Solid(WrappedConfig):
    pass


class operate(WrappedConfig):
    pass


class super(WrappedConfig):
    pass
