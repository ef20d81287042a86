"""An MoE block with a zero-cost trash can: a learned threshold decides which routed slots are worth computing.

Every layer gets one extra expert that returns zero and costs nothing. Its logit is defined relative to the real ones,
`l_trash = logsumexp(l) + z`, and it may fill any number of the `top_k` slots, so the routing rule becomes a test on
log-probabilities: of the experts that the router chose, those with `log P >= z` are computed, the others are skipped.
`z = u·x + c` is one vector `u` (trainable, starts at 0) and one number `c` (a buffer, starts at -10000: nothing is
skipped, and the block is the original, bit for bit). What an expert returns weighs more or less: `measure_worth` adds
to each `log P` the logarithm of the mean norm of its expert's output, so that what is skipped is what adds least.

Related work: null experts of AdaMoE (arXiv 2406.13233), zero-computation experts of MoE++ (arXiv 2410.07348), zero
experts of LongCat-Flash (arXiv 2509.01322). The threshold form keeps exactly the slots that a top-k over the real
experts and `top_k` copies of one trash expert would keep.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ASLEEP = -1e4  # finite, so that no penalty on it is infinite; exp(-1e4) is exactly 0

WEIGHTINGS = ("base", "softmax_all", "topk_norm", "real_norm")


class TrashCan(nn.Module):
    """Says by how much each chosen expert beats the trash: `margin = log P + worth - z`, kept where not negative.

    `weight` (hidden_size,) is `u`, `bias` () is `c`, `kept` () is a running mean of the kept share that a controller
    may maintain, `worth` (num_experts,) what `measure_worth` found (0 until then). All buffers are saved.
    """

    bias: torch.Tensor
    kept: torch.Tensor
    worth: torch.Tensor

    def __init__(self, hidden_size: int, num_experts: int, threshold: float = ASLEEP) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("bias", torch.tensor(float(threshold)))
        self.register_buffer("kept", torch.tensor(1.0))
        self.register_buffer("worth", torch.zeros(num_experts))

    def forward(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, top_k_index: torch.Tensor
    ) -> torch.Tensor:
        """Returns the margins (tokens, top_k) in float32.

        `hidden_states` is (tokens, hidden_size), `router_logits` (tokens, num_experts), `top_k_index` (tokens, top_k).
        """
        log_probabilities = F.log_softmax(router_logits.float(), dim=-1).gather(-1, top_k_index)
        odds = F.linear(hidden_states.float(), self.weight.float()[None]) + self.bias.float()
        return log_probabilities + self.worth.float()[top_k_index] - odds


class TrashCanMoE(nn.Module):
    """Takes over all of an MoE block, under its own names, and adds a `TrashCan`.

    The block has a router (`gate` or `router`) that returns logits (tokens, num_experts), weights and indices (tokens,
    top_k), and calls `experts` with (hidden_states, indices, weights): what OLMoE, Mixtral, Qwen2- and Qwen3-MoE,
    DeepSeek-V3, GLM-4, Ernie 4.5 and some fifty more families of transformers 5 agree on. Its own forward runs, so that
    shared experts, their gates and scalings stay as they are; what is skipped are routed experts. `P` is the softmax
    over the router's logits, also where the router itself weighs by sigmoids. All other blocks are refused.

    `weighting` says what a kept expert's output is multiplied by (`w` are the router's own weights of a token):

    - `base`: `w`; the trash head learns through a straight-through estimate.
    - `softmax_all`: `w` times `sigmoid(-z - log multiplicity)`, the softmax over all columns.
    - `topk_norm`: what trashed slots, of `exp(z)` each, leave of the sum of `w`: `w sum(w) / (sum over kept of w + r
      sum over trashed of exp(z))`, where `r = w / P` of the likeliest slot makes one of the other. For weights that are
      a softmax over the top k this is the softmax with `exp(z)` in each trashed slot.
    - `real_norm`: the sum of `w` goes to the kept slots (AdaMoE); the model's loss then gives the trash head no
      gradient.

    While `bypass` is True the block computes what the original computed, bit for bit.
    """

    experts: Any
    replaced: Any

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
        if router is None or "experts" not in children:
            raise ValueError(
                "TrashCanMoE takes the place of a block with a router (`gate` or `router`) and `experts`, "
                f"but {type(original).__name__} consists of: {', '.join(children) or 'no modules'}"
            )
        for name, child in children.items():
            self.add_module(name, child)
        for name, parameter in original.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in original.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in original.state_dict())
        matrix = next((parameter for parameter in children[router].parameters() if parameter.ndim == 2), None)
        if matrix is None:
            raise ValueError(
                "TrashCanMoE reads the width of the hidden states from the router's matrix, and "
                f"{type(children[router]).__name__} has none"
            )
        self.trash = TrashCan(matrix.shape[1], matrix.shape[0], threshold)
        self.weighting = weighting
        self.temperature = temperature
        self.multiplicity = multiplicity
        self.bypass = False
        self._router = router
        self._owned = (*children, *(n for n, _ in original.named_parameters(recurse=False)))
        self._owned += tuple(n for n, _ in original.named_buffers(recurse=False))
        # No child: its own are this block's, and it is there for its forward.
        object.__setattr__(self, "replaced", original)
        self._routed: tuple[torch.Tensor, ...] | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps (batch_size, sequence_length, hidden_size) to what the original block returns."""
        block: nn.Module = self.replaced
        if block.training != self.training:
            block.training = self.training
        for name in self._owned:  # whatever stands there by now, an adapter for one
            object.__setattr__(block, name, getattr(self, name))
        if not self.bypass:
            object.__setattr__(block, self._router, self._route)
            object.__setattr__(block, "experts", self._run_kept)
        try:
            return block(hidden_states, *args, **kwargs)
        finally:
            object.__setattr__(self, "_routed", None)

    def _route(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the router, and remembers which slots are kept for the call of the experts."""
        routed = self.get_submodule(self._router)(hidden_states, *args, **kwargs)
        if not isinstance(routed, tuple) or len(routed) != 3 or routed[2].is_floating_point():
            raise TypeError(
                "TrashCanMoE needs a router that returns logits, weights and indices, and "
                f"{type(self.get_submodule(self._router)).__name__} returns {_describe(routed)}"
            )
        logits, weights, index = routed
        margin = self.trash(hidden_states.reshape(-1, hidden_states.shape[-1]), logits, index)
        object.__setattr__(self, "_routed", (logits, margin))
        return logits, weights, index

    def _run_kept(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Runs the experts where a slot is kept; stands where the original block calls its experts."""
        if self._routed is None:
            raise TypeError("TrashCanMoE needs a block that calls its router before its experts")
        logits, margin = self._routed
        keep = margin >= 0
        weights = self._weigh(weights, margin, keep, logits, index)
        if torch.compiler.is_compiling():  # shapes must not depend on data: skipped slots are weighted by zero
            outputs: torch.Tensor = self.experts(tokens, index, weights * keep)
            return outputs
        return self._dispatch(tokens, index, weights, keep)

    def _weigh(
        self,
        weights: torch.Tensor,
        margin: torch.Tensor,
        keep: torch.Tensor,
        router_logits: torch.Tensor,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the weights (tokens, top_k) of the slots; those that are not kept are never read."""
        if self.weighting == "base" and not torch.is_grad_enabled():
            return weights
        if self.weighting == "base":
            soft = torch.sigmoid(margin / self.temperature)
            return weights * (keep + (soft - soft.detach())).to(weights.dtype)
        log_probabilities = F.log_softmax(router_logits.float(), dim=-1).gather(-1, index)
        odds = log_probabilities + self.trash.worth.float()[index] - margin  # z, per slot
        if self.weighting == "softmax_all":
            multiplicity = self.multiplicity or index.shape[-1]
            return weights * torch.sigmoid(-odds - math.log(multiplicity)).to(weights.dtype)
        wide = weights.float()
        total, shared = wide.sum(-1, keepdim=True), (wide * keep).sum(-1, keepdim=True)
        if self.weighting == "topk_norm":
            likeliest, slot = log_probabilities.max(-1, keepdim=True)
            unit = wide.gather(-1, slot).log() - likeliest
            shared = shared + torch.where(keep, 0.0, (odds + unit).exp()).sum(-1, keepdim=True)
        return (wide * (total / shared.clamp(min=torch.finfo(shared.dtype).tiny))).to(weights.dtype)

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


def _describe(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, tuple) else type(value).__name__


def measure_worth(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Sets every trash can's `worth` by what the experts return on some text; no gradient, nothing else changes.

    `worth` is the logarithm of the mean norm of an expert's output over the tokens that the router sends to it, less
    the mean of these logarithms over the layer's experts: with it the trash can skips the slots whose product of
    probability and norm is least (the score by which REAP prunes experts, arXiv 2510.13999, for each slot). An expert
    that no token is sent to is worth 0. Padding counts, so give batches without. Returns `worth` by the block's name.

    Raises:
        ValueError: the model holds no TrashCanMoE, or there is no batch.
    """
    # By name: an artifact has a class of its own, from its copy of this file.
    cans: dict[str, Any] = {n: m for n, m in model.named_modules() if type(m).__name__ == TrashCanMoE.__name__}
    zeros = {name: torch.zeros_like(can.trash.worth, dtype=torch.float32) for name, can in cans.items()}
    sums = {name: (zero, zero.clone()) for name, zero in zeros.items()}  # half precision counts to 256

    def watch(name: str) -> Any:
        """Makes a hook that measures each slot by itself."""

        def before(experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            """Runs the experts once more, with one slot a row and weights of one."""
            tokens, index, weights = args
            rows = tokens.repeat_interleave(index.shape[-1], dim=0)
            slots = index.reshape(-1, 1)
            outputs = experts.forward(rows, slots, torch.ones_like(weights).reshape(-1, 1))
            total, count = sums[name]
            total.index_add_(0, slots[:, 0], outputs.float().norm(dim=-1).to(total.dtype))
            count.index_add_(0, slots[:, 0], torch.ones_like(slots[:, 0], dtype=count.dtype))

        return before

    hooks = [can.experts.register_forward_pre_hook(watch(name)) for name, can in cans.items()]
    before = [(can, can.bypass) for can in cans.values()]
    ran = 0
    try:
        for can in cans.values():
            can.bypass = True
        with torch.no_grad():
            for batch in batches:
                model(**{key: tensor for key, tensor in batch.items() if key != "labels"})
                ran += 1
    finally:
        for hook in hooks:
            hook.remove()
        for can, bypass in before:
            can.bypass = bypass
    if not cans or not ran:
        raise ValueError("measure_worth needs a model with a TrashCanMoE, and at least one batch")
    for name, (total, count) in sums.items():
        seen = count > 0
        worth = (total / count.clamp(min=1)).clamp(min=torch.finfo(torch.float32).tiny).log()
        cans[name].trash.worth.copy_(torch.where(seen, worth - worth[seen].mean(), 0.0))
    return {name: can.trash.worth.clone() for name, can in cans.items()}
