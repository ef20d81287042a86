"""Loss terms on what routers do, per layer; `routing.py` reads the routers of all families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from solidify.errors import ObjectiveError
from solidify.losses.routing import SCORES, Routing, read_all, scores_of
from solidify.objective.capture import Capture

ROUTERS = Capture(records="router_logits")
Names = str | Sequence[str] | None


class _OnProbabilities:
    """What terms on probabilities share: P is softmax of the logits, or what `scores` says, or what the weights show.

    `scores` (`softmax`, `sigmoid`, `sqrt_softplus`; default: as the weights show that routers return, else softmax) is
    remembered once shown. P is a token's scores divided by their sum (for sigmoid: DeepSeek-V3, arXiv 2412.19437,
    eq. 19). `modules` names the routers of a module of your own, by one pattern or several (`routers` is its older
    name); else they are those that transformers records, and those that a class declares by an attribute `routers`.
    """

    captures: Mapping[str, Capture] = MappingProxyType({"router": ROUTERS})

    def __init__(self, scores: str | None = None, routers: Names = None, modules: Names = None) -> None:
        self.captures = _select_captures(self.captures, routers, modules)
        if scores is not None and scores not in SCORES:
            raise ObjectiveError(f"a router's scores must be one of {', '.join(SCORES)}, but are {scores!r}")
        self.scores = scores

    def _read_routers(
        self, router: Mapping[str, Any], mask: torch.Tensor, model: nn.Module | None
    ) -> dict[str, tuple[Routing, torch.Tensor]]:
        """Returns each router's routing and probabilities, those of padding zero."""
        routings = dict(read_all(router, mask, model))
        self.scores = self.scores or scores_of(routings.values())
        keep = mask.bool()[:, None]
        return {
            name: (routing, routing.probabilities(self.scores or "softmax").masked_fill(~keep, 0.0))
            for name, routing in routings.items()
        }


