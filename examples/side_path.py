"""A linear layer with a narrow path beside it. The file is copied into the artifact, so it imports torch only."""

import torch
from torch import nn
from torch.nn import functional as F


class SidePath(nn.Module):
    """`W x + scale · up(gelu(down(x)))`; `up` starts at zero, so the model starts where it was (arXiv 1902.00751)."""

    def __init__(self, original: nn.Linear, width: int = 16):
        super().__init__()
        self.weight = original.weight  # keeps its name, so the base's tensors keep theirs
        self.down = nn.Linear(original.in_features, width, bias=False)
        self.up = nn.Linear(width, original.out_features, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.scale * self.up(F.gelu(self.down(x)))
