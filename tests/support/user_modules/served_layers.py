"""Replacements that servers are tried with: such as they serve right, and such as they quietly change."""

import torch
from torch import nn
from torch.nn import functional as F


class GatedDense(nn.Module):
    """A gated dense feed-forward; each layer may open its gate in its own way."""

    def __init__(self, config, layer_idx, width=80, turns=False):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, width, bias=False)
        self.value = nn.Linear(config.hidden_size, width, bias=False)
        self.out = nn.Linear(width, config.hidden_size, bias=False)
        self.act = nn.SiLU()
        self.power = 1.0 + layer_idx if turns else 1.0

    def forward(self, hidden_states):
        return self.out(self.act(self.gate(hidden_states)) * self.value(hidden_states) * self.power)


class Gated(nn.Module):
    """Any module, with a gate of one number for each channel beside it."""

    def __init__(self, original, config):
        super().__init__()
        self.original = original
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        return self.original(hidden_states) * (1 + torch.tanh(self.gate(hidden_states)))


class Clamped(nn.Linear):
    """A linear layer by its class, which does more than one."""

    def __init__(self, original, limit=0.5):
        super().__init__(original.in_features, original.out_features, bias=original.bias is not None)
        self.limit = limit

    def adopt(self, original):
        self.weight.copy_(original.weight)

    def forward(self, input):
        return super().forward(input).clamp(-self.limit, self.limit)


class Reader(nn.Module):
    """Reads the matrix of the linear layer that it holds, instead of calling it."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return F.linear(hidden_states, self.original.weight) * 0.5


class DoubleRMSNorm(nn.Module):
    """A norm by its name, which does more than one."""

    def __init__(self, original):
        super().__init__()
        self.original = original
        self.weight = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, hidden_states):
        return self.original(hidden_states) * self.weight


class Masked(nn.Module):
    """Has a tensor of a name that a server takes for a mask of old."""

    def __init__(self, original, config):
        super().__init__()
        self.original = original
        self.attn = nn.Module()
        self.attn.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden_states):
        return self.original(hidden_states) + self.attn.bias
