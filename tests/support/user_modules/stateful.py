"""Modules that keep state of their own in the cache: a sum, a convolution, both beside keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def kept(mask: Any, length: int, past: int) -> torch.Tensor | None:
    """Returns which of the new positions are no padding: on the diagonal of a mask, padding does not see itself."""
    if mask is None:
        return None
    start = min(past, mask.shape[-1] - length)  # a static cache's masks are as wide as it may become
    if mask.ndim == 2:
        return mask[:, start : start + length].bool()
    own = mask[:, 0, :, start : start + length].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


class RunningSum(nn.Module):
    """Every position gets a decayed sum of all that came before it: y_i = h_i, h_i = decay h_(i-1) + W x_i."""

    layer_type = "linear_attention"

    def __init__(self, config: Any, layer_idx: int, decay: float = 0.9) -> None:
        super().__init__()
        self.layer_idx, self.decay = layer_idx, decay
        self.inward = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        x = self.inward(hidden_states)
        past_key_values = getattr(past_key_values, "self_attention_cache", past_key_values)
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        keep = kept(attention_mask, x.shape[1], past)
        if keep is not None:
            x = x * keep[..., None]
        state = past_key_values.get_recurrent_state(self.layer_idx) if past_key_values is not None else None
        state = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state
        outputs = []
        for position in x.unbind(1):
            state = self.decay * state + position
            outputs.append(state)
        if past_key_values is not None:
            past_key_values.update_recurrent_state(state, self.layer_idx)
        return self.out(torch.stack(outputs, 1)), None


class ShortConvolution(nn.Module):
    """A causal convolution over three positions; the last two of a text are kept."""

    layer_type = "conv"

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.convolution = nn.Conv1d(config.hidden_size, config.hidden_size, 3, groups=config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        x, length = hidden_states.transpose(1, 2), hidden_states.shape[1]
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        keep = kept(attention_mask, length, past)
        if keep is not None:
            x = x * keep[:, None]
        if past_key_values is not None:
            x = past_key_values.update_conv_state(x, self.layer_idx, conv_kernel_size=2)
        x = F.pad(x, (max(0, length + 2 - x.shape[-1]), 0))[..., -length - 2 :]
        return self.convolution(x).transpose(1, 2), None


class SummedAttention(nn.Module):
    """The original attention, whose keys and values are cached as ever, and a running sum beside it."""

    layer_type = "hybrid"

    def __init__(self, config: Any, layer_idx: int, original: nn.Module) -> None:
        super().__init__()
        self.layer_idx, self.original = layer_idx, original
        self.beside = RunningSum(config, layer_idx)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        options = {key: kwargs.get(key) for key in ("attention_mask", "past_key_values")}
        beside = self.beside(hidden_states, **options)[0]  # first: the attention's update moves the length on
        output, *rest = self.original(hidden_states, **kwargs)
        return output + beside, *rest
