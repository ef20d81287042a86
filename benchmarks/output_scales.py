"""Modules that the benchmarks of a dense model put in the place of `o_proj`: with a scale for every output."""

from __future__ import annotations

import torch
from torch import nn


class Scaled(nn.Module):
    """Holds the projection, whose weight gets another name so."""

    def __init__(self, original: nn.Linear) -> None:
        """Takes the projection over."""
        super().__init__()
        self.inner = original
        self.scale = nn.Parameter(torch.ones(original.out_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the scaled projection, (batch_size, sequence_length, hidden_size)."""
        projected: torch.Tensor = self.inner(hidden_states)
        return projected * self.scale


class ScaledInPlace(nn.Module):
    """Holds the weight of the projection under the name that it had."""

    def __init__(self, original: nn.Linear) -> None:
        """Takes the weight over."""
        super().__init__()
        self.weight = original.weight
        self.scale = nn.Parameter(torch.ones(original.out_features))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the scaled projection, (batch_size, sequence_length, hidden_size)."""
        return nn.functional.linear(hidden_states, self.weight) * self.scale
