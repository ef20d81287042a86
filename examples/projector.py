"""What carries image features into a language model. The file is copied into the artifact, so it imports torch only."""

import torch
from torch import nn


class GatedProjector(nn.Module):
    """`down(silu(gate(x)) · up(x))` (SwiGLU, arXiv 2002.05202) in place of LLaVA's two linear layers.

    It shares no tensor with what it replaces, so images mean nothing to the language model until it is trained.
    """

    def __init__(self, original: nn.Module, width: int = 4096):
        super().__init__()
        self.gate = nn.Linear(original.linear_1.in_features, width)
        self.up = nn.Linear(original.linear_1.in_features, width)
        self.down = nn.Linear(width, original.linear_2.out_features)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(image_features)) * self.up(image_features))
