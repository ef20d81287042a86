"""Attention that is a softmax within a window and linear in the length beyond it, with learned feature maps.

For a query at position i, with `s_ij = scaling * q_i · k_j` (rotated as the original rotates them):

    window   j in (i - window, i]   w_ij = exp(s_ij)
    beyond   j <= i - window        w_ij = exp(a_i + b_j) phi_q(q_i) · phi_k(k_j)
    output   y_i = sum_j w_ij v_j / sum_j w_ij

`phi(x) = softmax([W x, -W x])` (2 feature_dim,) is learned for every head, `a_i = u · q_i + gate` and `b_j = t · k_j`
say how much the linear part counts. All of the past beyond the window fits into two sums for every key head,
`S = sum_j exp(b_j) phi_k(k_j) v_j^T` (2 feature_dim, head_dim) and `z = sum_j exp(b_j) phi_k(k_j)` (2 feature_dim,):
what a token costs does not depend on the length.

Papers: LoLCATs (arXiv 2410.10254: softmax and linear terms under one denominator), Hedgehog (arXiv 2402.04347: the
feature map, which starts from the identity). Exact, but for rounding, while the window is at least as long as the text.

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")


class FeatureMap(nn.Module):
    """Maps (batch_size, heads, length, head_dim) to positive features (..., 2 feature_dim) and a log gate (...)."""

    def __init__(self, heads: int, head_dim: int, feature_dim: int, gate: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim, feature_dim).repeat(heads, 1, 1))
        self.direction = nn.Parameter(torch.zeros(heads, head_dim))
        self.gate = nn.Parameter(torch.full((heads,), float(gate)))
        self.scale = scale

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes both in float32 at least."""
        states = states.to(torch.promote_types(states.dtype, torch.float32)) * self.scale
        mapped = states @ self.weight.to(states.dtype)
        gate = states @ self.direction.to(states.dtype)[..., None]
        return torch.cat((mapped, -mapped), -1).softmax(-1), gate[..., 0] + self.gate.to(states.dtype)[:, None]


