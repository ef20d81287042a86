"""Multi-head latent attention: keys and values of all heads come from one short vector a token.

    c = x W_down                           (batch_size, sequence_length, rank), the latent
    k = c W_k + b_k,  v = c W_v + b_v      in place of the original's two projections of x

The factors are the singular value decomposition of both projections' matrices, one above the other (TransMLA, arXiv
2502.07864, and MHA2MLA, arXiv 2502.14837, do so after steps for rotary positions, which are not needed here). Of all
latents of a rank these lose least: the squares of the singular values after the first `rank`. At full rank, which is
the smaller of `hidden_size` and the width of keys and values together, nothing is lost but rounding.

Norms and positions of keys come after `W_k`, as they came after the original's projection; so every family is computed
exactly, with rotary positions or without. The cache is transformers' own and holds keys and values: with c in their
place it would hold `rank` numbers a token, which is a later step. Parameters are saved where
`rank * (hidden_size + width) < hidden_size * width`.

The original's own forward runs, with these projections in it; all of its other modules keep their names.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn


class LatentAttention(nn.Module):
    """Takes over an attention but for `k_proj` and `v_proj`, which become `kv_down`, `k_up` and `v_up`.

    `rank` is the latent's width; without it, the full one. Where queries, keys and values are one projection (`c_attn`
    of GPT-2), its part for the queries becomes `q_proj`. An attention with neither is refused.
    """

    def __init__(self, original: nn.Module, rank: int | None = None) -> None:
        super().__init__()
        with torch.no_grad():
            query, key, value = split(original)
        take_over(self, original, without=("k_proj", "v_proj", "c_attn"))
        self.latent_kind = type(original)
        self.latent_inner = Inner(original)
        (key_size, hidden_size), value_size = key[0].shape, value[0].shape[0]
        full = min(hidden_size, key_size + value_size)
        rank = full if rank is None else rank
        if not 1 <= rank <= full:
            raise ValueError(
                f"rank must be between 1 and {full}, the full one of {type(original).__name__}, but is {rank}"
            )
        self.kv_down = nn.Linear(hidden_size, rank, bias=False)
        self.k_up = nn.Linear(rank, key_size, bias=key[1] is not None)
        self.v_up = nn.Linear(rank, value_size, bias=value[1] is not None)
        if query is not None:
            self.q_proj = nn.Linear(hidden_size, query[0].shape[0], bias=query[1] is not None)

    def adopt(self, original: nn.Module) -> None:
        """Factors the original's projections of keys and values, in float64."""
        query, key, value = split(original)
        left, strengths, right = torch.linalg.svd(torch.cat([key[0], value[0]]).double(), full_matrices=False)
        rank = self.kv_down.out_features
        root = strengths[:rank].sqrt()
        self.kv_down.weight.copy_(root[:, None] * right[:rank])
        up = left[:, :rank] * root
        fill(self.k_up, up[: len(key[0])], key[1])
        fill(self.v_up, up[len(key[0]) :], value[1])
        if query is not None:
            fill(self.q_proj, *query)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps (batch_size, sequence_length, hidden_size) to what the original returns."""
        made: list[tuple[torch.Tensor, torch.Tensor]] = []

        def down(x: torch.Tensor) -> torch.Tensor:
            """Makes the latent of what keys and values are asked of: not the queries' states in attention across."""
            if not made or made[0][0] is not x:
                made[:] = [(x, self.kv_down(x))]
            return made[0][1]

        view = as_original(self, self.latent_kind, self.latent_inner)
        vars(view)["k_proj"] = lambda x: self.k_up(down(x))
        vars(view)["v_proj"] = lambda x: self.v_up(down(x))
        vars(view)["c_attn"] = lambda x: torch.cat([self.q_proj(x), self.k_up(down(x)), self.v_up(down(x))], dim=-1)
        return self.latent_kind.forward(view, hidden_states, *args, **kwargs)


Projection = tuple[torch.Tensor, torch.Tensor | None]  # a matrix (out, in) and a bias (out,)


def split(original: nn.Module) -> tuple[Projection | None, Projection, Projection]:
    """Returns the projections of queries (None where it has a module of its own), of keys and of values."""
    children = dict(original.named_children())
    key, value = children.get("k_proj"), children.get("v_proj")
    if isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
        return None, (key.weight, key.bias), (value.weight, value.bias)
    fused = children.get("c_attn")
    weight = None if fused is None else fused.get_parameter("weight").T
    if fused is None or weight is None or "q_attn" in children or weight.shape[0] != 3 * weight.shape[1]:
        raise ValueError(
            "LatentAttention needs an attention with linear layers k_proj and v_proj, or with c_attn for queries, keys "
            f"and values, but {type(original).__name__} consists of: {', '.join(children) or 'no modules'}"
        )
    query, key_part, value_part = zip(weight.chunk(3), fused.get_parameter("bias").chunk(3), strict=True)
    return query, key_part, value_part


def fill(layer: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Copies a matrix and a bias into a linear layer, in its dtype."""
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)


class Inner(nn.Module):
    """Holds the `bypass` of the module that was taken over, if it has one, beside that of the new one."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.bypass = bool(getattr(original, "bypass", False))


def take_over(module: nn.Module, original: nn.Module, without: Collection[str] = ()) -> None:
    """Gives a module what the original has, `without` some modules: under their own names, and its plain attributes."""
    saved = original.state_dict(keep_vars=True)
    for name, value in vars(original).items():
        if name not in (*vars(nn.Module()), "forward", "bypass"):  # torch's tables, a dispatcher's wrap, and `Inner`'s
            setattr(module, name, value)
    for name, child in original.named_children():
        if name not in without:
            module.add_module(name, child)
    for name, parameter in original.named_parameters(recurse=False):
        module.register_parameter(name, parameter)
    for name, buffer in original.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=name in saved)


def as_original(module: nn.Module, kind: type[nn.Module], inner: nn.Module) -> nn.Module:
    """Returns the module seen as one of the original's class: a shallow copy, whose attributes may be set for one call.

    It is made for every call, because adapters replace modules by name after this one was built.
    """
    view = object.__new__(kind)
    vars(view).update(vars(module))
    vars(view)["bypass"] = vars(inner)["bypass"]
    return view
