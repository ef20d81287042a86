"""In what precision loss terms compute."""

from __future__ import annotations

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in float32, or as it is where it is wider; half precision is for models, not for losses."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
