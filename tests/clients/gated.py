"""A feed-forward as users write it: one file, torch only."""

import torch
from torch import nn


class GatedIntermediate(nn.Module):
    """The first half of a BERT feed-forward, its activation multiplied by a learned gate. Keeps the old weights."""

    def __init__(self, original):
        super().__init__()
        self.dense = original.dense
        self.intermediate_act_fn = original.intermediate_act_fn
        self.gate = nn.Linear(original.dense.in_features, original.dense.out_features)

    def forward(self, hidden_states):
        activation = self.intermediate_act_fn(self.dense(hidden_states))
        return activation * 2 * torch.sigmoid(self.gate(hidden_states))
