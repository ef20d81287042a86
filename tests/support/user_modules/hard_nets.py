"""Modules of a user that are hard to make again."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int) -> None:
        super().__init__()
        self.kind, self.width = kind, width
        self.cell = kind(width, width, num_layers=2, batch_first=True)  # type: ignore[call-arg]  # torch types the first form alone
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Unkept(nn.Module):
    """Keeps nothing of what its constructor was given."""

    def __init__(self, made: nn.RNNBase) -> None:
        super().__init__()
        self.cell, self.head = made, nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Lazy(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.layer, self.head = nn.LazyLinear(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x))


class Buffers(nn.Module):
    def __init__(self, width: int, case: str) -> None:
        super().__init__()
        self.width, self.case = width, case
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.other = self.norm if case == "one module" else nn.Identity()
        one = torch.randn(width)
        for name in ("b1", "b2"):
            if case == "one loose tensor":
                setattr(self, name, one)
            else:
                self.register_buffer(name, one, persistent=case != "one unsaved buffer")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: Any = self.other(self.norm(self.layer(x)))
        return y + self.b1 * self.b2


class Mixed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.wide, self.narrow = nn.Linear(width, width).double(), nn.Linear(width, width).bfloat16()
        self.offset = torch.randn(width, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow((self.wide(x.double()) + self.offset).bfloat16()).float()


class Plain(nn.Module):
    """Its constructor makes one dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.wide(x.to(self.wide.weight.dtype))
        return self.narrow(y.to(self.narrow.weight.dtype)).float()


class Alias(nn.Module):
    def __init__(self, width: int, case: str) -> None:
        super().__init__()
        self.width, self.case = width, case
        self.layer = nn.Linear(width, width)
        made: Any = {
            "list": lambda: [self.layer.weight],
            "view": self.layer.weight.detach,
            "registered": lambda: nn.ParameterList([self.layer.weight]),
            "copied": self.layer.weight.detach().clone,
        }[case]()
        self.alias = made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        alias: Any = self.alias
        return self.layer(x) + functional.linear(x, alias if isinstance(alias, torch.Tensor) else alias[0])
