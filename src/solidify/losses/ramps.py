"""A controller for numbers that modules keep in buffers: the taper of a norm, the strength of a branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from solidify.adapter import lookup
from solidify.errors import ObjectiveError, refuse
from solidify.losses.arguments import number, positive, share
from solidify.model import anatomy
from solidify.objective.weights import Schedule
from solidify.upstream.torch import unsaved_buffers


class Ramp:
    """Moves numbers that modules keep in buffers from `start` to `end` while a model is trained; no loss.

    `buffers` is a pattern, or several, on names of buffers with one number each (`**.taper`). After step n of N each
    has the value that a schedule has there: `shape`, `begin` and `length` are those of a weight's
    (`solidify.objective.weights.Schedule`); `length` defaults to half of the training. With `stagger` s above 0 they
    follow one another, in the model's order: of k buffers number i begins later by `s i / k` of `length`. Before the
    first step nothing is moved, so build the module with the start's value. What moves belongs to the adapter, if there
    is one, and is saved with it.

    Raises:
        ObjectiveError: a schedule is not valid; in `bind`, a pattern hits no such buffer, or one that is not saved.
    """

    reduction = "none"

    def __init__(
        self,
        buffers: str | Sequence[str],
        end: float = 1.0,
        start: float = 0.0,
        shape: str = "linear",
        begin: float = 0,
        length: float = 0.5,
        stagger: float = 0.0,
    ) -> None:
        self.patterns = [buffers] if isinstance(buffers, str) else list(buffers)
        self.stagger = share("ramp", "stagger", stagger)
        ends = number("ramp", "start", start), number("ramp", "end", end)
        self.length = positive("ramp", "length", length)
        self.schedule = Schedule(*ends, shape, begin, self.length)

    def bind(self, model: nn.Module) -> None:
        """Refuses buffers that could not be moved so that they are saved."""
        found = _list_buffers(model)
        faults = []
        for pattern in self.patterns:
            if not (hits := anatomy.match_within(pattern, list(found))):
                faults.append(f"{pattern!r} hits no buffer; {anatomy.suggestions(pattern, list(found))}")
            for name in hits:
                buffer, saved = found[name]
                if buffer.numel() != 1 or not buffer.is_floating_point():
                    faults.append(f"{name} holds {buffer.numel()} numbers of {buffer.dtype}; one floating number moves")
                elif not saved:
                    faults.append(f"{name} is not saved with the model; register it with persistent=True")
        refuse(ObjectiveError, "ramp: these buffers cannot be moved", faults)

    def statistics(self) -> torch.Tensor:
        """Returns nothing of the data: no number moves by it."""
        return torch.zeros(1)

    @staticmethod
    def shown(means: torch.Tensor) -> dict[str, float]:
        """Shows nothing in the log."""
        return {}

    def after_step(self, model: nn.Module, means: torch.Tensor, step: int, steps: int) -> None:
        """Moves the buffers to where they are after `step`."""
        found = _list_buffers(model)
        names = [name for name in found if any(anatomy.match_within(pattern, [name]) for pattern in self.patterns)]
        span = self.length * steps if self.length < 1 else self.length
        for place, name in enumerate(names):
            later = round(self.stagger * place / len(names) * span)
            with torch.no_grad():
                found[name][0].fill_(self.schedule.at(max(1, step + 1 - later), steps))


def _list_buffers(model: nn.Module) -> dict[str, tuple[torch.Tensor, bool]]:
    """Maps the names of active buffers to themselves, and whether they are saved."""
    return {
        f"{located.name}.{key}" if located.name else key: (buffer, key not in unsaved_buffers(located.inner))
        for located in lookup.modules(model)
        for key, buffer in located.inner.named_buffers(recurse=False)
    }
