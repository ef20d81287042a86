"""Loss terms and a controller for how much a model computes: the share of expert slots that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.losses.arguments import number, positive, share
from solidify.losses.precision import wide
from solidify.modules.trashcan_moe import ASLEEP
from solidify.objective.capture import Capture

TRASH = Capture(class_name="TrashCan")

# Log-probabilities are counted in bins of this width between these bounds; all are exact in binary.
WIDTH, LOWEST, HIGHEST = 1 / 32, -80, 16
_BINS = int((HIGHEST - LOWEST) / WIDTH)


class KeptShare:
    """`mean over layers, tokens and slots of sigmoid(margin/τ)`: how much of the routed slots is kept, softly.

    As it is: a constraint says what to make of it (`weight: {constraint: {target: 0.75, bound: equal}}`). Statistic,
    linear.
    """

    captures: ClassVar[dict[str, Capture]] = {"trash": TRASH}
    linear = True

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = positive("a soft kept share", "temperature", temperature)

    def statistics(self, trash: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens of the soft kept share (layers,)."""
        return torch.stack([(torch.sigmoid(wide(m) / self.temperature).mean(-1) * mask).sum() for m in trash.values()])

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the share, averaged over layers."""
        return means.mean()

    @staticmethod
    def shown(means: torch.Tensor) -> dict[str, float]:
        """Returns the soft kept share, averaged over layers, for the log."""
        return {"kept": float(means.mean())}


class TrashBudget(KeptShare):
    """`mean over layers of (mean over tokens and slots of sigmoid(margin/τ) - target)²`.

    `target` is the share of routed slots that shall be kept; the mean is a soft count of the slots whose
    log-probability beats the trash can's threshold. A trash can that is asleep (threshold -10000) gets no gradient:
    wake it with `trash_controller` or a `threshold` argument. Statistic.
    """

    linear = False

    def __init__(self, target: float, temperature: float = 1.0) -> None:
        _check_share("trash_budget", target)
        super().__init__(temperature)
        self.target = target

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the squared distance from the target, averaged over layers."""
        return (means - self.target).square().mean()


