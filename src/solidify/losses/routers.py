"""Loss terms on what routers do, per layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture

ROUTERS = Capture(records="router_logits")


class LoadBalance:
    """Per layer `N Σ_i f_i P_i`, then the mean over layers; 1 when every expert gets the same.

    `f_i` is the share of routed slots that go to expert i (no gradient), `P_i` its mean probability: the Switch loss
    (arXiv 2101.03961, eq. 4-6) with the slots of one token counted as shares, per layer. (transformers pools all layers
    before it multiplies, so layers that each collapse onto other experts look balanced; and its balanced value is
    top_k.) Slots that a trash can skips go to no expert and are not counted in `f`.
    """

    captures: ClassVar[dict[str, Capture]] = {
        "router": ROUTERS,
        "trash": Capture(class_name="TrashCan", optional=True),
    }

    def statistics(
        self, router: Mapping[str, Any], trash: Mapping[str, torch.Tensor], mask: torch.Tensor
    ) -> torch.Tensor:
        """Returns, per layer, slots per expert and sums of probabilities over attended tokens (layers, 2, experts)."""
        margins = {name.rpartition(".")[0]: margin for name, margin in trash.items()}
        rows = []
        for name, output in router.items():
            logits, index = _routing(name, output)
            margin = margins.get(name.rpartition(".")[0])
            counted = mask[:, None].expand(index.shape).to(torch.float32)
            if margin is not None:
                counted = counted * (margin.detach() >= 0)
            slots = counted.new_zeros(logits.shape[-1]).index_add(0, index.flatten(), counted.flatten())
            probabilities = F.softmax(logits.float(), dim=-1)
            rows.append(torch.stack([slots, (probabilities * mask[:, None]).sum(0)]))
        return torch.stack(rows)

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the balance, averaged over layers."""
        slots, probabilities = means[:, 0].detach(), means[:, 1]
        shares = slots / slots.sum(-1, keepdim=True).clamp(min=1e-9)
        return (means.shape[-1] * (shares * probabilities).sum(-1)).mean()


class RouterZ:
    """`mean over tokens of logsumexp(router logits)²`, averaged over layers (ST-MoE, arXiv 2202.08906, eq. 5)."""

    captures: ClassVar[dict[str, Capture]] = {"router": ROUTERS}
    linear = True

    def statistics(self, router: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens (layers,)."""
        logits = [_routing(name, output)[0] for name, output in router.items()]
        return torch.stack([(torch.logsumexp(row.float(), -1).square() * mask).sum() for row in logits])

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the mean over layers."""
        return means.mean()


def _routing(name: str, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (tokens, experts) and indices (tokens, top_k) of a router's output."""
    if not isinstance(output, tuple) or len(output) < 3:
        raise ObjectiveError(f"the router {name} does not return (logits, weights, indices)")
    return output[0], output[2]
