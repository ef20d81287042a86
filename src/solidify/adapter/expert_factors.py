"""LoRA on fused experts run through its factors, grouped by expert; no update of the size of the weights is built.

PEFT (0.21.2, `tuners/lora/layer.py`, `ParamWrapper`) adds the update to the weights of all experts in every forward
pass and makes a gradient of their size in every backward pass, however few tokens there are. Here a token's way is
`x W' + s (x A') B'` with the A and B of its expert: what is computed and held grows with the tokens. Parameters, names
and files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn

from solidify.errors import AdapterError
from solidify.upstream.torch import own_parameters
from solidify.upstream.transformers import apply_gate, is_split_by_experts

_TAKEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BUILT: ContextVar[bool] = ContextVar("built", default=False)


class Update(NamedTuple):
    """One adapter's part in a parameter: PEFT's matrices (experts * r, in) and (out, r * experts), and the scale."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def factor_experts(model: nn.Module) -> nn.Module:
    """Runs low-rank updates of fused experts through their factors, in place, and returns the model.

    It may be a model of `attach` or `load_adapter`, or PEFT's own. Outputs and gradients are PEFT's up to rounding.
    Experts whose class does not follow transformers' interface of experts implementations, quantised ones, and merged
    adapters run as PEFT runs them.

    Raises:
        AdapterError: no low-rank update of the model is one of fused experts.
    """
    if not factor_if_any(model):
        raise AdapterError(
            "no low-rank update of the model is one of fused experts that can be run by their factors; attach LoRA "
            "with `target_parameters` that name them (`**.experts.gate_up_proj`)"
        )
    return model


def factor_if_any(model: nn.Module) -> int:
    """Does what `factor_experts` does, where there is something to run so; returns how many updates there are."""
    found = [module for module in model.modules() if type(module) in (PeftParamWrapper, ParamWrapper)]
    count = sum(_can_run(_chain(module)) for module in found)
    for module in found if count else ():
        module.__class__ = ParamWrapper
    return count


@contextmanager
def built() -> Iterator[None]:
    """While the block lasts, every update is built as PEFT builds it: for comparisons bit for bit."""
    token = _BUILT.set(True)
    try:
        yield
    finally:
        _BUILT.reset(token)


class ParamWrapper(PeftParamWrapper):  # type: ignore[misc]
    """PEFT's layer, by whose name PEFT knows it, which hands the factors to the experts instead of a sum."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Takes and returns what the experts do: (tokens, hidden_size), and their routing."""
        layers = _chain(self)
        if _BUILT.get() or kwargs.get("adapter_names") is not None or not _can_run(layers):
            found: torch.Tensor = super().forward(x, *args, **kwargs)
            return found
        experts = layers[-1].base_layer
        updates = {layer.parameter_name: _active_updates(layer) for layer in layers}
        if not any(updates.values()):
            result: torch.Tensor = experts(x, *args, **kwargs)
            return result
        # A forward of the module itself, and not of its class: called as ever, with its hooks.
        experts.forward = partial(_run_experts, experts, updates)
        try:
            moved: torch.Tensor = experts(x, *args, **kwargs)
            return moved
        finally:
            del experts.forward


def _chain(layer: Any) -> list[Any]:
    """Returns the wrappers around one module of experts, the outermost first; one for each parameter."""
    layers = [layer]
    while isinstance(layers[-1].base_layer, PeftParamWrapper):
        layers.append(layers[-1].base_layer)
    return layers


def _can_run(layers: Sequence[Any]) -> bool:
    """Returns whether the experts inside some wrappers are called in the way that is written here."""
    experts = layers[-1].base_layer
    parameters = own_parameters(experts)
    return (
        is_split_by_experts(experts)
        and "forward" not in vars(experts)
        and not any(layer.merged for layer in layers)
        and all(
            p is not None and type(p) is nn.Parameter and p.ndim == 3 and len(p) > 1 and p.dtype in _TAKEN
            for p in (parameters.get(layer.parameter_name) for layer in layers)
        )
    )