class BetaPrior(TrashBudget):
    """`mean over layers of κ KL(Bernoulli(target) ‖ Bernoulli(kept))`: a Beta prior on the soft kept share.

    The negative logarithm of Beta(a, b) at the share r of trash is `-[(a-1) log r + (b-1) log(1-r)]`, lowest at
    `(a-1)/(a+b-2)`; here with `target = 1 - (a-1)/(a+b-2)`, `concentration` κ = a+b-2, and its lowest value subtracted.
    Unlike the budget's square it grows without bound when all or nothing is kept. Statistic.
    """

    def __init__(self, target: float, concentration: float = 1.0, temperature: float = 1.0) -> None:
        _check_share("beta_prior", target)
        super().__init__(target, temperature)
        self.concentration = positive("beta_prior", "concentration", concentration)

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the divergence from the target, averaged over layers; 0 at the target."""
        kept = means.clamp(1e-6, 1 - 1e-6)
        target = torch.full_like(kept, self.target)
        lowest = torch.special.entr(target) + torch.special.entr(1 - target)
        cross = -(torch.xlogy(target, kept) + torch.xlogy(1 - target, 1 - kept))
        distance: torch.Tensor = (cross - lowest).mean()
        return self.concentration * distance


class TrashController:
    """Moves every trash can's threshold so that the kept share follows a ramp from 1 down to `target`; no loss.

    After each optimizer step, per layer: `kept ← momentum·kept + (1-momentum)·measured`, then
    `c ← c + rate·(kept - wanted)`. Proportional form of LongCat-Flash's rule for its zero experts (arXiv 2509.01322),
    with the sign moved to the trash can's one bias. Both numbers are buffers of the module, so checkpoints hold the
    controller's state.

    A trash can that is asleep is first woken: in the first step its margins are counted in bins of 1/32, and the
    threshold is set to the lower edge of the bin that holds their `start` quantile, so that at most that share is
    skipped. Counts are integers: their sums over micro-batches and ranks are exact, whatever the split.
    """

    captures: ClassVar[dict[str, Capture]] = {"trash": TRASH}

    def __init__(
        self, target: float, rate: float = 0.2, ramp: float = 0.5, momentum: float = 0.9, start: float = 0.005
    ) -> None:
        _check_share("trash_controller", target)
        self.target = target
        self.rate = positive("trash_controller", "rate", rate)
        self.ramp = share("trash_controller", "ramp", ramp)
        self.momentum = share("trash_controller", "momentum", momentum)
        self.start = share("trash_controller", "start", start)

    def statistics(self, trash: Mapping[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Returns, per layer, how many slots of attended tokens are kept, then how many there are, then how many of
        those that are asleep fall into each bin (layers, 2 + bins)."""
        rows = []
        for margin in trash.values():
            attended = margin.detach()[mask.bool()].flatten()
            # float32 counts to 2^24 without error; a device without float64 (mps) has no larger windows.
            bins = torch.bincount(_find_bins(attended[attended > -ASLEEP / 2]), minlength=_BINS)
            counts = torch.stack([(attended >= 0).sum(), attended.new_full((), attended.numel(), dtype=torch.long)])
            rows.append(torch.cat([counts, bins]))
        counted = torch.stack(rows)
        return counted.to(torch.float32 if counted.device.type == "mps" else torch.float64)

    def bind(self, model: nn.Module) -> None:
        """Refuses a model whose trash cans it could not move so that it is saved.

        Raises:
            ObjectiveError: one of them is frozen beside an adapter.
        """
        for located in _find_cans(model):
            if located.called is located.inner and lookup.peft_model(model) is not None:
                raise ObjectiveError(
                    f"trash_controller moves the threshold of {located.name}, but that module is frozen and would not "
                    "be saved; name it in `adapter.train`"
                )

    @staticmethod
    def shown(means: torch.Tensor) -> dict[str, float]:
        """Returns the share of slots that are kept, over all layers, for the log."""
        return {"kept": float(means[:, 0].sum() / means[:, 1].sum().clamp(min=torch.finfo(means.dtype).tiny))}

    def after_step(self, model: nn.Module, means: torch.Tensor, step: int, steps: int) -> None:
        """Moves the thresholds; `means` is (layers, 2 + bins) over the whole window."""
        wanted = 1 - (1 - self.target) * min(1.0, step / max(1.0, self.ramp * steps))
        for located, row in zip(_find_cans(model), means, strict=True):
            can: Any = located.inner
            kept, slots, bins = row[0], row[1], row[2:]
            with torch.no_grad():
                if float(can.bias) <= ASLEEP / 2:
                    if bool(bins.any()):
                        can.bias += _find_edge(bins, self.start) - ASLEEP
                    continue
                share = (kept / slots.clamp(min=torch.finfo(slots.dtype).tiny)).to(can.kept)
                can.kept.mul_(self.momentum).add_((1 - self.momentum) * share)
                can.bias += self.rate * (can.kept - wanted)


def _find_cans(model: nn.Module) -> list[lookup.Located]:
    return [located for located in lookup.modules(model) if type(located.inner).__name__ == "TrashCan"]


def _find_bins(asleep: torch.Tensor) -> torch.Tensor:
    """Returns the bins of margins that are those of a can asleep: log-probability plus 10000."""
    return ((asleep + ASLEEP - LOWEST) / WIDTH).floor().clamp(0, _BINS - 1).long()


def _find_edge(bins: torch.Tensor, quantile: float) -> float:
    """Returns the lower edge of the bin that holds the quantile of what was counted; at most that share lies below."""
    below = bins.cumsum(0)
    index = int((below <= quantile * below[-1]).sum())
    return LOWEST + WIDTH * min(index, _BINS - 1)


def _check_share(term: str, target: float) -> None:
    if not 0 < number(term, "target", target) <= 1:
        raise ObjectiveError(f"{term}: target (the share of slots to keep) must be between 0 and 1, but is {target}")
