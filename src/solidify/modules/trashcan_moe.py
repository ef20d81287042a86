"""An MoE block with a zero-cost trash can: a learned threshold decides which routed slots are worth computing.

Every layer gets one extra expert that returns zero and costs nothing. Its logit is defined relative to the real ones,
`l_trash = logsumexp(l) + z`, and it may fill any number of the `top_k` slots, so the routing rule becomes a test on
log-probabilities: of the experts that the router chose, those with `log P >= z` are computed, the others are skipped.
`z = u·x + c` is one vector `u` (trainable, starts at 0) and one number `c` (a buffer, starts at -10000: nothing is
skipped, and the block is the original, bit for bit).

Related work: null experts of AdaMoE (arXiv 2406.13233), zero-computation experts of MoE++ (arXiv 2410.07348), zero
experts of LongCat-Flash (arXiv 2509.01322). The threshold form keeps exactly the slots that a top-k over the real
experts and `top_k` copies of one trash expert would keep.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ASLEEP = -1e4  # finite, so that no penalty on it is infinite; exp(-1e4) is exactly 0

WEIGHTINGS = ("base", "softmax_all", "topk_norm", "real_norm")


class TrashCan(nn.Module):
    """Says by how much each chosen expert beats the trash: `margin = log P - z`, kept where it is not negative.

    `weight` (hidden_size,) is `u`, `bias` () is `c`, `kept` () is a running mean of the kept share that a controller
    may maintain. Both buffers are saved.
    """

    bias: torch.Tensor
    kept: torch.Tensor

    def __init__(self, hidden_size: int, threshold: float = ASLEEP) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("bias", torch.tensor(float(threshold)))
        self.register_buffer("kept", torch.tensor(1.0))

    def forward(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, top_k_index: torch.Tensor
    ) -> torch.Tensor:
        """Returns the margins (tokens, top_k) in float32.

        `hidden_states` is (tokens, hidden_size), `router_logits` (tokens, num_experts), `top_k_index` (tokens, top_k).
        """
        log_probabilities = F.log_softmax(router_logits.float(), dim=-1).gather(-1, top_k_index)
        odds = F.linear(hidden_states.float(), self.weight.float()[None]) + self.bias.float()
        return log_probabilities - odds


class TrashCanMoE(nn.Module):
    """Takes over the router and the experts of an MoE block, under their own names, and adds a `TrashCan`.

    The block must consist of a router (`gate` or `router`, returning logits (tokens, num_experts), weights and indices
    (tokens, top_k)) and of `experts` called with (hidden_states, indices, weights): the contract that OLMoE shares with
    Qwen3-MoE, Mixtral, FlexOlmo and their kin in transformers 5. All other blocks are refused.

    `weighting` says what a kept expert's output is multiplied by:

    - `base`: the router's own weight; the trash head learns through a straight-through estimate.
    - `softmax_all`: the router's weight times `sigmoid(-z - log multiplicity)`, the softmax over all columns.
    - `topk_norm`: renormalised over kept and trashed slots; for routers that normalise their top-k weights.
    - `real_norm`: renormalised over kept slots (AdaMoE); the model's loss then gives the trash head no gradient.

    While `bypass` is True the block computes what the original computed, bit for bit.
    """

    experts: Any

    def __init__(
        self,
        original: nn.Module,
        weighting: str = "base",
        temperature: float = 1.0,
        multiplicity: int | None = None,
        threshold: float = ASLEEP,
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, but is {weighting!r}")
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, but is {threshold}; {ASLEEP} trashes nothing")
        children = dict(original.named_children())
        router = next((name for name in ("gate", "router") if name in children), None)
        if router is None or set(children) != {router, "experts"}:
            raise ValueError(
                "TrashCanMoE takes the place of a block that consists of a router (`gate` or `router`) and `experts`, "
                f"but {type(original).__name__} consists of: {', '.join(children) or 'no modules'}"
            )
        for name, child in children.items():
            self.add_module(name, child)
        self.trash = TrashCan(children[router].get_parameter("weight").shape[-1], threshold)
        self.weighting = weighting
        self.temperature = temperature
        self.multiplicity = multiplicity
        self.bypass = False
        self._router = router

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch_size, sequence_length, hidden_size) to the same shape."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        router_logits, weights, index = self.get_submodule(self._router)(tokens)
        if self.bypass:
            original: torch.Tensor = self.experts(tokens, index, weights)
            return original.reshape(hidden_states.shape)
        margin = self.trash(tokens, router_logits, index)
        keep = margin >= 0
        weights = self._weigh(weights, margin, keep, router_logits, index)
        if torch.compiler.is_compiling():  # shapes must not depend on data: skipped slots are weighted by zero
            outputs: torch.Tensor = self.experts(tokens, index, weights * keep)
        else:
            outputs = self._dispatch(tokens, index, weights, keep)
        return outputs.reshape(hidden_states.shape)

    def _weigh(
        self,
        weights: torch.Tensor,
        margin: torch.Tensor,
        keep: torch.Tensor,
        router_logits: torch.Tensor,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the weights (tokens, top_k) of the slots; those that are not kept are never read."""
        if self.weighting == "base":
            soft = torch.sigmoid(margin / self.temperature)
            return weights * (keep + (soft - soft.detach())).to(weights.dtype)
        probabilities = F.softmax(router_logits, dtype=torch.float32, dim=-1).gather(-1, index)
        kept = (probabilities * keep).sum(-1, keepdim=True)
        if self.weighting == "real_norm":
            return (probabilities / kept.clamp(min=torch.finfo(kept.dtype).tiny)).to(weights.dtype)
        odds = F.log_softmax(router_logits.float(), dim=-1).gather(-1, index) - margin  # z, per slot
        if self.weighting == "softmax_all":
            multiplicity = self.multiplicity or index.shape[-1]
            return weights * torch.sigmoid(-odds - math.log(multiplicity)).to(weights.dtype)
        trashed = ((~keep) * odds.exp()).sum(-1, keepdim=True)
        return (probabilities / (kept + trashed)).to(weights.dtype)

    def _dispatch(
        self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """Runs the experts on kept slots only and adds up what they return, (tokens, hidden_size).

        When every slot is kept this is the original's own call.
        """
        computed: torch.Tensor
        slots = keep.reshape(-1).nonzero().squeeze(-1)  # (kept,), each a pair of token and slot
        if slots.numel() == keep.numel():
            computed = self.experts(tokens, index, weights)
            return computed
        if not slots.numel():
            return torch.zeros_like(tokens)
        top_k = index.shape[-1]
        computed = self.experts(
            tokens[slots // top_k], index.reshape(-1)[slots, None], weights.reshape(-1)[slots, None]
        )
        outputs = computed.new_zeros(keep.numel(), tokens.shape[-1]).index_copy(0, slots, computed)
        return outputs.view(-1, top_k, tokens.shape[-1]).sum(dim=1)