class LinearAttention(nn.Module):
    """Takes the projections (and norms) of an attention over, under their own names, and adds two feature maps.

    It takes the place of attentions of the Llama kind: `q_proj`, `k_proj`, `v_proj`, `o_proj`, norms of queries and
    keys per head (Qwen3, Gemma 3) or over the full width (OLMoE), grouped queries, rotary positions, a sliding window.
    All others are refused.

    `window` is the number of positions, its own among them, that a query sees by softmax. `feature_dim` is the number
    of rows of `W` (head_dim where it is left out). `gate` is the start of the log gate. `chunk` is how many positions
    are computed at a time. In a sliding layer whose own window is not longer than `window` nothing is beyond it.

    While `bypass` is True it computes what the original computed, bit for bit; while `ablate` is True the linear part
    gives nothing.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    declares: ClassVar[dict[str, bool]] = {"attentions": False, "cache": False}

    def __init__(
        self,
        config: Any,
        layer_idx: int,
        original: Any,
        window: int = 32,
        feature_dim: int | None = None,
        gate: float = 2.0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        _refuse_unknown(original, window, chunk)
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, value in vars(original).items():  # what the original's forward reads, for `bypass`
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)
        self.config, self.layer_idx = config, layer_idx
        self.head_dim: int = original.head_dim
        self.heads = original.q_proj.weight.shape[0] // self.head_dim
        self.key_heads = original.k_proj.weight.shape[0] // self.head_dim
        self.scaling: float = original.scaling
        sliding = getattr(original, "sliding_window", getattr(config, "sliding_window", None))
        self.window, self.chunk = min(window, sliding or window), chunk
        self.reaches = sliding is None or sliding > window
        features = feature_dim or self.head_dim
        root = self.scaling**0.5
        self.query_map = FeatureMap(self.heads, self.head_dim, features, gate, root)
        self.key_map = FeatureMap(self.key_heads, self.head_dim, features, 0.0, root)
        self.bypass = False
        self.ablate = False
        self._family = type(original)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Maps (batch_size, sequence_length, hidden_size) to the same shape."""
        if self.bypass:
            bypassed: tuple[torch.Tensor, None] = self._family.forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
            return bypassed
        q, k, v = self._project(hidden_states, position_embeddings)
        keep = _find_kept(attention_mask, k.shape[2])
        outputs = self._attend(q, k, v, keep)
        outputs = outputs.to(hidden_states.dtype).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(outputs), None

    def _project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns rotated queries (batch_size, heads, length, head_dim), and keys and values of the key heads."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        q, k = (
            _normalize(q, getattr(self, "q_norm", None), self.head_dim),
            _normalize(k, getattr(self, "k_norm", None), self.head_dim),
        )
        if (limit := getattr(self.config, "clip_qkv", None)) is not None:
            q, k, v = (t.clamp(-limit, limit) for t in (q, k, v))
        q, k, v = (torch.unflatten(t, -1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        rotate = vars(sys.modules[self._family.__module__])["apply_rotary_pos_emb"]
        q, k = rotate(q, k, *position_embeddings)
        return q, k, v

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """Returns what the heads read, (batch_size, heads, length, head_dim).

        `keep` (batch_size, length) says what is no padding.
        """
        scores, values = self._score_window(q, k, v, keep)
        top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min / 2)
        length, groups = q.shape[2], self.heads // self.key_heads
        if self.ablate or not self.reaches or length <= self.window:
            weights = (scores - top).exp()
            total = weights.sum(-1, keepdim=True)
            return _join(weights.to(values.dtype) @ values, total, length, self.heads)
        phi_q, gate = self.query_map(q)
        gate = torch.unflatten(_into_chunks(gate[..., None], self.chunk), 1, (self.key_heads, groups))
        top = torch.maximum(top, gate).detach()
        weights = (scores - top).exp()
        read, mass = self._read_beyond(phi_q, k, v, keep)
        gate = (gate - top).exp()
        read = (weights.to(values.dtype) @ values) + gate * read
        return _join(read, weights.sum(-1, keepdim=True) + gate * mass, length, self.heads)

    def _score_window(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scores of every chunk of queries over the keys that their windows reach, and these values.

        (batch_size, key_heads, groups, chunks, chunk, window - 1 + chunk), masked; values (..., 1, chunks, reach, dim).
        """
        before, size = self.window - 1, self.chunk
        q = torch.unflatten(_into_chunks(q, size), 1, (self.key_heads, -1))
        chunks = q.shape[3]
        after = chunks * size - k.shape[2]
        k, v = (F.pad(t, (0, 0, before, after)).unfold(2, before + size, size) for t in (k, v))
        scores = (q @ k[:, :, None]).to(torch.promote_types(q.dtype, torch.float32)) * self.scaling
        rows, columns = (torch.arange(n, device=q.device) for n in (size, before + size))
        distance = rows[:, None] + before - columns
        seen = (distance >= 0) & (distance <= before)
        starts = torch.arange(chunks, device=q.device)[:, None, None] * size - before
        seen = seen & (starts + columns >= 0)
        if keep is not None:
            kept = F.pad(keep, (before, after)).unfold(1, before + size, size)
            seen = seen & kept[:, None, None, :, None]
        return scores.masked_fill(~seen, float("-inf")), v[:, :, None].transpose(-1, -2)

    def _read_beyond(
        self, phi_q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the queries read of all that is beyond their windows, and its mass, in chunks.

        Keys that are moved `window` positions on are seen by the queries from there on: a plain causal sum.
        """
        length, size = k.shape[2], self.chunk
        k, v = k[:, :, : length - self.window], v[:, :, : length - self.window]
        phi_k, gate = self.key_map(k)
        phi_k = phi_k * gate.exp()[..., None]
        if keep is not None:
            phi_k = phi_k * keep[:, None, : length - self.window, None]
        v = F.pad(v.to(phi_k.dtype), (0, 1), value=1.0)  # the last column adds the mass up
        phi_k, v = (_into_chunks(F.pad(t, (0, 0, self.window, 0)), size) for t in (phi_k, v))
        phi_q = torch.unflatten(_into_chunks(phi_q, size), 1, (self.key_heads, -1))
        state = phi_k.transpose(-1, -2) @ v
        state = (state.cumsum(2) - state)[:, :, None]
        near = (phi_q @ phi_k[:, :, None].transpose(-1, -2)).tril()
        read = phi_q @ state + near @ v[:, :, None]
        return read[..., :-1], read[..., -1:]


def _refuse_unknown(original: Any, window: int, chunk: int) -> None:
    """Refuses what this file does not know how to compute."""
    children = dict(original.named_children())
    missing = [name for name in PROJECTIONS if name not in children]
    faults = [f"it has no {name}" for name in missing]
    faults += [f"it has a part {name!r}" for name in children if name not in (*PROJECTIONS, *NORMS)]
    faults += [f"it has a parameter {name!r}" for name, _ in original.named_parameters(recurse=False)]
    faults += [f"it has no {key}" for key in ("head_dim", "scaling") if not hasattr(original, key)]
    if "apply_rotary_pos_emb" not in vars(sys.modules[type(original).__module__]):
        faults.append("its family has no apply_rotary_pos_emb")
    if getattr(original, "attn_logit_softcapping", None) is not None:
        faults.append("it caps its scores (attn_logit_softcapping)")
    if not missing and original.q_proj.weight.shape[0] != original.o_proj.weight.shape[1]:
        faults.append("its queries are wider than what its heads return")
    if faults:
        raise ValueError(f"LinearAttention cannot take the place of {type(original).__name__}: {'; '.join(faults)}")
    if window < 1 or chunk < 1:
        raise ValueError(f"window and chunk are at least 1, but are {window} and {chunk}")


def _normalize(states: torch.Tensor, norm: Any, head_dim: int) -> torch.Tensor:
    """Applies a norm over the full width or over each head; states are (batch_size, length, width)."""
    if norm is None:
        return states
    is_wide = norm.weight.shape[-1] == states.shape[-1]
    normed: torch.Tensor = norm(states if is_wide else torch.unflatten(states, -1, (-1, head_dim)))
    return normed if is_wide else normed.flatten(-2)


def _find_kept(mask: Any, length: int) -> torch.Tensor | None:
    """Returns which of the last `length` positions are no padding, (batch_size, length); None where all are.

    A mask of four dimensions says so on its diagonal: padding does not see itself.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise ValueError(f"LinearAttention reads masks of 2 or 4 dimensions, not a {type(mask).__name__}")
    if mask.ndim == 4:
        own = mask[:, 0, -length:, -length:].diagonal(dim1=-2, dim2=-1)
        return own if own.dtype == torch.bool else own == 0
    return mask[:, -length:].bool()


def _into_chunks(states: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts (batch_size, heads, length, width) into (batch_size, heads, chunks, size, width), padded at the end."""
    after = -states.shape[2] % size
    return torch.unflatten(F.pad(states, (0, 0, 0, after)), 2, (-1, size))


def _join(read: torch.Tensor, total: torch.Tensor, length: int, heads: int) -> torch.Tensor:
    """Divides by the mass and puts chunks and groups together: (batch_size, heads, length, head_dim)."""
    joined = read / total.clamp(min=torch.finfo(total.dtype).tiny)
    return joined.flatten(3, 4).flatten(1, 2)[:, :, :length]
