"""Weights of terms that move: with the step, or so that a measured quantity is held at a target.

Every kind has `at(step, steps)`, the weight in a step (from 1 on), and `observe(measured)`, which is told after each
step what the quantity was over the whole window. What changes is saved in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from solidify.errors import ObjectiveError, refuse
from solidify.system import foreign

SHAPES = ("linear", "cosine", "exponential")
BOUNDS = ("at_most", "at_least", "equal")


@runtime_checkable
class Weight(Protocol):
    """What a term's weight must be able to do."""

    def at(self, step: int, steps: int) -> float:
        """Returns the weight in `step`, counted from 1, of `steps` planned (0 where that is not known)."""

    def observe(self, measured: float) -> None:
        """Is told the quantity that the weight follows, after each step."""


@dataclass
class Constant:
    """A weight that stays."""

    value: float

    def at(self, step: int, steps: int) -> float:
        """Returns the value."""
        return self.value

    def observe(self, measured: float) -> None:
        """Learns nothing."""


@dataclass
class Schedule:
    """From `start` to `end` between the steps `begin` and `begin + length`, constant outside.

    `shape` is linear, cosine or exponential (both ends positive). `begin` and `length` are numbers of optimizer steps;
    where they lie between 0 and 1 (and are not whole numbers) they are shares of all planned steps, like
    `warmup_steps` of TrainingArguments. Without `length` it ends with the training.
    """

    start: float
    end: float
    shape: str = "linear"
    begin: float = 0
    length: float | None = None

    def __post_init__(self) -> None:
        """Refuses shapes that are not known and ends that an exponential cannot join."""
        faults = []
        if self.shape not in SHAPES:
            faults.append(f"`shape` must be one of {', '.join(SHAPES)}, but is {self.shape!r}")
        if self.shape == "exponential" and min(self.start, self.end) <= 0:
            faults.append(
                f"an exponential schedule needs a positive start and end, but has {self.start} and {self.end}"
            )
        if self.begin < 0 or (self.length is not None and self.length <= 0):
            faults.append("`begin` must not be negative, and `length` must be positive")
        refuse(ObjectiveError, "the weight's schedule is not valid", faults)

    def at(self, step: int, steps: int) -> float:
        """Returns the weight in a step.

        Raises:
            ObjectiveError: the schedule is a share of the training, whose number of steps is not known.
        """
        begin = self._count_steps(self.begin, steps)
        length = (
            self._count_steps(self.length, steps)
            if self.length is not None
            else self._count_steps(1.0, steps, share=True) - begin
        )
        x = min(1.0, max(0.0, (step - 1 - begin) / max(length - 1, 1)))
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        if self.shape == "exponential":
            return float(self.start ** (1 - x) * self.end**x)
        return self.start + (self.end - self.start) * x

    def observe(self, measured: float) -> None:
        """Learns nothing."""

    def _count_steps(self, amount: float, steps: int, *, share: bool = False) -> float:
        if not share and (amount >= 1 or amount == 0):
            return amount
        if not steps:
            raise ObjectiveError(
                "a weight's schedule is given as a share of the training, but the number of steps is unknown: pass "
                "`steps`, or give `begin` and `length` as numbers of steps"
            )
        return amount * steps


@dataclass
class Constraint:
    """A multiplier that holds a measured quantity `at_most`, `at_least` or `equal` to a target.

    The quantity is the unweighted value of the term itself, or of the term that `measure` names. After each step

        λ ← λ + rate · (measured - target)           (sign turned for at_least; λ >= 0 unless equal)

    which is gradient ascent on the Lagrangian (Platt and Barr, Constrained Differential Optimization, NIPS 1987). With
    a `factor` the multiplier is multiplied instead, λ ← λ · factor^sign(measured - target), as ReMoE adapts its L1
    coefficient (arXiv 2412.14711); it then starts above zero. `momentum` smooths what is measured.

    A multiplier alone swings around its target; `damping` adds damping · (measured - target) to the weight, the
    proportional part of Stooke et al. (Responsive Safety by PID Lagrangian Methods, arXiv 2007.03964). The weight is λ,
    and -λ where the term itself must be at least the target: minimising then raises it.
    """

    target: float
    bound: str = "at_most"
    rate: float = 0.1
    damping: float = 0.0
    factor: float | None = None
    start: float = 0.0
    largest: float = math.inf
    momentum: float = 0.0
    measure: str | None = None

    def __post_init__(self) -> None:
        """Refuses what could never hold anything."""
        faults = []
        if self.bound not in BOUNDS:
            faults.append(f"`bound` must be one of {', '.join(BOUNDS)}, but is {self.bound!r}")
        if self.rate <= 0:
            faults.append(f"`rate` must be positive, but is {self.rate}")
        if self.factor is not None and (self.factor <= 1 or self.start <= 0):
            faults.append("a `factor` must be above 1, and needs a `start` above 0")
        if self.factor is not None and self.bound == "equal":
            faults.append("a `factor` keeps the sign of the multiplier, so `equal` needs a `rate`")
        if self.damping < 0 or (self.damping and self.factor is not None):
            faults.append("`damping` must not be negative, and belongs to a `rate`")
        if not 0 <= self.momentum < 1:
            faults.append(f"`momentum` must be at least 0 and below 1, but is {self.momentum}")
        refuse(ObjectiveError, "the weight's constraint is not valid", faults)
        self.multiplier = self.start
        self.measured: float | None = None

    def at(self, step: int, steps: int) -> float:
        """Returns the multiplier, signed for the term that it weighs."""
        weight = self._clamp_weight(self.multiplier + self.damping * self._compute_excess())
        return -weight if self.bound == "at_least" and self.measure is None else weight

    def observe(self, measured: float) -> None:
        """Moves the multiplier."""
        last = measured if self.measured is None else self.measured
        self.measured = self.momentum * last + (1 - self.momentum) * measured
        excess = self._compute_excess()
        if self.factor is not None:
            self.multiplier *= self.factor ** ((excess > 0) - (excess < 0))
        else:
            self.multiplier += self.rate * excess
        self.multiplier = self._clamp_weight(self.multiplier)

    def _compute_excess(self) -> float:
        if self.measured is None:
            return 0.0
        return (self.measured - self.target) * (-1 if self.bound == "at_least" else 1)

    def _clamp_weight(self, weight: float) -> float:
        return min(self.largest, max(-self.largest if self.bound == "equal" else 0.0, weight))


_KINDS: dict[str, type[Any]] = {"schedule": Schedule, "constraint": Constraint}


def make(weight: float | Weight | Mapping[str, Any]) -> Weight:
    """Makes a weight of a number, of `{"schedule": {...}}` or of `{"constraint": {...}}`.

    Raises:
        ObjectiveError: it is none of these, or has settings that its kind does not know.
    """
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        if not math.isfinite(weight):
            raise ObjectiveError(f"a weight must be finite, but is {weight}")
        return Constant(float(weight))
    if isinstance(weight, Mapping):
        if len(weight) != 1 or next(iter(weight)) not in _KINDS:
            raise ObjectiveError(
                f"a weight must be a number, {{schedule: ...}} or {{constraint: ...}}, but is {dict(weight)}"
            )
        kind, settings = next(iter(weight.items()))
        with foreign.calling(f"the weight's {kind} does not fit", ObjectiveError):
            made: Weight = _KINDS[kind](**settings)
        return made
    if isinstance(weight, Weight):
        return weight
    raise ObjectiveError(
        f"a weight must be a number, a schedule or a constraint, but is of type {type(weight).__name__}"
    )
