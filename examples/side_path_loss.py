"""A loss term of your own: a function whose parameters say what it wants to see."""

import torch


def near_one(model: torch.nn.Module, parameters: str) -> torch.Tensor:
    """The squared distance of some parameters from 1. It asks for no data, so it counts once per optimizer step."""
    chosen = [p for name, p in model.named_parameters() if name.endswith(parameters) and p.requires_grad]
    return torch.stack([(p.float() - 1).square().sum() for p in chosen]).sum()
