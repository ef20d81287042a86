"""Reads what a router returned, whatever its family: its logits, the experts that it chose, its probabilities.

The families of transformers 5.23 return tuples of different order and length. Where the logits stand is transformers'
own record (`_can_record_outputs`); the rest is read off the tensors:

- logits: floating, one row a token, one column an expert. Some families (Gemma 4) record probabilities there.
- chosen experts: an integer tensor (tokens, top_k); or a matrix with one column an expert, zero where it was not chosen
  (Llama 4, Switch, NLLB); else (DBRX, JetMoE) the `top_k` largest logits, `top_k` being the router's, its
  holder's or its configuration's. A slot whose weight is zero goes to no expert (Zaya's skipped tokens, Switch's beyond
  capacity).
- scores: what the experts are weighed by as a function of their logits: exp (softmax), sigmoid, or sqrt(softplus).
  Weights of one token that are returned beside its experts tell which; where nothing tells, softmax.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.losses.precision import wide
from solidify.objective.capture import recorded

SCORES = ("softmax", "sigmoid", "sqrt_softplus")

# How configurations of transformers 5.23 call the number of experts a token is sent to.
_TOP_K = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Routing:
    """One router's decisions: `logits` (tokens, experts), `index` (tokens, top_k) into them, `weights` if it said any.

    `counted` (tokens, top_k) is False where a slot goes to no expert.
    `normal` says that the logits are logarithms of probabilities already, so that their own size means nothing.
    """

    logits: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    normal: bool = False

    def probabilities(self, scores: str) -> torch.Tensor:
        """Returns P (tokens, experts), the scores of a token divided by their sum, in float32."""
        return F.softmax(_log_scores(self.logits, scores), dim=-1)


def read(name: str, output: Any, tokens: int, model: nn.Module | None = None) -> Routing:
    """Returns the routing of `tokens` positions that the router called `name` returned; `model` says where logits are.

    Raises:
        ObjectiveError: there are no logits with one row a token, or nothing tells how many experts were chosen.
    """
    module = lookup.at(model, name) if model is not None else None
    parts, logits_index = _list_parts(output), _find_index(model, module)
    tensor = _read_logits(name, parts, logits_index)
    logits = wide(tensor.reshape(-1, tensor.shape[-1]))
    if len(logits) != tokens:
        raise ObjectiveError(
            f"the router {name} returned logits {list(tensor.shape)} for {tokens} positions; a term on routers needs "
            "one row for each"
        )
    normal = bool(len(logits)) and bool((logits.detach().sum(-1) - 1).abs().max() < 1e-3) and bool((logits >= 0).all())
    if normal:
        logits = logits.clamp(min=torch.finfo(torch.float32).tiny).log()
    others = [t.reshape(-1, t.shape[-1]) for i, t in enumerate(parts) if i != logits_index and _is_per_token(t, tokens)]
    index = next((t for t in others if not t.is_floating_point() and not t.is_complex()), None)
    dense = next((t for t in others if t.shape == logits.shape and _is_sparse(t)), None)
    if index is None and dense is None:
        k = _top_k(name, model)
        return Routing(logits, logits.detach().topk(min(k, logits.shape[-1]), dim=-1).indices, normal=normal)
    if index is None or (index.shape == logits.shape and dense is index):  # one column an expert
        assert dense is not None
        chosen = dense.detach().topk(max(1, int((dense != 0).sum(-1).max())), dim=-1)
        weights = chosen.values if dense.is_floating_point() else None
        return Routing(logits, chosen.indices, weights, chosen.values != 0, normal)
    weights = next((t for t in others if t.is_floating_point() and t.shape == index.shape), None)
    return Routing(logits, index.long(), weights, weights.detach() != 0 if weights is not None else None, normal)


def read_all(router: Mapping[str, Any], mask: torch.Tensor, model: nn.Module | None) -> Iterator[tuple[str, Routing]]:
    """Yields every router's name and routing of all positions of the batch; what two modules record counts once."""
    seen: list[torch.Tensor] = []
    for name, output in router.items():
        index = _find_index(model, lookup.at(model, name) if model is not None else None)
        tensor = _read_logits(name, _list_parts(output), index)
        if not any(tensor is other for other in seen):  # JetMoE's attention passes on what its router returned
            seen.append(tensor)
            yield name, read(name, output, len(mask), model)


