"""Networks whose constructors do not keep what they are given: classes, partial functions, lists, settings."""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # as people import it
from torch import nn


class Pooling(enum.Enum):
    MEAN = "mean"
    MAX = "max"


@dataclasses.dataclass
class Settings:
    widths: tuple[int, ...]
    pooling: Pooling = Pooling.MEAN
    activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu


class Window(NamedTuple):
    height: int
    width: int


def halve(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
    return x / by


class Residual(nn.Module):
    """As a block of ResNet: its constructor is given a class, and keeps neither that nor its widths."""

    def __init__(self, inside: int, outside: int, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.norm = norm_layer(outside)
        self.downsample = nn.Conv2d(inside, outside, 1) if inside != outside else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x if self.downsample is None else self.downsample(x)
        return F.relu(self.norm(self.conv(x)) + kept)


class Staged(nn.Module):
    """As ResNet and RegNet: a class, numbers of layers, a partial function, settings in a dataclass."""

    def __init__(
        self,
        block: type[nn.Module],
        layers: list[int],
        settings: Settings,
        norm_layer: Any = None,
        num_classes: int = 5,
    ) -> None:
        super().__init__()
        self._norm_layer = norm_layer or partial(nn.BatchNorm2d, eps=1e-3)
        self.settings = settings
        self.window = Window(2, 3)
        self.shape = torch.Size([2, 3])
        self.names = OrderedDict(later=1, earlier=2)
        self.stages, width = nn.ModuleDict(), 3
        for stage, (count, wide) in enumerate(zip(layers, settings.widths, strict=True)):
            steps = [block(width if n == 0 else wide, wide, self._norm_layer) for n in range(count)]
            self.stages[f"stage{stage}"] = nn.Sequential(*steps)
            width = wide
        self.finish = partial(halve, by=4.0)
        self.order = [self.stages[key] for key in self.stages]  # no list of torch's
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.window.height == self.shape[0]
        assert list(self.names) == ["later", "earlier"]
        for stage in self.order:
            x = stage(x)
        x = x.mean((2, 3)) if self.settings.pooling is Pooling.MEAN else x.amax((2, 3))
        return self.head(self.finish(self.settings.activation(x)))


class Featured(nn.Module):
    """As VGG: given its layers, whole."""

    def __init__(self, features: nn.Module, num_classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(8, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class Attending(nn.Module):
    """As Swin and LeViT: tensors that no state holds, one that is no buffer, and what it keeps in evaluation alone."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.register_buffer("index", torch.arange(16).flip(0), persistent=False)
        self.bias = nn.Parameter(torch.randn(16))
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)
        self.factor = torch.tensor(scale)
        self.kept: dict[str, torch.Tensor] = {}
        self.pick = self.look_up
        self.head = nn.Linear(width, 3)

    def train(self, mode: bool = True) -> Attending:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def look_up(self) -> torch.Tensor:
        if self.training:
            return self.bias[self.index]
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[self.index]
        return self.kept["bias"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2)[:, :, :16].transpose(1, 2) + self.pick()[None, :, None]
        return self.head((self.attention(x, x, x)[0] * self.frozen * self.factor).mean(1))


class Repeating(nn.Module):
    """One module at two names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = Residual(3, 3, partial(nn.GroupNorm, 1))
        self.third = self.second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(self.first(x))).mean((2, 3))


class Scheduled(nn.Module):
    """As models with stochastic depth: what its constructor is given is kept, and it computes a list from a tensor."""

    def __init__(self, depth: int = 3, rate: float = 0.3) -> None:
        super().__init__()
        self.depth, self.rate = depth, rate
        rates = torch.linspace(0, rate, depth).tolist()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(each)) for each in rates])
        self.scale = torch.tensor(0.5).item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + self.scale * layer(x)
        return x.mean((2, 3))
