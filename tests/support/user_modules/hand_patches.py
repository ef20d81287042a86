"""What a script does to a model by hand."""

from __future__ import annotations

import torch
from torch import nn


class Wrapper(nn.Module):
    """Keeps the original under a name of its own, and a number."""

    def __init__(self, inner: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate * self.scale * self.inner(x)


class FromConfig(nn.Module):
    def __init__(self, config: object, width: int) -> None:
        super().__init__()
        self.width = width
        self.down = nn.Linear(config.hidden_size, width)  # type: ignore[attr-defined]
        self.up = nn.Linear(width, config.hidden_size)  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.down(x)))


class Forgetful(nn.Module):
    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.extra = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.extra(x))


class LooksAhead(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flip(1))


def swiglu_twice(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A forward for a LlamaMLP."""
    hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)  # type: ignore[operator]
    return 2 * self.down_proj(hidden)  # type: ignore[operator]


def halve(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    """A forward hook."""
    return output / 2