class LoadBalance(_OnProbabilities):
    """Per layer `N Σ_i f_i P_i`, then the mean over layers; 1 when every expert gets the same.

    `f_i` is the share of routed slots that go to expert i (no gradient), `P_i` its mean probability: the Switch loss
    (arXiv 2101.03961, eq. 4-6) with the slots of one token counted as shares, per layer. (transformers pools all layers
    before it multiplies, so layers that each collapse onto other experts look balanced; and its balanced value is
    top_k.) Slots that a trash can skips go to no expert and are not counted in `f`.

    `null_experts`: the last so many of the router's columns compute nothing; each of them counts with the mean load of
    all, as in AdaMoE (arXiv 2406.13233, section 3.3), so that only real experts are told apart. Statistic.
    """

    captures: Mapping[str, Capture] = MappingProxyType(
        {"router": ROUTERS, "trash": Capture(class_name="TrashCan", optional=True)}
    )

    def __init__(
        self, null_experts: int = 0, scores: str | None = None, routers: Names = None, modules: Names = None
    ) -> None:
        super().__init__(scores, routers, modules)
        if isinstance(null_experts, bool) or not isinstance(null_experts, int) or null_experts < 0:
            raise ObjectiveError(
                f"load_balance: null_experts must be a whole number of at least 0, but is {null_experts!r}"
            )
        self.null_experts = null_experts

    def statistics(
        self,
        router: Mapping[str, Any],
        trash: Mapping[str, torch.Tensor],
        mask: torch.Tensor,
        model: nn.Module | None = None,
    ) -> torch.Tensor:
        """Returns, per layer, slots per expert and sums of probabilities over attended tokens (layers, 2, experts)."""
        margins = {name.rpartition(".")[0]: margin for name, margin in trash.items()}
        rows = []
        for name, (routing, probabilities) in self._read_routers(router, mask, model).items():
            margin = margins.get(name.rpartition(".")[0])
            counted = mask.bool()[:, None].expand(routing.index.shape)
            if routing.counted is not None:
                counted = counted & routing.counted
            if margin is not None:
                counted = counted & (margin.detach() >= 0)
            if self.null_experts >= routing.logits.shape[-1]:
                raise ObjectiveError(
                    f"load_balance: {self.null_experts} of {routing.logits.shape[-1]} columns of {name} are said to be "
                    "null experts; none would be real"
                )
            slots = probabilities.new_zeros(routing.logits.shape[-1])
            slots = slots.index_add(0, routing.index.flatten(), counted.flatten().to(slots.dtype))
            rows.append(torch.stack([slots, probabilities.sum(0)]))
        return _stack_rows(rows)

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the balance, averaged over layers."""
        slots, probabilities = means[:, 0].detach(), means[:, 1]
        if self.null_experts:
            real = slots.shape[-1] - self.null_experts
            null = slots[:, real:].mean(-1, keepdim=True).expand(-1, self.null_experts)
            slots = torch.cat([slots[:, :real], null], dim=-1)
        shares = slots / slots.sum(-1, keepdim=True).clamp(min=1e-9)
        return (means.shape[-1] * (shares * probabilities).sum(-1)).mean()


class RouterZ:
    """`mean over tokens of logsumexp(router logits)²`, averaged over layers (ST-MoE, arXiv 2202.08906, eq. 5).

    Statistic, linear. Refused for routers that return probabilities, whose logsumexp says nothing. `modules` as in the
    other terms.
    """

    linear = True

    def __init__(self, routers: Names = None, modules: Names = None) -> None:
        self.captures = _select_captures({"router": ROUTERS}, routers, modules)

    def statistics(self, router: Mapping[str, Any], mask: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens (layers,)."""
        sums = []
        for name, routing in read_all(router, mask, model):
            if routing.normal:
                raise ObjectiveError(
                    f"router_z: the router {name} returns probabilities; it has no logits to keep small"
                )
            sums.append(torch.logsumexp(routing.logits[mask.bool()], -1).square().sum())
        return torch.stack(sums)

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the mean over layers."""
        return means.mean()


class RouterEntropy(_OnProbabilities):
    """Mean over tokens of `H(P) = -Σ_i P_i log P_i`, averaged over layers; a positive weight does as `direction` says.

    `direction="sharpen"` (default) returns H: minimised, every token is sent to fewer experts with more certainty.
    `direction="spread"` returns -H: minimised, choices become less certain. Statistic, linear.
    """

    linear = True

    def __init__(
        self,
        direction: str = "sharpen",
        scores: str | None = None,
        routers: Names = None,
        modules: Names = None,
    ) -> None:
        super().__init__(scores, routers, modules)
        if direction not in ("sharpen", "spread"):
            raise ObjectiveError(f"router_entropy: direction must be sharpen or spread, but is {direction!r}")
        self.direction = direction

    def statistics(self, router: Mapping[str, Any], mask: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens of H (layers,)."""
        return torch.stack([torch.special.entr(p).sum() for _, p in self._read_routers(router, mask, model).values()])

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns ±H, averaged over layers."""
        return means.mean() if self.direction == "sharpen" else -means.mean()


class RouterMutualInformation(_OnProbabilities):
    """`-(H(mean P) - mean H(P))` per layer, averaged: minus the mutual information of token and expert.

    A positive weight raises it: each token is routed with certainty, and all experts are used (the objective of
    regularised information maximisation, Krause, Perona and Gomes, NeurIPS 2010, without its regulariser). Between
    -log N and 0. Statistic, not linear.
    """

    def statistics(self, router: Mapping[str, Any], mask: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        """Returns, per layer, sums over attended tokens of P and of H(P) (layers, experts + 1)."""
        return _stack_rows(
            [
                torch.cat([p.sum(0), torch.special.entr(p).sum().reshape(1)])
                for _, p in self._read_routers(router, mask, model).values()
            ]
        )

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns minus the mutual information in nats, averaged over layers."""
        total: torch.Tensor = (means[:, -1] - torch.special.entr(means[:, :-1]).sum(-1)).mean()
        return total


def _select_captures(captures: Mapping[str, Capture], routers: Names, modules: Names) -> dict[str, Capture]:
    """Returns captures with the routers found by name, where they are named."""
    if routers is not None and modules is not None:
        raise ObjectiveError("`routers` is the older name of `modules`; give one of them")
    named = modules if modules is not None else routers
    return {**captures, **({"router": Capture(modules=named)} if named is not None else {})}


def _stack_rows(rows: list[torch.Tensor]) -> torch.Tensor:
    if len({row.shape for row in rows}) > 1:
        raise ObjectiveError(
            f"the routers have different numbers of columns ({', '.join(str(r.shape[-1]) for r in rows)}); a term is "
            "about routers of one kind"
        )
    return torch.stack(rows)
