"""Modules that take weights over once, at surgery."""

import torch
from torch import nn


class LowRank(nn.Module):
    """A linear layer as the product of two thin ones, by its singular values (the best of that rank)."""

    def __init__(self, original, rank=8):
        super().__init__()
        self.down = nn.Linear(original.in_features, rank, bias=False)
        self.up = nn.Linear(rank, original.out_features, bias=False)

    def adopt(self, original):
        u, s, v = torch.linalg.svd(original.weight.float(), full_matrices=False)
        rank = self.down.out_features
        self.down.weight.copy_(v[:rank])
        self.up.weight.copy_(u[:, :rank] * s[:rank])

    def forward(self, x):
        return self.up(self.down(x))


class Scribbling(nn.Module):
    """Wraps experts, and writes into what it wraps."""

    def __init__(self, original):
        super().__init__()
        self.original = original

    def adopt(self, original):
        original.experts.gate_up_proj.zero_()

    def forward(self, hidden_states):
        return self.original(hidden_states)
