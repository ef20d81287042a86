"""Modules that compute with a layer's weight past the layer, and some that do not."""

from __future__ import annotations

import threading
from typing import Any

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


class ByForward(Called):
    """Calls the layer by its `forward`, which runs no hooks."""

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return self.up.forward(x)


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


class ByData(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.up.weight.data)


class WithoutGradients(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = F.normalize(next(self.up.parameters()))
        return F.linear(x, weight)


class ByNumber(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 4)) * next(self.up.parameters()).norm().item()


class ByNumpy(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.from_numpy(next(self.up.parameters()).detach().numpy()).t()


class WhereNothingLearns(Called):
    """Calls the layer where gradients are on, and computes with its weight elsewhere."""

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return self.up(x)
        return F.linear(x, next(self.up.parameters()), self.up.bias)


class InTrainingByData(Called):
    def rise(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, next(self.up.parameters()).data) if self.training else self.up(x)


class Gated(Called):
    """A branch that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.gate * self.down(F.relu(self.rise(x))))


class Skipping(Called):
    """Asks the weight for its dtype, and leaves the layer out in evaluation."""

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.up.weight.dtype)
        return self.up(x) if self.training else F.pad(x, (0, 4))


class Unreached(Called):
    """Experts in a list, of which the inputs reach the first alone; the second is `up`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        outputs = x.new_zeros(len(x), 8)
        for number, expert in enumerate((self.first, self.up)):
            rows = (x[:, 0] > 100).long() == number
            if rows.any():
                outputs[rows] = expert(x[rows].to(self.up.weight.dtype))
        return outputs


class Choosing(Called):
    """A router that chooses without a gradient: an update moves the output, and learns nothing."""

    def rise(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            chosen = self.up(x).argmax(-1)
        return F.one_hot(chosen, 8).to(x.dtype)


class InSteps(nn.Module):
    """Around a feed-forward part: computes with a weight where there is one position, as generation does."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 1:
            return self.inner(x)
        gate = F.linear(x, next(self.inner.gate_proj.parameters()).data)
        return self.inner.down_proj(F.silu(gate) * self.inner.up_proj(x))


class Noting(nn.Module):
    """Around an attention: leaves a thing in the cache that cannot be copied."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            past_key_values.lock = threading.Lock()
        return self.inner(*args, past_key_values=past_key_values, **kwargs)


class InStepsWithoutGradients(InSteps):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if torch.is_grad_enabled() else super().forward(x)


class SelfMerging(nn.Module):
    """Adds an update to its weight as it begins to evaluate, and takes it off as it begins to train."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.update = nn.Parameter(torch.randn_like(layer.weight))
        self.merged = False

    def train(self, mode: bool = True) -> SelfMerging:
        if self.merged == mode:
            self.weight.data += self.update.data if not mode else -self.update.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.update)
