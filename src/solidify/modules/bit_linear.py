"""A linear layer with ternary weights and 8-bit activations, trained through its rounding: BitNet b1.58.

With W the full-precision weight and x one token's features (arXiv 2402.17764, eq. 1-3; activations as in its code):

    g  = mean |W|,                 W_q = g clip(round(W / g), -1, 1)
    s  = 127 / max |x|,            x_q = clip(round(s x), -128, 127) / s
    y  = x_q W_q^T + b

Rounding counts as the identity in the backward pass (straight-through). With `norm` a SubLN stands before it, an
RMSNorm of its own weight, as BitDistill (arXiv 2510.13998) puts before the output projections of attention and
feed-forward; elsewhere a norm stands before the layer already. A pretrained layer is used to the size of what it is
given, so that the SubLN's weight starts at `input_rms`, or at what is measured while `calibrating` is True (of four
feed-forwards of SmolLM2-135M, rounded at once: loss 3.49 before, 6.47 with a weight of one, 3.79 calibrated):

    layers = [module for module in model.modules() if hasattr(module, "calibrating")]
    for module in layers: module.calibrating = True
    model(**batch)
    for module in layers: module.calibrating = False

`strength` t says how much of this is done: x and W are moved by the share t from what they were to what they become,
z + t (z_q - z), and the SubLN likewise. 0 is the original layer, bit for bit; 1 is the layer above. It is a buffer and
travels with the weights, and with an adapter. A training loop ramps it (PEFT keeps what it trains in full twice, and
`original_module` is the base's):

    for name, module in model.named_modules():
        if hasattr(module, "strength") and "original_module" not in name:
            module.strength.fill_(min(1.0, step / warmup_steps))

Rounding makes steps out of what is smaller than any step: where two ways to compute the same input (with the cache and
without it, alone and in a batch) round differently in the last digit, a value that lies between two of the 255 levels
may fall onto the one or the other. A model that is rounded all at once and not yet trained enlarges this from layer to
layer; in half precision surgery may then refuse it. Start such a model at `strength: 0.0` and ramp it. For the same
reason a gradient depends on how a batch is split, more than rounding of float32 does (0.7 % with four such layers).
`activation_bits` says how fine the levels are; None leaves activations as they are.

The layer keeps its full-precision weight, under its own name and in its own layout: (out_features, in_features), of a
Conv1D (in_features, out_features). It is no nn.Linear, because LoRA beside the rounded weight could not be merged into
it: train it in full, or by LoRA on the parameter (`target_parameters: [model.layers.*.mlp.down_proj.weight]`), which
rounds the sum. While `bypass` is True nothing is rounded: it is the original layer with the weight that it has.

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

SMALLEST = 1e-5  # no scale is smaller, as in the paper's code: what is all zeros stays zero


class SubLN(nn.Module):
    """RMSNorm over the features before they are rounded. `weight` is (in_features,) and starts at `size`."""

    def __init__(self, in_features: int, size: float, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((in_features,), float(size), dtype=dtype))
        self.eps = eps

    @torch.no_grad()
    def calibrate(self, hidden_states: torch.Tensor) -> None:
        """Sets the weight to the median over tokens of their root mean squares."""
        sizes = hidden_states.float().square().mean(-1).sqrt().flatten()
        sizes = sizes[sizes > 0]
        if len(sizes):
            self.weight.fill_(float(sizes.median()))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to the same shape."""
        wide = hidden_states.to(_find_wide(hidden_states))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        normed: torch.Tensor = self.weight * scaled.to(hidden_states.dtype)
        return normed


class BitLinear(nn.Module):
    """Takes over the weight and the bias of an `nn.Linear` or `Conv1D` and rounds both sides of its product.

    Raises:
        ValueError: the original is another module, is quantised already, or an argument is out of its range.
    """

    strength: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        original: nn.Module,
        strength: float = 1.0,
        norm: bool = False,
        activation_bits: int | None = 8,
        input_rms: float = 1.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if type(original).forward not in (nn.Linear.forward, Conv1D.forward):
            raise ValueError(
                f"BitLinear takes the place of a Linear or Conv1D, but this is a {type(original).__name__}"
            )
        if not 0.0 <= strength <= 1.0:
            raise ValueError(f"strength must be from 0 (the original) to 1 (all rounded), but is {strength}")
        if activation_bits is not None and not 2 <= activation_bits <= 16:
            raise ValueError(f"activation_bits must be from 2 to 16, or null for none, but is {activation_bits}")
        if input_rms <= 0:
            raise ValueError(f"input_rms must be above 0, but is {input_rms}")
        weight = original.get_parameter("weight")
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"the weight of this {type(original).__name__} is quantised already ({weight.dtype})")
        self.transposed = isinstance(original, Conv1D)
        self.in_features, self.out_features = weight.shape if self.transposed else weight.shape[::-1]
        self.activation_bits = activation_bits
        self.weight = weight
        self.register_parameter("bias", original.get_parameter("bias") if original.bias is not None else None)
        self.norm = SubLN(self.in_features, input_rms, eps, weight.dtype) if norm else None
        self.register_buffer("strength", torch.tensor(float(strength), dtype=torch.float32))
        self.bypass = False
        self.calibrating = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        if self.calibrating and self.norm is not None:
            self.norm.calibrate(hidden_states)
        if self.bypass:
            return self._multiply(hidden_states, self.weight)
        share = self.strength.to(_find_wide(hidden_states))
        if self.norm is not None:
            hidden_states = (1 - share) * hidden_states + share * self.norm(hidden_states)
        states = hidden_states
        if self.activation_bits is not None:
            states = _move(hidden_states, round_activations(hidden_states.detach(), self.activation_bits), share)
        return self._multiply(states, _move(self.weight, round_weight(self.weight.detach()), share))

    def _multiply(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not self.transposed:
            return F.linear(states, weight, self.bias)
        assert self.bias is not None  # a Conv1D always has one
        flat = torch.addmm(self.bias, states.reshape(-1, self.in_features), weight)  # as Conv1D does, bit for bit
        return flat.view(*states.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Says how large the layer is and how it rounds."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.activation_bits}"


def round_weight(weight: torch.Tensor) -> torch.Tensor:
    """Returns the nearest of -g, 0 and g for every weight, g their mean size."""
    wide = weight.to(_find_wide(weight))
    scale = 1.0 / wide.abs().mean().clamp(min=SMALLEST)
    rounded: torch.Tensor = (wide * scale).round().clamp(-1, 1) / scale
    return rounded.to(weight.dtype)


def round_activations(hidden_states: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Returns the nearest level for every feature of a token, the largest of which stands on the last level."""
    levels = 2 ** (bits - 1)
    wide = hidden_states.to(_find_wide(hidden_states))
    scale = (levels - 1) / wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    rounded: torch.Tensor = (wide * scale).round().clamp(-levels, levels - 1) / scale
    return rounded.to(hidden_states.dtype)


def _move(value: torch.Tensor, rounded: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Moves a value by a share of the way to what it is rounded to, exact at both ends; the gradient is its own."""
    moved = torch.lerp(value.detach().to(share.dtype), rounded.to(share.dtype), share).to(value.dtype)
    return moved + (value - value.detach())


def _find_wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
