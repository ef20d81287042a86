"""What each term really is in the first step: its value, its weight, and how much of the gradient it makes.

A term that cannot change anything is refused there and then. One whose gradient is zero (a penalty of zeros, a
divergence from the model itself, a sleeping gate) may wake later: it is looked at again in the first steps, then ever
more rarely, and in the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from solidify.errors import ObjectiveError, refuse
from solidify.objective.objective import Objective
from solidify.objective.term import Part
from solidify.objective.weights import Constant
from solidify.objective.window import Counts
from solidify.system import processes

OFTEN = 8  # steps in each of which a term without a gradient is looked at
ROUNDING = 1e-6  # of the largest gradient: what is left in float32 of a sum that cancels


@dataclass(frozen=True)
class Row:
    """One term in one micro-batch: its share without and with its weight, and the norm of the latter's gradient.

    `gradient` is None where it was not measured: a compiled or sharded model keeps its graph to itself.
    """

    name: str
    value: float
    weighted: float
    gradient: float | None


class Sanity:
    """Looks at the terms of an objective. `rows` is the first step's table; `reached` says whose gradient was seen."""

    def __init__(self, objective: Objective) -> None:
        self.measures = True
        self.rows: list[Row] = []
        self.reached: dict[str, bool] = {}
        self._idle = {
            term.name for term in objective.terms if isinstance(term.weight, Constant) and not term.weight.value
        }
        self._looked = -1
        self._largest = 0.0

    def look(self, parts: Mapping[str, Part], model: nn.Module, counts: Counts, step: int, steps: int = 0) -> None:
        """Looks at one micro-batch, if it is time to; `step` counts the steps taken so far, of `steps` planned.

        Raises:
            ObjectiveError: a term with a weight has no path to anything that is trained.
        """
        first = not self.rows
        due = step < OFTEN or step & (step + 1) == 0 or step + 1 == steps
        again = due and any(not reached for reached in self.reached.values())
        if not torch.is_grad_enabled() or not counts.target_tokens or step == self._looked or not (first or again):
            return
        self._looked = step
        if first:
            refuse(
                ObjectiveError,
                "a term of the objective is a constant",
                [
                    f"{name} does not depend on anything that is trained; give it weight 0 to log it only, or train "
                    "what it looks at"
                    for name, part in parts.items()
                    if not part.loss.requires_grad and name not in self._idle
                ],
            )
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        measures = self.measures and not processes.is_spread(model)
        norms = {
            name: _compute_norm(part.loss, trained) if measures and part.loss.requires_grad else None
            for name, part in parts.items()
            if first or not self.reached.get(name, True)
        }
        self._largest = max(self._largest, *(norm for norm in norms.values() if norm is not None), 0.0)
        for name, norm in norms.items():
            if norm is not None and name not in self._idle:
                self.reached[name] = self.reached.get(name, False) or norm > ROUNDING * self._largest
        if first:
            self.rows = [Row(n, float(p.value), float(p.loss.detach()), norms[n]) for n, p in parts.items()]

    @property
    def silent(self) -> list[str]:
        """Names the terms whose gradient was zero whenever it was looked at."""
        return [name for name, reached in self.reached.items() if not reached]

    def state_dict(self) -> dict[str, Any]:
        """Returns what was seen, for a checkpoint."""
        return {"rows": [vars(row) for row in self.rows], "reached": dict(self.reached), "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it back."""
        self.rows, self.reached = [Row(**row) for row in state["rows"]], dict(state["reached"])
        self._largest = state["largest"]


def _compute_norm(loss: torch.Tensor, trained: list[nn.Parameter]) -> float:
    gradients = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    squares = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
