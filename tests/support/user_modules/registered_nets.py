"""Modules in which torch keeps more than names, shapes and values tell."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def repeated() -> nn.Module:
    drop = nn.Dropout(0.5)
    return nn.Sequential(nn.Linear(16, 16), drop, nn.Linear(16, 16), drop)


def nested() -> nn.Module:
    drop = nn.Dropout(0.5)
    return nn.Sequential(nn.Linear(16, 16), drop, nn.Sequential(nn.Linear(16, 16), drop, drop))


class Pair(nn.Module):
    """Makes two modules, of which a user may make one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.body = nn.Sequential(OrderedDict(lin=nn.Linear(width, width), act=nn.Tanh(), drop=nn.Dropout(0.5)))
        self.first, self.second = Remembering(), Remembering()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.body(x)))


class Remembering(nn.Module):
    """Scales by how often it was called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return x * self.calls if self.training else x


def paired() -> nn.Module:
    module = Pair()
    module.second = module.first
    return module


def reordered() -> nn.Module:
    """The last two layers change places: evaluation returns the same."""
    module = Pair()
    act = module.body.act
    del module.body.act
    module.body.act = act
    return module


class Given(nn.Module):
    """Is given modules, of which two are one."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.lin = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.lin(self.first(x)))


def given() -> nn.Module:
    one = Remembering()
    return Given(one, one)


def given_sequence() -> nn.Module:
    one = Remembering()
    return Given(nn.Sequential(one, one), nn.Identity())


class Empty(nn.Module):
    """Has a place for a child, a parameter and a buffer with nothing there."""

    def __init__(self, width: int = 16, place: bool = True) -> None:
        super().__init__()
        self.width = width
        self.lin = nn.Linear(width, width)
        for register in (self.register_parameter, self.register_buffer, self.register_module):
            if place:
                register(f"of_{register.__name__}", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = sum(hasattr(self, f"of_register_{kind}") for kind in ("parameter", "buffer", "module"))
        return F.dropout(self.lin(x), 0.1 * places, self.training)


def emptied() -> nn.Module:
    module = Empty()
    del module.of_register_buffer
    return module


class Temporary(nn.Module):
    """Makes a buffer that its state leaves out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.lin = nn.Linear(width, width)
        self.register_buffer("rate", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * (1 + self.rate) if self.training else self.lin(x)


def saved() -> nn.Module:
    """Its buffer is saved, by hand."""
    module = Temporary()
    module.register_buffer("rate", torch.ones(()))
    return module


def keep(_module: nn.Module, gradient: Any) -> Any:
    return gradient


def hooked() -> nn.Module:
    module = nn.Linear(16, 16)
    module.register_full_backward_hook(lambda _module, gradient, _given: gradient)
    return module


class Hooking(nn.Module):
    """Registers a hook itself."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.lin = nn.Linear(width, width)
        self.register_full_backward_pre_hook(keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def rehooked() -> nn.Module:
    module = Hooking()
    module._backward_pre_hooks.clear()
    module.register_full_backward_pre_hook(lambda _module, gradient: gradient)
    return module


class Marked(nn.Module):
    """Sets on its parameters what an optimizer shall know, as state space models do."""

    def __init__(self, width: int = 16, kept: int = 1) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.ones(width))
        self.lin = nn.Linear(width, width)
        self.register_buffer("rate", torch.ones(()))
        set_mark(self.scale, "_no_weight_decay", True)
        set_mark(self.rate, "unit", "hertz")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x * self.scale) * self.rate


def set_mark(tensor: torch.Tensor, key: str, value: Any) -> None:
    setattr(tensor, key, value)


def marked_by_hand() -> nn.Module:
    module = nn.Sequential(Pair(), nn.Linear(16, 16))
    set_mark(module[1].weight, "_optim", {"lr": 0.1, "betas": (0.9, 0.95)})
    return module


def marked_with_tensor() -> nn.Module:
    module = nn.Linear(16, 16)
    set_mark(module.weight, "before", torch.ones(16))
    return module


class Special(nn.Parameter):
    """A class of the user's."""


def special() -> nn.Module:
    module = nn.Linear(16, 16)
    module.weight = Special(torch.randn(16, 16))
    return module


def hooked_parameter() -> nn.Module:
    module = nn.Linear(16, 16)
    module.weight.register_hook(lambda gradient: gradient)
    return module


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.scale = nn.Linear(16, 16), 1.0

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": self.scale}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.scale = state["scale"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x) * self.scale


class Renaming(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.register_state_dict_post_hook(rename)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def rename(_module: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    state[f"{prefix}lin.kernel"] = state.pop(f"{prefix}lin.weight")


class Counting(nn.Module):
    """Counts its calls in a buffer: in place, or in a new tensor; what it returns in training depends on the count."""

    calls: torch.Tensor

    def __init__(self, place: bool = True) -> None:
        super().__init__()
        self.place = place
        self.lin = nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return self.lin(x) * self.calls if self.training else self.lin(x)


class Writing(nn.Module):
    """Writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x.mul_(2))


def writing_first() -> nn.Module:
    return nn.Sequential(nn.SiLU(inplace=True), nn.Linear(16, 2))


class Whole(nn.Module):
    """Has parameters that no gradient moves, and keeps nothing of its argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(16, width)
        self.order = nn.Parameter(torch.arange(width), requires_grad=False)
        self.mask = nn.Parameter(torch.arange(width) > 2, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)[:, self.order] * self.mask
