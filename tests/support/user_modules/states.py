"""Modules whose state a reload must bring back, or that must be refused."""

import random

import torch
from torch import nn


class Wrapper(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return self.original(hidden_states)


class PersistentBuffer(Wrapper):
    def __init__(self, original):
        super().__init__(original)
        self.register_buffer("table", torch.linspace(0.1, 0.9, 32))

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.table


class OwnInitialisation(Wrapper):
    def __init__(self, original):
        super().__init__(original)
        self.extra = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.trunc_normal_(self.extra.weight, std=0.7)
        nn.init.constant_(self.extra.bias, 0.3)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, hidden_states):
        return self.original(hidden_states) + self.norm(self.extra(hidden_states))


class PlainNumbers(Wrapper):
    """Computed from arguments and shapes, which are there when a model is loaded too."""

    def __init__(self, original, factor=3):
        super().__init__(original)
        self.width = original.up_proj.weight.shape[0]
        self.scale = factor / self.width**0.5

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.scale


class LateBuffer(Wrapper):
    """A buffer that is not saved."""

    def __init__(self, original):
        super().__init__(original)
        self.register_buffer("table", torch.linspace(0.1, 0.9, 32), persistent=False)

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.table


class TensorAttribute(Wrapper):
    def __init__(self, original):
        super().__init__(original)
        self.table = torch.arange(32) / 32

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.table


class NumberFromTensor(Wrapper):
    def __init__(self, original):
        super().__init__(original)
        self.scale = float(torch.arange(5.0).mean())

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.scale


class AdoptedNumber(Wrapper):
    """Has no effect on any output, so only a look at the number itself can find it."""

    def __init__(self, original):
        super().__init__(original)
        self.seen = 0.0

    def adopt(self, original):
        self.seen = float(original.up_proj.weight.std())


class RandomNumber(Wrapper):
    def __init__(self, original):
        super().__init__(original)
        self.drop = random.random()
