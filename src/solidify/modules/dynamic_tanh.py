"""A norm gives way to a squashed, fixed scale: DynamicTanh (arXiv 2503.10622), or to a scale alone, by a taper.

With x the features of a token, N the norm that stood there, and t the taper:

    D(x) = weight * tanh(alpha x) + bias        or, with `function: identity`, weight * alpha x + bias
    y    = (1 - t) N(x) + t D(x)

t = 0 is the original bit for bit, t = 1 needs no statistics of a token. What the norm computes is not assumed but
measured once, at surgery: with u a token of mean zero and root mean square one, N(u) and N(-u) give its gain g and its
bias b, whatever the family makes of its weight (Gemma: 1 + weight). Then, with a the `steepness` and r the `input_rms`,

    alpha = a / r,    weight = g / a,    bias = b

so that at zero D has the slope g / r that N has for a token of root mean square r; `identity` has it everywhere. (The
paper, which trains from scratch, starts with weight = 1.) alpha is one number, trained like weight and bias.

What r is, differs from layer to layer. While `calibrating` is True a forward pass sets alpha from what it is given, r
being the median over tokens of their root mean squares (some tokens are larger by orders of magnitude):

    norms = [module for module in model.modules() if hasattr(module, "calibrating")]
    for module in norms: module.calibrating = True
    model(**batch)
    for module in norms: module.calibrating = False

`taper` is a buffer and travels with the weights, and with an adapter. In a recipe the term `solidify.losses:ramp` moves
it (`buffers: "**.taper"`), one norm after another or all at once, and so does a training loop; while it is 0 neither
alpha nor weight has a gradient. (PEFT keeps what it trains in full twice, and `original_module` is the base's.)

    for name, module in model.named_modules():
        if hasattr(module, "taper") and "original_module" not in name:
            module.taper.fill_(min(1.0, step / taper_steps))

While `bypass` is True the layer is the norm. Built with `taper: 1.0` it has none within it: by such a one an earlier
DynamicTanh is replaced whose taper is over; alpha, weight and bias are taken over.

Shapes: alpha (1,), weight and bias (features,), features being the last axis of what it is given.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import torch
from torch import nn

FUNCTIONS = ("tanh", "identity")
AMPLITUDE = 16.0  # of the tokens by which a norm is measured: beside it no norm's epsilon counts


class DynamicTanh(nn.Module):
    """Stands where a norm stood, mixes it with a squashed scale by `taper`, and is that alone once the taper is 1.

    Raises:
        ValueError: the original is no norm with a weight for each feature, or an argument is out of its range.
    """

    taper: torch.Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        original: nn.Module,
        taper: float = 0.0,
        function: str = "tanh",
        steepness: float = 0.5,
        input_rms: float = 1.0,
    ) -> None:
        super().__init__()
        weight = dict(original.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.ndim != 1:
            kind = type(original).__name__
            raise ValueError(
                f"DynamicTanh takes the place of a norm with a weight for each feature, but not of a {kind}"
            )
        if function not in FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, but is {function!r}")
        if not 0.0 <= taper <= 1.0 or steepness <= 0 or input_rms <= 0:
            raise ValueError(
                "taper must be from 0 to 1, steepness and input_rms above 0, but they are "
                f"{taper}, {steepness} and {input_rms}"
            )
        if taper < 1.0 and _is_tapered(original):
            raise ValueError(f"this {type(original).__name__} is no norm any more; replace it with `taper: 1.0`")
        self.function = function
        self.steepness = steepness if function == "tanh" else 1.0
        self.input_rms = input_rms
        self.alpha = nn.Parameter(torch.full((1,), self.steepness / input_rms, dtype=weight.dtype))
        self.weight = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype))
        has_bias = getattr(original, "bias", None) is not None
        self.register_parameter("bias", nn.Parameter(torch.empty_like(self.weight)) if has_bias else None)
        self.norm = original if taper < 1.0 else None
        if self.norm is not None:
            self.bypass = False
        start = torch.tensor(float(taper), dtype=torch.float32) if taper < 1.0 else None
        self.register_buffer("taper", start)
        self.calibrating = False

    def adopt(self, original: nn.Module) -> None:
        """Measures the norm's gain and bias; of an earlier DynamicTanh takes over what it learned."""
        if self.weight.is_meta:
            return
        if _is_tapered(original):
            taken = dict(original.named_parameters(recurse=False))
            for name, parameter in self.named_parameters(recurse=False):
                parameter.copy_(taken[name])
            return
        gain, bias = measure(original)
        self.weight.copy_(gain / self.steepness)
        if self.bias is not None:
            self.bias.copy_(bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (..., features) to the same shape."""
        if self.calibrating:
            self._calibrate(hidden_states)
        if self.norm is not None and self.bypass:
            bypassed: torch.Tensor = self.norm(hidden_states)
            return bypassed
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        scaled = self.alpha.to(wide) * hidden_states.to(wide)
        outputs = self.weight.to(wide) * (scaled.tanh() if self.function == "tanh" else scaled)
        if self.bias is not None:
            outputs = outputs + self.bias.to(wide)
        if self.norm is None or self.taper is None:
            return outputs.to(hidden_states.dtype)
        normed: torch.Tensor = self.norm(hidden_states)
        return torch.lerp(normed.to(wide), outputs, self.taper.to(wide)).to(normed.dtype)

    @torch.no_grad()
    def _calibrate(self, hidden_states: torch.Tensor) -> None:
        sizes = hidden_states.float().square().mean(-1).sqrt().flatten()
        sizes = sizes[sizes > 0]
        if len(sizes):
            self.alpha.fill_(self.steepness / float(sizes.median()))

    def extra_repr(self) -> str:
        """Says how large the layer is and what it squashes by."""
        return f"{tuple(self.weight.shape)}, function={self.function}"


@torch.no_grad()
def measure(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gain and the bias (features,) of a norm, read off what it makes of a token and of its negative.

    Raises:
        ValueError: it cannot be called with hidden states alone, or its output grows with what it is given.
    """
    weight = norm.get_parameter("weight")
    signs = torch.ones(weight.shape, dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1.0
    token = AMPLITUDE * signs[None, None]
    try:
        plus, minus, larger = norm(token), norm(-token), norm(4 * token)
    except Exception as error:
        raise ValueError(f"{type(norm).__name__} is not called as a norm: {error}") from error
    difference = float((larger - plus).double().norm())
    if plus.shape != token.shape or not difference <= 0.02 * float(plus.double().norm()):
        raise ValueError(f"{type(norm).__name__} is no norm: a token four times as large gives something else")
    plus, minus = (made[0, 0].to(torch.promote_types(weight.dtype, torch.float32)) for made in (plus, minus))
    return (plus - minus) / 2 * signs, (plus + minus) / 2


def _is_tapered(original: nn.Module) -> bool:
    """Returns whether a module is a DynamicTanh, also one from an artifact, whose class is another."""
    return {"alpha", "weight"} <= dict(original.named_parameters(recurse=False)).keys()