def scores_of(routings: Iterable[Routing]) -> str | None:
    """Returns which of `SCORES` the routers' weights show, or None where they fit none or several.

    Whatever a token's weights were normalised or scaled by, logarithms of two of them differ as those of the scores do;
    a single one (top_k = 1) is compared as it is.
    """
    worst = dict.fromkeys(SCORES, 0.0)
    has_weights, tolerance = False, 1e-3
    for routing in routings:
        if routing.weights is None or not routing.weights.numel() or routing.normal:
            continue
        has_weights = True
        tolerance = 2e-2 if routing.weights.dtype in (torch.bfloat16, torch.float16) else tolerance
        index = routing.index.clamp(max=routing.logits.shape[-1] - 1)
        weights = routing.weights.detach().double()
        largest = weights.argmax(-1, keepdim=True)
        readable = weights > 1e-20  # below, float32 has no digits left
        weights = weights.clamp(min=1e-20).log()
        for scores in SCORES:
            log = _log_scores(routing.logits.detach().double(), scores)
            if index.shape[-1] == 1:
                log = F.log_softmax(log, dim=-1) if scores == "softmax" else log
            error = weights - log.gather(-1, index)
            if index.shape[-1] > 1:
                error = error - error.gather(-1, largest)
            worst[scores] = max(worst[scores], float(error.where(readable, 0.0).abs().max()))
    best, second = sorted(worst, key=lambda scores: worst[scores])[:2]
    fits = has_weights and worst[best] < tolerance and worst[second] > 8 * max(worst[best], 1e-6)
    return best if fits else None


def _log_scores(logits: torch.Tensor, scores: str) -> torch.Tensor:
    if scores == "softmax":
        return logits
    if scores == "sigmoid":
        return F.logsigmoid(logits)
    return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).log() / 2


def _is_sparse(tensor: torch.Tensor) -> bool:
    """Returns whether a matrix (tokens, experts) holds weights, or marks, of few experts a token and else zeros."""
    if tensor.is_floating_point():
        return bool((tensor == 0).any()) and bool((tensor >= 0).all())
    return tensor.shape[-1] > 2 and bool(tensor.numel()) and int(tensor.max()) <= 1


def _is_per_token(tensor: Any, tokens: int) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and tensor.numel() == tokens * tensor.shape[-1]


def _list_parts(output: Any) -> list[Any]:
    return list(output) if isinstance(output, (tuple, list)) else [output]


def _read_logits(name: str, parts: list[Any], index: int) -> torch.Tensor:
    tensor = parts[index] if index < len(parts) else None
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.ndim < 2:
        raise ObjectiveError(f"the router {name} returned no logits at index {index} of what it returns")
    return tensor


def _find_index(model: nn.Module | None, router: lookup.Located | None) -> int:
    """Returns where in a router's output transformers records its logits; 0 where it says nothing."""
    if model is None or router is None:
        return 0
    indices = recorded(model, "router_logits")
    return next((index for cls, index in indices.items() if isinstance(router.inner, cls)), 0)


def _top_k(name: str, model: nn.Module | None) -> int:
    """Returns how many experts a token is sent to, where the router did not return which.

    The router says it (`top_k`), or the module that holds it, or the configuration.
    """
    for where in (name, name.rpartition(".")[0]):
        located = lookup.at(model, where) if where and model is not None else None
        own = getattr(located.inner, "top_k", None) if located is not None else None
        if isinstance(own, int):
            return own
    for config in _list_configs(model):
        for key in _TOP_K:
            value = getattr(config, key, None)
            if isinstance(value, int):
                return value
    raise ObjectiveError(
        f"the router {name} returned no indices, and neither it (`top_k`) nor the module that holds it nor the "
        f"configuration ({', '.join(_TOP_K)}) says how many experts a token is sent to"
    )


def _list_configs(model: nn.Module | None) -> list[PreTrainedConfig]:
    config = getattr(lookup.plain_model(model), "config", None) if model is not None else None
    found = [config] if isinstance(config, PreTrainedConfig) else []
    for each in found:  # grows while it is walked: configurations hold configurations
        found += [value for value in vars(each).values() if isinstance(value, PreTrainedConfig)]
    return found
