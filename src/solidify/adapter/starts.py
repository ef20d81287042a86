"""Starts of low-rank updates that PEFT takes out of the base's weights; here the base keeps its weights.

PiSSA and OLoRA start with an update that is not zero. PEFT (0.21.2) subtracts it from the base, which is then another
one. Here it is subtracted beside the base: an update has twice the rank, its first half (A, B) is trained, its second
(A0, -B0) stays what training started with. To PEFT that is one plain LoRA layer, and so it is saved, loaded and merged.
A0 and B0 are made by PEFT itself, on a copy of the weight, one layer after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from solidify.adapter import lookup
from solidify.errors import AdapterError, refuse
from solidify.system import foreign

_SCRATCH = "start"


class StartedFactor(nn.Module):
    """A factor of a low-rank update, of which half of the rank is trained and half keeps its start.

    `weight` is both, as PEFT reads it: (2r, in) of an A, (out, 2r) of a B. The module's state holds that alone.
    """

    start: torch.Tensor

    def __init__(self, trained: torch.Tensor, start: torch.Tensor, *, dim: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.dim = dim
        self.trained = nn.Parameter(trained)
        self.bias = bias
        self.register_buffer("start", start, persistent=False)
        self.register_state_dict_post_hook(_join_halves)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split_halves)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> torch.Tensor:
        """Both halves, as one matrix."""
        return torch.cat([self.trained, self.start], dim=self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies (..., in) as `nn.Linear` does."""
        return F.linear(x, self.weight, self.bias)


def _join_halves(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(module, StartedFactor)
    state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}trained"), module.start], dim=module.dim)


def _split_halves(module: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    assert isinstance(module, StartedFactor)
    weight = state.pop(f"{prefix}weight", None)
    if weight is None:
        return
    rank = module.trained.shape[module.dim]
    if weight.shape != module.weight.shape:
        state[f"{prefix}trained"] = weight  # PyTorch says that it does not fit
        return
    state[f"{prefix}trained"] = weight.narrow(module.dim, 0, rank)
    with torch.no_grad():
        module.start.copy_(weight.narrow(module.dim, rank, rank))


def doubled(configuration: LoraConfig) -> LoraConfig:
    """Returns a configuration, changed in place, with twice the rank and the same scale, of plain LoRA."""
    by = math.sqrt(2) if configuration.use_rslora else 2
    configuration.r *= 2
    configuration.lora_alpha *= by
    configuration.rank_pattern = {key: 2 * rank for key, rank in (configuration.rank_pattern or {}).items()}
    configuration.alpha_pattern = {key: by * alpha for key, alpha in (configuration.alpha_pattern or {}).items()}
    return configuration


def begin(
    model: PeftModel,
    adapter: str,
    start: str,
    prepared: Mapping[str, tuple[str, Any]] = MappingProxyType({}),
    **settings: Any,
) -> None:
    """Gives a plain adapter, which was just attached with `doubled` ranks, its start in place.

    `prepared` maps names of targets to the attribute that PEFT's start reads from a layer, and its value; `settings`
    are fields of LoraConfig that belong to the start.

    Raises:
        AdapterError: PEFT cannot make such a start of a layer, its rank is too large, or the start is not finite.
    """
    faults = []
    for path, layer in layers(model, adapter):
        rank = layer.r[adapter] // 2
        name = lookup.canonical(model, path)
        config = LoraConfig(r=rank, lora_alpha=layer.scaling[adapter] * rank, init_lora_weights=start, **settings)
        a, b = _make_start(layer, config, prepared.get(name))
        if len(a) < rank:
            faults.append(
                f"LoRA: {name} starts with {len(a)} directions by {start!r}, which is less than its rank {rank}"
            )
        elif not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            faults.append(f"LoRA: the start {start!r} of {name} holds NaN or infinity; take another one")
        else:
            _put_factors(layer, adapter, a, b)
    refuse(AdapterError, "the adapter cannot start as declared", faults)


def follow(model: nn.Module, adapter: str, other: str) -> None:
    """Gives an adapter factors like another's, with the same frozen start, where that has such.

    TRL makes its reference so: an adapter of the same configuration, into which it copies parameters by name.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or other not in layer.lora_A or adapter not in layer.lora_A:
            continue
        if not isinstance(layer.lora_A[other], StartedFactor):
            continue
        a, b = (factors[other] for factors in (layer.lora_A, layer.lora_B))
        _put_factors(layer, adapter, a.start.clone(), -b.start)


def has_any(model: nn.Module) -> bool:
    """Returns whether some factor keeps its start beside it."""
    return any(isinstance(module, StartedFactor) for module in model.modules())


def layers(model: PeftModel, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yields the layers that have an adapter's low-rank update with factors A and B, with their paths in the model."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            yield path, module


def _make_start(layer: Any, config: LoraConfig, prepared: tuple[str, Any] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Has PEFT make A0 (r, in) and B0 (out, r), on a layer of its own that has a copy of the weight."""
    base = layer.get_base_layer()
    weight = base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()
    rows, columns = weight.shape
    alone = nn.Linear(columns, rows, bias=False, device="meta")
    copy = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # PEFT would round the factors
    alone.weight = nn.Parameter(copy, requires_grad=False)
    if prepared is not None:
        setattr(alone, *prepared)
    refused = foreign.calling(f"PEFT cannot start by {config.init_lora_weights!r}", AdapterError)
    with refused, torch.no_grad():
        made = Linear(alone, _SCRATCH, config, r=config.r, lora_alpha=config.lora_alpha)
    return made.lora_A[_SCRATCH].weight.detach(), made.lora_B[_SCRATCH].weight.detach()


def _put_factors(layer: Any, adapter: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Puts factors in the place of plain ones, whose dtype, device and bias they keep."""
    plain_a, plain_b = layer.lora_A[adapter], layer.lora_B[adapter]
    like = plain_a.weight
    a, b = (factor.to(like.device, like.dtype).contiguous() for factor in (a, b))
    layer.lora_A[adapter] = StartedFactor(a, a.clone(), dim=0, bias=None)
    layer.lora_B[adapter] = StartedFactor(b, -b, dim=1, bias=plain_b.bias)
    for factors in (layer.lora_A, layer.lora_B):
        factors[adapter].trained.requires_grad_(like.requires_grad)
