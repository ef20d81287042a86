"""Ready-made loss terms. A recipe names them `solidify.losses:trash_budget`; Python uses them in `Term(...)`.

Each says what is supplied to it by the names of its parameters (see `solidify.tuning.objective`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.model import anatomy
from solidify.modules.trashcan_moe import ASLEEP
from solidify.tuning import standing
from solidify.tuning.capture import Capture

TRASH = Capture(class_name="TrashCan")
ROUTERS = Capture(records="router_logits")


class WeightPenalty:
    """`norm/2 Σ‖θ‖²` for l2, `Σ|θ|` for l1, over the parameters that `parameters` names (default: what is trained).

    Names are those of the plain model, also under PEFT; the parts of a LoRA update are named by its target. Counted
    once per optimizer step. AdamW's decoupled weight decay is something else: it is not in the loss.
    """

    reduction = "constant"

    def __init__(self, parameters: str | list[str] | None = None, norm: str = "l2") -> None:
        if norm not in ("l1", "l2"):
            raise ObjectiveError(f"weight_penalty: norm must be l1 or l2, but is {norm!r}")
        self.parameters = parameters
        self.norm = norm

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32."""
        terms = [p.float().square().sum() / 2 if self.norm == "l2" else p.float().abs().sum() for p in self._of(model)]
        return torch.stack(terms).sum()

    def _of(self, model: nn.Module) -> list[nn.Parameter]:
        peft_model = standing.peft_model(model)
        named = (
            [(name, p) for _, name, p in standing.named_parameters(peft_model)]
            if peft_model is not None
            else list(model.named_parameters())
        )
        if self.parameters is None:
            chosen = [p for _, p in named if p.requires_grad]
        else:
            hits = anatomy.match(self.parameters, dict.fromkeys(name for name, _ in named))
            empty = [pattern for pattern, found in hits.items() if not found]
            if empty:
                raise ObjectiveError(f"weight_penalty: {', '.join(map(repr, empty))} names no parameter")
            names = {name for found in hits.values() for name in found}
            active = {id(p) for p in _active(model)}
            chosen = [p for name, p in named if name in names and id(p) in active]
        if not chosen:
            raise ObjectiveError("weight_penalty: there is nothing to penalise")
        return list({id(p): p for p in chosen}.values())


def _active(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that take part in the forward pass now, LoRA's included; no frozen twin of a copy."""
    parameters = []
    for place in standing.modules(model):
        parameters += list(place.inner.parameters(recurse=False))
        if place.called is not place.inner:
            inside = {id(p) for p in place.inner.parameters()}
            parameters += [p for p in place.called.parameters() if p.requires_grad and id(p) not in inside]
    return parameters


class TrashBudget:
    """`mean over layers of (mean over tokens and slots of sigmoid(margin/τ) - target)²`.

    `target` is the share of routed slots that shall be kept; the mean is a soft count of the slots whose
    log-probability beats the trash can's threshold. A trash can that is asleep (threshold -10000) gets no gradient:
    wake it with `trash_controller` or a `threshold` argument.
    """

    captures: ClassVar[dict[str, Capture]] = {"trash": TRASH}

    def __init__(self, target: float, temperature: float = 1.0) -> None:
        _share("trash_budget", target)
        self.target = target
        self.temperature = temperature

    def statistics(self, trash: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens of the soft kept share (layers,)."""
        return torch.stack([(torch.sigmoid(m / self.temperature).mean(-1) * mask).sum() for m in trash.values()])

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the squared distance from the target, averaged over layers."""
        return (means - self.target).square().mean()


class TrashController:
    """Moves every trash can's threshold so that the kept share follows a ramp from 1 down to `target`; no loss.

    After each optimizer step, per layer: `kept ← momentum·kept + (1-momentum)·measured`, then
    `c ← c + rate·(kept - wanted)`. Proportional form of LongCat-Flash's rule for its zero experts (arXiv 2509.01322),
    with the sign moved to the trash can's one bias. A trash can that is asleep is first set to the `start` quantile of
    the margins in the first step. Both numbers are buffers of the module, so checkpoints hold the controller's state.
    """

    captures: ClassVar[dict[str, Capture]] = {"trash": TRASH}

    def __init__(
        self, target: float, rate: float = 0.2, ramp: float = 0.5, momentum: float = 0.9, start: float = 0.005
    ) -> None:
        _share("trash_controller", target)
        self.target = target
        self.rate = rate
        self.ramp = ramp
        self.momentum = momentum
        self.start = start
        self._first: dict[str, list[torch.Tensor]] = {}

    def statistics(self, trash: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens of the kept share and of the start quantile (layers, 2)."""
        rows = []
        for margin in trash.values():
            attended = margin.detach()[mask.bool()]
            some = bool(attended.numel())
            quantile = torch.quantile(attended.flatten(), self.start) if some else margin.new_zeros(())
            kept = ((margin.detach() >= 0).float().mean(-1) * mask).sum()
            rows.append(torch.stack([kept, quantile * mask.sum()]))
        return torch.stack(rows)

    def after_step(self, model: nn.Module, means: torch.Tensor, step: int, steps: int) -> None:
        """Moves the thresholds; `means` is (layers, 2) over the whole window."""
        wanted = 1 - (1 - self.target) * min(1.0, step / max(1.0, self.ramp * steps))
        cans = [place for place in standing.modules(model) if type(place.inner).__name__ == "TrashCan"]
        for place, (kept, quantile) in zip(cans, means, strict=True):
            if place.called is place.inner and standing.peft_model(model) is not None:
                raise ObjectiveError(
                    f"trash_controller moves the threshold of {place.name}, but that module is frozen and would not be "
                    "saved; name it in `adapter.train`"
                )
            can: Any = place.inner
            with torch.no_grad():
                if float(can.bias) <= ASLEEP / 2:
                    can.bias += quantile.to(can.bias)
                    continue
                can.kept.mul_(self.momentum).add_((1 - self.momentum) * kept.to(can.kept))
                can.bias += self.rate * (can.kept - wanted)


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


class KLToBase:
    """`τ² KL(p_base ‖ p)` summed over target tokens, p at temperature τ; the base is the unmodified model.

    Distillation as in Hinton et al. (arXiv 1503.02531), forward direction.
    """

    reduction = "token_sum"

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def __call__(self, logits: torch.Tensor, reference_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (batch_size, sequence_length, vocab_size) and labels with -100 where nothing is predicted."""
        targets = labels[:, 1:] != -100
        ours = F.log_softmax(logits[:, :-1][targets].float() / self.temperature, dim=-1)
        base = F.log_softmax(reference_logits[:, :-1][targets].float() / self.temperature, dim=-1)
        return self.temperature**2 * F.kl_div(ours, base, log_target=True, reduction="sum")


def _routing(name: str, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (tokens, experts) and indices (tokens, top_k) of a router's output."""
    if not isinstance(output, tuple) or len(output) < 3:
        raise ObjectiveError(f"the router {name} does not return (logits, weights, indices)")
    return output[0], output[2]


def _share(term: str, target: float) -> None:
    if not 0 < target <= 1:
        raise ObjectiveError(f"{term}: target is the share of slots to keep, between 0 and 1, but is {target}")


# The names that recipes use.
weight_penalty = WeightPenalty
trash_budget = TrashBudget
trash_controller = TrashController
load_balance = LoadBalance
router_z = RouterZ
kl_to_base = KLToBase
