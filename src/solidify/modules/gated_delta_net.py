"""Attention as a recurrence: a matrix for every head that forgets by a gate and is corrected by the delta rule.

With `k_t`, `q_t` of length one, `alpha_t = exp(-exp(A) softplus(a·x_t + dt))` and `beta_t = sigmoid(b·x_t)`:

    state    S_t = alpha_t S_(t-1) + beta_t k_t (v_t - alpha_t S_(t-1)^T k_t)^T     (head_dim, head_dim)
    output   y_t = norm(S_t^T q_t / sqrt(head_dim)) * silu(z_t)

Queries, keys and values are those of the attention that it replaces, without positions, each channel convolved with the
three that came before it and passed through silu; `z_t` is a gate of its own. In the cache stand one matrix a head, and
the last positions of the convolution: what a token costs, and what is kept, does not depend on the length.

Papers: Gated Delta Networks (arXiv 2412.06464), the delta rule over chunks (arXiv 2406.06484). With the same weights it
is the layer of transformers' Qwen3-Next. It starts with the projections of the attention, a convolution that takes the
position itself, an open gate (silu(z) = 1), `beta = 0.5` and slow forgetting; it is no start that computes the same.

fla's kernels (package `flash-linear-attention`) are used where they are installed and the tensors are on a GPU.

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import importlib
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("q_norm", "k_norm")
OPEN = 1.2784645  # silu of it is 1


class GatedDeltaNet(nn.Module):
    """Takes the projections (and norms) of an attention over, under their own names.

    It takes the place of attentions with `q_proj`, `k_proj`, `v_proj`, `o_proj`, norms of queries and keys per head
    (Qwen3, Gemma 3) or over the full width (OLMoE), grouped queries (every query head has a state of its own; keys and
    values of a group are the same). All others are refused. Positions, and a sliding window, are left out.

    While `bypass` is True it computes what the original computed, bit for bit.

    `conv_kernel` is how many positions the convolution reads, `chunk` how many are computed at a time.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    declares: ClassVar[dict[str, bool]] = {"attentions": False}
    layer_type = "hybrid"  # a state, or, in `bypass`, keys and values

    def __init__(self, config: Any, layer_idx: int, original: Any, conv_kernel: int = 4, chunk: int = 64) -> None:
        super().__init__()
        _refuse_unknown(original, conv_kernel, chunk)
        for name, child in original.named_children():
            self.add_module(name, child)
        for name, value in vars(original).items():  # what the original's forward reads, for `bypass`
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)
        self.bypass = False
        self._family = type(original)
        self.config, self.layer_idx, self.chunk, self.conv_kernel = config, layer_idx, chunk, conv_kernel
        self.head_dim: int = original.head_dim
        self.clip: float | None = getattr(config, "clip_qkv", None)
        width, hidden = self.q_proj.weight.shape[0], self.q_proj.weight.shape[1]
        self.heads, self.key_heads = width // self.head_dim, self.k_proj.weight.shape[0] // self.head_dim
        channels = width + 2 * self.k_proj.weight.shape[0]
        self.conv1d = nn.Conv1d(channels, channels, conv_kernel, groups=channels, bias=False)
        self.z_proj = nn.Linear(hidden, width)
        self.a_proj = nn.Linear(hidden, self.heads, bias=False)
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.linspace(1.0, 16.0, self.heads).log())
        self.dt_bias = nn.Parameter(torch.full((self.heads,), 0.01).expm1().log())  # softplus of it is 0.01
        self.norm = nn.Parameter(torch.ones(self.head_dim))
        self.epsilon = float(getattr(config, "rms_norm_eps", 1e-6))
        for parameter in (self.conv1d.weight, self.z_proj.weight, self.a_proj.weight, self.b_proj.weight):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.z_proj.bias, OPEN)
        with torch.no_grad():
            self.conv1d.weight[..., -1] = 1.0

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
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
        cache, length = past_key_values, hidden_states.shape[1]
        keep = _find_kept(attention_mask, length, cache.get_seq_length(self.layer_idx) if cache is not None else 0)
        if keep is not None:
            hidden_states = (hidden_states * keep[..., None]).to(hidden_states.dtype)
        q, k, v = self._mix(hidden_states, cache)
        beta = self.b_proj(hidden_states).sigmoid()
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(hidden_states).to(wide) + self.dt_bias)
        state = cache.get_recurrent_state(self.layer_idx) if cache is not None else None
        outputs, state = apply_delta_rule(q, k, v, log_decay, beta, state, self.chunk)
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        z = torch.unflatten(self.z_proj(hidden_states), -1, (self.heads, self.head_dim))
        return self.o_proj(self._normalize_heads(outputs, z).flatten(-2)), None

    def _mix(self, hidden_states: torch.Tensor, cache: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects and convolves; returns (batch_size, length, heads, head_dim) each."""
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        q, k = (_normalize(t, getattr(self, name, None), self.head_dim) for t, name in ((q, NORMS[0]), (k, NORMS[1])))
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        widths = [q.shape[-1], k.shape[-1], v.shape[-1]]
        mixed, length = torch.cat([q, k, v], -1).transpose(1, 2), hidden_states.shape[1]
        if cache is not None:
            mixed = cache.update_conv_state(mixed, self.layer_idx, conv_kernel_size=self.conv_kernel)
        mixed = F.pad(mixed, (self.conv_kernel - 1, 0))[..., -(length + self.conv_kernel - 1) :]
        mixed = F.silu(self.conv1d(mixed.to(self.conv1d.weight.dtype))).transpose(1, 2)
        q, k, v = (torch.unflatten(t, -1, (-1, self.head_dim)) for t in torch.split(mixed, widths, -1))
        groups = self.heads // self.key_heads
        return q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)

    def _normalize_heads(self, outputs: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Scales what the heads read to length one, then by the norm's weight and the gate."""
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (self.norm * scaled.to(z.dtype) * F.silu(z.to(wide.dtype))).to(z.dtype)


def apply_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what is read, and the state (batch_size, heads, head_dim, head_dim) afterwards.

    `q`, `k`, `v` and what is read are (batch_size, length, heads, head_dim), `log_decay` and `beta` (batch_size,
    length, heads).
    """
    kernel = find_kernel("fused_recurrent_gated_delta_rule" if q.shape[1] == 1 else "chunk_gated_delta_rule")
    if kernel is not None and q.is_cuda:
        options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
        read, state = kernel(q, k, v, g=log_decay, beta=beta, **options)
        return read, state
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = (t.to(wide) * torch.rsqrt(t.to(wide).square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    length, chunk = q.shape[1], min(chunk, q.shape[1])
    parts = (q * q.shape[-1] ** -0.5, k, v.to(wide), beta.to(wide)[..., None], log_decay.to(wide)[..., None])
    q, k, value, weight, decay = (_into_chunks(t.transpose(1, 2), chunk) for t in parts)
    total = decay[..., 0].cumsum(-1)  # (batch_size, heads, chunks, chunk), the log of what is left since its start
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    left = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    system = (k * weight) @ k.mT * left  # what each correction of a chunk takes from the earlier ones
    fresh = torch.linalg.solve_triangular(system, value * weight, upper=False, unitriangular=True)
    seen = torch.linalg.solve_triangular(system, k * weight * total.exp()[..., None], upper=False, unitriangular=True)
    near = q @ k.mT * left
    q, k = q * total.exp()[..., None], k * (total[..., -1:] - total).exp()[..., None]
    held = q.new_zeros(*q.shape[:2], q.shape[-1], value.shape[-1]) if state is None else state.to(wide)
    read = []
    for at in range(q.shape[2]):
        correction = fresh[:, :, at] - seen[:, :, at] @ held
        read.append(q[:, :, at] @ held + near[:, :, at] @ correction)
        held = held * total[:, :, at, -1].exp()[..., None, None] + k[:, :, at].mT @ correction
    return torch.cat(read, 2)[:, :, :length].transpose(1, 2).to(v.dtype), held


def find_kernel(name: str) -> Any:
    """Returns a function of fla's, or None where the package is not installed."""
    try:
        return getattr(importlib.import_module("fla.ops.gated_delta_rule"), name)
    except (ImportError, AttributeError):
        return None


def _refuse_unknown(original: Any, conv_kernel: int, chunk: int) -> None:
    """Refuses what this file does not know how to take over."""
    children = dict(original.named_children())
    faults = [f"it has no {name}" for name in PROJECTIONS if name not in children]
    wide = not faults and original.q_proj.weight.shape[0] != original.o_proj.weight.shape[1]
    faults += ["its queries are wider than what its heads return"] if wide else []
    faults += [f"it has a part {name!r}" for name in children if name not in (*PROJECTIONS, *NORMS)]
    faults += [f"it has a parameter {name!r}" for name, _ in original.named_parameters(recurse=False)]
    faults += [] if hasattr(original, "head_dim") else ["it has no head_dim"]
    if faults:
        raise ValueError(f"GatedDeltaNet cannot take the place of {type(original).__name__}: {'; '.join(faults)}")
    if conv_kernel < 1 or chunk < 1:
        raise ValueError(f"conv_kernel and chunk are at least 1, but are {conv_kernel} and {chunk}")


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
        raise ValueError(f"GatedDeltaNet reads masks of 2 or 4 dimensions, not a {type(mask).__name__}")
    start = min(past, mask.shape[-1] - length)
    if mask.ndim == 2:
        return mask[:, start : start + length].bool()
    diagonals = (mask[:, 0, :, start : start + length].diagonal(offset, -2, -1) for offset in (0, -1))
    own, before = (t if t.dtype == torch.bool else t == 0 for t in diagonals)
    if not torch.compiler.is_compiling() and bool((own[:, 1:] & own[:, :-1] & ~before).any()):
        raise ValueError("GatedDeltaNet does not keep packed texts apart: give each a row of its own")
    return own


def _into_chunks(states: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts (batch_size, heads, length, width) into (batch_size, heads, chunks, size, width), zeros at the end."""
    return torch.unflatten(F.pad(states, (0, 0, 0, -states.shape[2] % size)), 2, (-1, size))
