"""A memory beside a feed-forward: many values, of which each token reads a few that it finds by product keys.

Product keys (arXiv 1907.05242) find the `top_k` best of n * n keys by looking at 2 n: key (i, j) is the pair of sub-key
i of the first half and sub-key j of the second, and its score is the sum of theirs, so that the best pairs are among
the pairs of the best. Around them the gate of Memory Layers at Scale (arXiv 2412.09764, eq. 3). Per head, with q the
query of a token x, made of root mean square one and split into halves q_1, q_2:

    s_1 = C_1 q_1,  s_2 = C_2 q_2                      n scores each
    S   = top_k of (s_1[i] + s_2[j]) over i in top_k(s_1), j in top_k(s_2)
    y   = sum over heads, over (i, j) in S of softmax(S)[i, j] V[i n + j]
    out = FFN(x) + W_2 (y * silu(W_1 x))

W_2 starts at zero: the layer is its feed-forward bit for bit, and W_2 has a gradient from the first step on, all else
from the second. Queries and sub-keys, gate and values start random, drawn from `seed` and the layer's number.

Few of the values are read for a token, so that training the values alone, or those alone that are read often, leaves
the rest of the model as it was (sparse memory fine-tuning, arXiv 2510.15103).

While `ablate` or `bypass` is True the memory gives nothing, and the layer is the feed-forward alone.

Shapes: `memory.query.weight` (heads * key_size, hidden_size); `memory.keys` (2 * heads * num_keys, key_size / 2), the
halves one after the other, in each the heads; `memory.values.weight` (num_keys ** 2, value_size), shared by the heads;
`memory.gate.weight` (value_size, hidden_size); `memory.output.weight` (hidden_size, value_size).

This file needs torch and transformers only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class ProductKeyMemory(nn.Module):
    """Reads `heads * top_k` of `num_keys ** 2` values for each token; see the equations above."""

    def __init__(
        self, hidden_size: int, num_keys: int, top_k: int, heads: int, key_size: int, value_size: int, eps: float
    ) -> None:
        super().__init__()
        self.num_keys, self.top_k, self.heads, self.eps = num_keys, top_k, heads, eps
        self.query = nn.Linear(hidden_size, heads * key_size, bias=False)
        self.keys = nn.Parameter(torch.empty(2 * heads * num_keys, key_size // 2))
        self.values = nn.Embedding(num_keys**2, value_size)
        self.gate = nn.Linear(hidden_size, value_size, bias=False)
        self.output = nn.Linear(value_size, hidden_size, bias=False)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Draws all but the output, which is zero."""
        wanted = (
            (self.query.weight, self.query.in_features**-0.5),
            (self.keys, self.keys.shape[-1] ** -0.5),
            (self.values.weight, self.values.embedding_dim**-0.5),
            (self.gate.weight, self.gate.in_features**-0.5),
        )
        for parameter, std in wanted:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        self.output.weight.zero_()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch_size, sequence_length, hidden_size) to the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, index = self.search(tokens)
        shares = F.softmax(scores, dim=-1).to(self.values.weight.dtype)
        read = F.embedding_bag(index.flatten(1), self.values.weight, mode="sum", per_sample_weights=shares.flatten(1))
        found: torch.Tensor = self.output(read * F.silu(self.gate(tokens)))
        return found.reshape(hidden_states.shape)

    def search(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the best scores of each head and which values they stand for, (tokens, heads, top_k) each."""
        first, second = self.score(tokens)
        first, rows = first.topk(self.top_k, dim=-1)
        second, columns = second.topk(self.top_k, dim=-1)
        pairs = (first[..., :, None] + second[..., None, :]).flatten(-2)
        scores, best = pairs.topk(self.top_k, dim=-1)
        index = rows.gather(-1, best // self.top_k) * self.num_keys + columns.gather(-1, best % self.top_k)
        return scores, index

    def score(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scores of the sub-keys of both halves, (tokens, heads, num_keys) each, at least in float32."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        query = self.query(tokens).to(wide).view(len(tokens), self.heads, -1)
        query = query * torch.rsqrt(query.square().mean(-1, keepdim=True) + self.eps)
        halves = query.view(*query.shape[:2], 2, -1)
        keys = self.keys.to(wide).view(2, self.heads, self.num_keys, -1)
        first, second = torch.einsum("thpd,phnd->pthn", halves, keys)
        return first, second


class MemoryLayer(nn.Module):
    """A feed-forward, kept as `feed_forward`, and a memory beside it that starts by adding nothing.

    `value_size` is the hidden size when it is left out.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        original: nn.Module,
        config: PreTrainedConfig,
        layer_idx: int,
        num_keys: int = 64,
        top_k: int = 8,
        heads: int = 2,
        key_size: int = 64,
        value_size: int | None = None,
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_keys:
            raise ValueError(f"top_k must be from 1 to num_keys ({num_keys}), but is {top_k}")
        if heads < 1 or key_size < 2 or key_size % 2 or (value_size is not None and value_size < 1):
            raise ValueError(
                "heads and value_size must be at least 1 and key_size even, but they are "
                f"{heads}, {value_size} and {key_size}"
            )
        hidden_size = config.hidden_size
        self.feed_forward = original
        self.memory = ProductKeyMemory(
            hidden_size, num_keys, top_k, heads, key_size, value_size if value_size is not None else hidden_size, eps
        )
        self.seed = seed + 1_000_003 * layer_idx
        self.ablate = False
        self.bypass = False

    def adopt(self, original: nn.Module) -> None:
        """Draws the memory; the feed-forward is kept as it is."""
        if not self.memory.keys.is_meta:
            self.memory.draw(torch.Generator().manual_seed(self.seed))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps (batch_size, sequence_length, hidden_size) to what the feed-forward returns, the memory added to it.

        Of a tuple it is added to the first element.
        """
        outputs = self.feed_forward(hidden_states, *args, **kwargs)
        if self.ablate or self.bypass:
            return outputs
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        first = first + self.memory(hidden_states).view(first.shape)  # Llama 4 returns tokens without their batch
        return (first, *others) if isinstance(outputs, tuple) else first
