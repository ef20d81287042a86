"""Attention that is a softmax within a window and linear in the length beyond it, with learned feature maps.

For a query at position i, with `s_ij = scaling * q_i · k_j` (rotated as the original rotates them):

    window   j in (i - window, i]   w_ij = exp(s_ij)
    beyond   j <= i - window        w_ij = exp(a_i + b_j) phi_q(q_i) · phi_k(k_j)
    output   y_i = sum_j w_ij v_j / sum_j w_ij

`phi(x) = softmax([W x, -W x])` (2 feature_dim,) is learned for every head, `a_i = u · q_i + gate` and `b_j = t · k_j`
say how much the linear part counts. All of the past beyond the window fits into two sums for every key head,
`S = sum_j exp(b_j) phi_k(k_j) v_j^T` (2 feature_dim, head_dim) and `z = sum_j exp(b_j) phi_k(k_j)` (2 feature_dim,):
what a token costs does not depend on the length. In the cache stand the two sums and the keys and values of a window.

Papers: LoLCATs (arXiv 2410.10254: softmax and linear terms under one denominator), Hedgehog (arXiv 2402.04347: the
feature map, which starts from the identity). Exact, but for rounding, while the window is at least as long as the text.

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer

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


class WindowAndSum(LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer of the cache: keys and values of the last positions, and the sum of all that came before these.

    `keys`, `values` (batch_size, key_heads, held, head_dim), `keep` (batch_size, held): what is no padding. The sum is
    the recurrent state (batch_size, key_heads, 2 feature_dim, head_dim + 1), its last column the mass. A chunk of
    positions is held beside the window, so that they can be taken back; all are while the past is recorded.
    """

    is_compileable = False
    is_croppable = True
    record_past: bool

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.keep: torch.Tensor | None = None
        self.cumulative_length = self.needed = 0
        self.is_cut = False

    @property
    def held(self) -> int:
        """The number of positions whose keys are held."""
        return self.keep.shape[1] if self.keep is not None else 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **options: Any) -> Any:
        """Holds more keys and values, and returns all that are held; with a sum, they are not all."""
        if self.held < self.cumulative_length:
            raise ValueError("the original (`bypass`) needs all keys, and some are summed up: empty the cache")
        return self.extend(keys, values, None, 0)[:2]

    def extend(
        self, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor | None, needed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Holds more, and returns all that is held; the next query will need as many of it as are `needed`."""
        self.cumulative_length, self.needed = self.cumulative_length + keys.shape[2], needed
        if keep is None:
            keep = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool, device=keys.device)
        if self.keep is None:
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
            self.keys, self.values, self.keep = keys, values, keep
        else:
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            self.keep = torch.cat([self.keep, keep], 1)
        return self.keys, self.values, self.keep

    def fold(self, count: int, more: torch.Tensor | None) -> None:
        """Lets the first positions go, which `more` is the sum of."""
        assert self.keep is not None
        self.keys, self.values, self.keep = self.keys[:, :, count:], self.values[:, :, count:], self.keep[:, count:]
        if more is not None:
            held = self.recurrent_states[0]
            self.recurrent_states[0] = more if held is None else held + more
            self.is_recurrent_states_initialized[0] = self.has_previous_state[0] = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last positions back.

        Raises:
            RuntimeError: some of what would then be the window is summed up.
        """
        count = abs(tokens_to_remove)
        if count and self.held < self.cumulative_length and self.held - count < self.needed:
            raise RuntimeError(
                f"{count} positions cannot be taken back, the window before them is summed up: call "
                "`activate_past_recording` before positions that may be"
            )
        self.is_cut = True
        if count and self.keep is not None:
            self.keys, self.values, self.keep = (
                self.keys[:, :, :-count],
                self.values[:, :, :-count],
                self.keep[:, :-count],
            )
            self.cumulative_length -= count

    def get_seq_length(self) -> int:
        """Returns the number of positions that were seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and the offset that a mask over all positions has."""
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        """Forgets all."""
        record_past = self.record_past
        self.__init__()  # type: ignore[misc]
        self.record_past = record_past

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follows the beams."""
        self._change_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows of the batch."""
        self._change_rows(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        self._change_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.keep is not None:
            self.keys, self.values, self.keep = change(self.keys), change(self.values), change(self.keep)
        if self.recurrent_states[0] is not None:
            self.recurrent_states[0] = change(self.recurrent_states[0])


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
    declares: ClassVar[dict[str, bool]] = {"attentions": False}
    layer_type = WindowAndSum

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
        self.bypass = self.ablate = False
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
        layer = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if layer is not None and not hasattr(layer, "fold"):
            raise ValueError("LinearAttention found no WindowAndSum in the cache: put it into the model by surgery")
        keep = _find_kept(attention_mask, k.shape[2], layer.get_seq_length() if layer is not None else 0)
        outputs = self._attend(q, k, v, keep) if layer is None else self._attend_over(layer, q, k, v, keep)
        outputs = outputs.to(hidden_states.dtype).transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
        return self.o_proj(outputs), None

    def _project(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns rotated queries (batch_size, heads, length, head_dim), and keys and values of the key heads."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        q, k = (_normalize(t, getattr(self, name, None), self.head_dim) for t, name in zip((q, k), NORMS, strict=True))
        if (limit := getattr(self.config, "clip_qkv", None)) is not None:
            q, k, v = (t.clamp(-limit, limit) for t in (q, k, v))
        q, k, v = (torch.unflatten(t, -1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        rotate = vars(sys.modules[self._family.__module__])["apply_rotary_pos_emb"]
        q, k = rotate(q, k, *position_embeddings)
        return q, k, v

    def _attend_over(
        self, layer: WindowAndSum, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None
    ) -> torch.Tensor:
        """Attends to what the cache holds too, and then lets the oldest go into the sum."""
        if layer.is_cut:
            self._fold(layer)
        k, v, keep = layer.extend(k, v, keep, self.window - 1)
        outputs = self._attend(q, k, v, keep, layer.recurrent_states[0])
        if not layer.record_past:
            self._fold(layer)
        return outputs

    def _fold(self, layer: WindowAndSum) -> None:
        """Leaves a window in the cache, and a chunk before it: so many positions may be taken back."""
        layer.is_cut = False
        count = layer.held - (self.window - 1) - self.chunk
        if count > 0:
            assert layer.keep is not None
            phi_k, v = self._weigh_keys(layer.keys[:, :, :count], layer.values[:, :, :count], layer.keep[:, :count])
            layer.fold(count, phi_k.mT @ v if self.reaches else None)

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        keep: torch.Tensor | None,
        state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what the heads read, (batch_size, heads, length, head_dim); the queries are those of the last keys.

        `keep` (batch_size, keys) says what is no padding; `state` is the sum of what came before the keys. A chunk of
        queries reads the keys of its windows and the sum of all before these, to which the next chunk adds.
        """
        length, before = q.shape[2], k.shape[2] - q.shape[2]
        is_linear = self.reaches and not self.ablate and (state is not None or k.shape[2] > self.window)
        phi_k, values = self._weigh_keys(k, v, keep) if is_linear else (None, self._with_mass(v))
        groups = (self.key_heads, self.heads // self.key_heads)
        phi_q, gate = (torch.unflatten(t, 1, groups) for t in (self.query_map(q) if is_linear else (q, q)))
        q = torch.unflatten(q, 1, groups)
        outputs, low = [], 0
        for start in range(0, length, self.chunk):
            end = min(start + self.chunk, length)
            first = max(before + start - (self.window - 1), low)
            if phi_k is not None and first > low:
                more = phi_k[:, :, low:first].mT @ values[:, :, low:first]
                state = more if state is None else state + more
            low, new, held = first, slice(start, end), slice(first, before + end)
            kept = keep[:, held] if keep is not None else None
            far = (phi_q[:, :, :, new], gate[:, :, :, new], phi_k[:, :, held]) if phi_k is not None else None
            outputs.append(self._attend_chunk(q[:, :, :, new], k[:, :, held], values[:, :, held], kept, far, state))
        return torch.cat(outputs, 3).flatten(1, 2)

    def _attend_chunk(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        values: torch.Tensor,
        keep: torch.Tensor | None,
        far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        state: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attends from (batch_size, key_heads, groups, queries, head_dim) to keys and to a sum of those before.

        `far` are the queries' features, their log gates, and the keys' features; without it there is a window only.
        """
        count, total = q.shape[3], k.shape[2]
        age = torch.arange(total - count, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
        seen = age >= 0 if keep is None else (age >= 0) & keep[:, None, None, None]
        near = seen & (age < self.window)
        scores = (q @ k[:, :, None].mT).to(values.dtype) * self.scaling
        scores = scores.masked_fill(~near, torch.finfo(scores.dtype).min)
        top = scores.amax(-1, keepdim=True).detach()
        if far is None:
            read = (scores - top).exp().masked_fill(~near, 0.0) @ values[:, :, None]
            return read[..., :-1] / read[..., -1:].clamp(min=torch.finfo(read.dtype).tiny)
        phi_q, gate, phi_k = far
        top = torch.maximum(top, gate.detach()[..., None])
        phi_q = phi_q * (gate[..., None] - top).exp()
        weights = (scores - top).exp().masked_fill(~near, 0.0)
        if total > self.window:
            weights = weights + (phi_q @ phi_k[:, :, None].mT).masked_fill(age < self.window, 0.0)
        read = weights @ values[:, :, None]
        if state is not None:
            read = read + phi_q @ state[:, :, None]
        return read[..., :-1] / read[..., -1:].clamp(min=torch.finfo(read.dtype).tiny)

    def _weigh_keys(
        self, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weighted features of keys, none of padding, and their values with the mass."""
        phi_k, gate = self.key_map(k)
        phi_k = phi_k * gate.exp()[..., None]
        if keep is not None:
            phi_k = phi_k * keep[:, None, :, None]
        return phi_k, self._with_mass(v)

    @staticmethod
    def _with_mass(v: torch.Tensor) -> torch.Tensor:
        """Returns values with a last column of ones, which adds the weights up, in float32 at least."""
        return F.pad(v.to(torch.promote_types(v.dtype, torch.float32)), (0, 1), value=1.0)


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
    faults += _find_other_positions(type(original))
    if faults:
        raise ValueError(f"LinearAttention cannot take the place of {type(original).__name__}: {'; '.join(faults)}")
    if window < 1 or chunk < 1:
        raise ValueError(f"window and chunk are at least 1, but are {window} and {chunk}")


def _find_other_positions(kind: type) -> list[str]:
    """Says what a family does to queries beside rotating them in every layer, as its forward is written."""
    try:
        text = inspect.getsource(kind.forward)  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return []
    rotations = [line for line in text.splitlines() if "apply_rotary" in line]
    lines = [line for line in text.splitlines() if line.strip()]
    body = min((len(line) - len(line.lstrip()) for line in lines[1:] if not line.lstrip().startswith(")")), default=0)
    found = []
    if any(len(line) - len(line.lstrip()) > body for line in rotations):
        found.append("it rotates queries and keys in some layers, or calls, alone")
    if "llama_4" in text or "attn_scale" in text or "temperature" in text:
        found.append("it scales its queries by their positions")
    return found


def _normalize(states: torch.Tensor, norm: Any, head_dim: int) -> torch.Tensor:
    """Applies a norm over the full width or over each head; states are (batch_size, length, width)."""
    if norm is None:
        return states
    is_wide = norm.weight.shape[-1] == states.shape[-1]
    normed: torch.Tensor = norm(states if is_wide else torch.unflatten(states, -1, (-1, head_dim)))
    return normed if is_wide else normed.flatten(-2)


def _find_kept(mask: Any, length: int, past: int) -> torch.Tensor | None:
    """Returns which of the new positions are no padding, (batch_size, length); None where all are.

    A mask of four dimensions says so on its diagonal: padding does not see itself. A static cache's masks are as wide
    as it may become.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        raise ValueError(f"LinearAttention reads masks of 2 or 4 dimensions, not a {type(mask).__name__}")
    start = min(past, mask.shape[-1] - length)
    if mask.ndim == 2:
        return mask[:, start : start + length].bool()
    diagonals = (mask[:, 0, :, start : start + length].diagonal(offset, -2, -1) for offset in (0, -1))
    own, before = (t if t.dtype == torch.bool else t == 0 for t in diagonals)
    if not torch.compiler.is_compiling() and bool((own[:, 1:] & own[:, :-1] & ~before).any()):
        raise ValueError("LinearAttention does not keep packed texts apart: give each a row of its own")
    return own
