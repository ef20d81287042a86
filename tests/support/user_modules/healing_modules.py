"""Modules that have something to learn, for tests of healing."""

import torch
from torch import nn


class Narrow(nn.Module):
    """A feed-forward of its own, smaller than the one that it replaces."""

    def __init__(self, config, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, width)
        self.down = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(hidden_states)))


class Turned(nn.Module):
    """The original attention, its queries turned by a matrix that starts at random."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original
        size = original.q_proj.in_features
        self.turn = nn.Parameter(torch.eye(size) + 0.5 * torch.randn(size, size) / size**0.5)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return self.inner(hidden_states @ self.turn, *args, **kwargs)
