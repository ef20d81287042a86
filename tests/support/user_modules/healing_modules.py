"""Modules that have something to learn, for tests of healing."""

import torch
from torch import nn


class Narrow(nn.Module):
    """A feed-forward of its own, smaller than the one that it replaces."""

    def __init__(self, config, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.up = nn.Linear(config.hidden_size, width)
        self.down = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(hidden_states))) * self.scale


class Turned(nn.Module):
    """The original attention, its queries turned by a matrix that starts at random."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original
        size = original.q_proj.in_features
        self.turn = nn.Parameter(torch.eye(size) + 0.5 * torch.randn(size, size) / size**0.5)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return self.inner(hidden_states @ self.turn, *args, **kwargs)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, config) -> None:
        super().__init__()
        self.a = nn.Linear(config.hidden_size, config.hidden_size)
        self.b = nn.Linear(config.hidden_size, config.hidden_size)
        self.b.weight = self.a.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(hidden_states)))


ONE: list[nn.Parameter] = []


class Shared(nn.Module):
    """The original, and a parameter that all of them have."""

    def __init__(self, original: nn.Module, config) -> None:
        super().__init__()
        self.inner = original
        if not ONE:
            ONE.append(nn.Parameter(torch.ones(config.hidden_size)))
        self.one = ONE[0]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states) * self.one


class Unsaved(nn.Module):
    """Moves what it does not save while it trains."""

    mean: torch.Tensor

    def __init__(self, config) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_buffer("mean", torch.zeros(config.hidden_size), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden_states.detach().mean((0, 1))
        return self.up(hidden_states - self.mean)


class Wrapped(nn.Module):
    """The original, scaled."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) * self.scale


class Keeping(nn.Module):
    """The original's parts, under their names, and a scale."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = original.gate_proj, original.up_proj, original.down_proj
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.silu(self.gate_proj(hidden_states))
        return self.down_proj(gate * self.up_proj(hidden_states)) * self.scale


LEFT: list[torch.Tensor] = []


class Leaving(nn.Module):
    """The original, scaled; while `sharing`, the first leaves its output to those behind, which add it to theirs."""

    def __init__(self, original: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.inner, self.number, self.sharing = original, layer_idx, False
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states: torch.Tensor, **kwargs):
        output, *rest = self.inner(hidden_states, **kwargs)
        output = output * self.scale
        if self.sharing and self.number:
            output = output + LEFT[-1]
        elif self.sharing:
            LEFT[:] = [output.detach()]
        return (output, *rest)
