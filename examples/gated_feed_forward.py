"""A feed-forward of a language model with a gate on what it returns."""

import torch
from torch import nn


class GatedFeedForward(nn.Module):
    """Scales what the feed-forward returns by a number of each token, between 0 and 2. Starts as the identity."""

    def __init__(self, original, config):
        super().__init__()
        self.inner = original
        self.gate = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, hidden_states):
        return self.inner(hidden_states) * 2 * torch.sigmoid(self.gate(hidden_states))