def _active_updates(layer: Any) -> list[Update]:
    """Returns what the adapters that are switched on add to a layer's parameter."""
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    return [Update(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names]


def _run_experts(
    experts: Any,
    updates: Mapping[str, Sequence[Update]],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Does what transformers' experts implementations do (5.23, `integrations/moe.py`), with updates of the weights.

    (tokens, hidden_size), (tokens, top_k) and (tokens, top_k) become (tokens, hidden_size).
    """
    slots = top_k_index.reshape(-1)
    order = torch.argsort(slots, stable=True)  # slots, expert by expert
    ends = torch.bincount(slots, minlength=experts.num_experts).cumsum(0)[: experts.num_experts].tolist()
    biases = slots[order].clamp(max=experts.num_experts - 1) if experts.has_bias else None

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        """Applies one parameter of the experts to (slots, in_features), sorted by expert."""
        flat = [tensor for update in updates.get(name, ()) for tensor in update[:2]]
        scales = [update.scale for update in updates.get(name, ())]
        out: torch.Tensor = _ExpertLinear.apply(  # type: ignore[no-untyped-call]
            x, experts.get_parameter(name), ends, experts.is_transposed, scales, *flat
        )
        return out if biases is None else out + experts.get_parameter(f"{name}_bias")[biases]

    inner = linear(hidden_states[order // top_k_index.shape[-1]], "gate_up_proj" if experts.has_gate else "up_proj")
    inner = apply_gate(experts, inner) if experts.has_gate else experts.act_fn(inner)
    outer = linear(inner, "down_proj")
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    weighted = outer * top_k_weights.reshape(-1)[order].unsqueeze(-1)  # (slots, hidden_size)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    summed = weighted[place].view(*top_k_index.shape, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


class _ExpertLinear(torch.autograd.Function):
    """`y = x W' + sum of s (x A') B'`, with the W, A and B of each row's expert; rows are sorted by expert.

    Of the weights nothing is built, in neither direction: a gradient of W is made only where W is trained. Products are
    computed in the dtype of W, under autocast too: PEFT updates W in that dtype, and autocast leaves grouped products,
    transformers' default for experts, alone (its `eager` and `batched_mm` would round W to autocast's dtype).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        ends: Sequence[int],
        transposed: bool,
        scales: Sequence[float],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        """Maps (rows, in_features) to (rows, out_features); rows behind the last end, of no expert, become 0."""
        with torch.autocast(x.device.type, enabled=False):
            rows, out = _multiply(x, weight, ends, transposed, scales, factors)
        ctx.save_for_backward(rows, weight, *factors)
        ctx.ends, ctx.transposed, ctx.scales, ctx.dtype = ends, transposed, scales, x.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of `x`, of the weight where it is trained, and of the factors."""
        rows, weight, *factors = ctx.saved_tensors
        with torch.autocast(rows.device.type, enabled=False):
            grad_x, grad_weight, made = _multiply_back(ctx, grad.to(weight.dtype).contiguous(), rows, weight, factors)
        flat = _flattened(made, factors)
        return (None if grad_x is None else grad_x.to(ctx.dtype), grad_weight, None, None, None, *flat)


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    ends: Sequence[int],
    transposed: bool,
    scales: Sequence[float],
    factors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `x` in the dtype of the weight, and the products: (rows, in_features) and (rows, out_features)."""
    rows = x.to(weight.dtype)
    stacks = _stacked(factors, len(weight), weight.dtype)
    out = rows.new_zeros(len(rows), weight.shape[2 if transposed else 1])
    for expert, part in _parts(ends):
        w = weight[expert] if transposed else weight[expert].T  # (in_features, out_features)
        torch.mm(rows[part], w, out=out[part])
        for (a, b), scale in zip(stacks, scales, strict=True):
            out[part].addmm_(rows[part] @ a[expert].T, b[expert].T, alpha=scale)
    return rows, out


def _multiply_back(
    ctx: Any, grad: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, factors: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Returns the gradients of the rows and of the weight, where they are asked for, and of each A and B by expert."""
    stacks = _stacked(factors, len(weight), weight.dtype)
    grad_x = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
    grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
    made = [(torch.zeros_like(a), torch.zeros_like(b)) for a, b in stacks]
    for expert, part in _parts(ctx.ends):
        w = weight[expert] if ctx.transposed else weight[expert].T
        if grad_x is not None:
            torch.mm(grad[part], w.T, out=grad_x[part])
        if grad_weight is not None:
            full = rows[part].T @ grad[part]
            grad_weight[expert] = full if ctx.transposed else full.T
        for (a, b), (grad_a, grad_b), scale in zip(stacks, made, ctx.scales, strict=True):
            back = scale * (grad[part] @ b[expert])  # (rows of the expert, rank)
            if grad_x is not None:
                grad_x[part].addmm_(back, a[expert])
            torch.mm(back.T, rows[part], out=grad_a[expert])
            grad_b[expert] = scale * (grad[part].T @ (rows[part] @ a[expert].T))
    return grad_x, grad_weight, made


def _parts(ends: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yields the experts that have rows, and which those are."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, slice(start, end)
        start = end


def _stacked(
    factors: Sequence[torch.Tensor], experts: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns pairs of PEFT's matrices by expert: (experts, rank, in_features) and (experts, out_features, rank)."""
    pairs = zip(factors[0::2], factors[1::2], strict=True)
    return [
        (
            a.to(dtype).reshape(experts, -1, a.shape[1]),
            b.to(dtype).reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous(),
        )
        for a, b in pairs
    ]


def _flattened(
    made: Sequence[tuple[torch.Tensor, torch.Tensor]], factors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Returns gradients by expert as those of PEFT's matrices."""
    flat = [t for a, b in made for t in (a, b.permute(1, 2, 0))]
    return [gradient.reshape(factor.shape).to(factor.dtype) for gradient, factor in zip(flat, factors, strict=True)]
