"""Loss terms and a controller for how much a model computes: the share of expert slots that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from solidify.adapter import standing
from solidify.errors import ObjectiveError
from solidify.modules.trashcan_moe import ASLEEP
from solidify.objective.capture import Capture

TRASH = Capture(class_name="TrashCan")


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


def _share(term: str, target: float) -> None:
    if not 0 < target <= 1:
        raise ObjectiveError(f"{term}: target is the share of slots to keep, between 0 and 1, but is {target}")
