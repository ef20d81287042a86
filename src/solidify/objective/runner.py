"""How a batch is counted and the model is run once: the interface, and how a plain loop does it.

How a model scales its own loss is measured, not assumed: a model that accepts `num_items_in_batch` but ignores it
returns a mean; an auxiliary loss inside the model is not divided at all. Both would silently be multiplied by the
number of accumulation steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.model import anatomy
from solidify.objective.internals import shifts_labels, without_logits, without_loss
from solidify.objective.window import Counts, Window, count


@dataclass(frozen=True)
class Scaling:
    """Whether a model's loss is divided by `num_items_in_batch`, and with what weight it adds an auxiliary loss."""

    divides: bool
    aux_weight: float = 0.0


def measure_scaling(call: Callable[..., Any], inputs: Mapping[str, Any], counts: Counts) -> Scaling:
    """Finds how a model scales its loss by running it twice, without a graph.

    Raises:
        ObjectiveError: a part of the loss is not divided, and the model does not say which.
    """
    n = torch.tensor(counts.target_tokens, device=inputs["labels"].device)
    with torch.no_grad():
        second = float(call(**inputs, num_items_in_batch=2 * n)["loss"])  # its logits are dropped before the next
        once = call(**inputs, num_items_in_batch=n)
    first = float(once["loss"])
    if abs(first - second) <= 1e-6 * abs(first):
        return Scaling(False)
    rest = 2 * second - first
    if abs(rest) <= 1e-5 * abs(first):
        return Scaling(True)
    aux = once.get("aux_loss")
    if aux is None or not float(aux):
        raise ObjectiveError(
            f"{rest:.4g} of the model's own loss of {first:.4g} does not depend on the number of tokens and is not "
            "its aux_loss; this part would be multiplied by the accumulation steps: switch it off and add it as a term"
        )
    return Scaling(True, rest / float(aux))


def share(loss: torch.Tensor, outputs: Any, scaling: Scaling | None, counts: Counts, window: Window) -> torch.Tensor:
    """Makes the window's share of a micro-batch's mean loss; an auxiliary loss in it counts by attended tokens."""
    tokens = window.ranks * counts.target_tokens / max(window.target_tokens, 1)
    if scaling is None or not scaling.aux_weight:
        return loss * tokens
    aux: torch.Tensor = scaling.aux_weight * outputs["aux_loss"]
    return (loss - aux) * tokens + aux * window.ranks * counts.attended_tokens / max(window.attended_tokens, 1)


def nothing(outputs: Any) -> torch.Tensor:
    """Returns a zero with a graph, in place of a mean over no tokens, which is no number."""
    tensors = [value for key, value in outputs.items() if key != "loss" and isinstance(value, torch.Tensor)]
    graded = next((tensor for tensor in tensors if tensor.requires_grad), None)
    return graded.sum() * 0.0 if graded is not None else torch.zeros((), device=outputs["loss"].device)


class Runner:
    """What the engine needs done by whoever runs the model, as a plain loop does it; each trainer has a subclass.

    `builds_logits` says whether a pass leaves logits; where it does not, they are made of hidden states for those terms
    that ask. `extra_inputs` is what the model is given with every batch. `scaling` is how the model scales its loss,
    once that was measured.
    """

    builds_logits = True
    extra_inputs: Mapping[str, Any] = {}
    always_shifts = False  # whatever the model's own loss does

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.scaling: Scaling | None = None
        self.shifts = self.always_shifts or shifts_labels(model)

    @cached_property
    def divides(self) -> bool:
        """Whether the model takes the number of items that its loss shall be divided by."""
        parameters = inspect.signature(lookup.plain_model(self.model).forward).parameters
        return "num_items_in_batch" in parameters or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a batch where the model is."""
        device = next(self.model.parameters()).device
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, with `labels`: what terms see."""
        return dict(batch)

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a micro-batch."""
        return count(self.inputs(batch), shifts=self.shifts)

    def run(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor | None, Any]:
        """Runs the model once, for what is needed: `loss`, `logits`, `outputs`.

        Returns its own loss as the window's share (None if not needed), and its outputs.
        """
        if "loss" in needs:
            return self.own_loss(batch, needs, counts, window)
        given = without_loss if self.leaves_logits(needs) else without_logits
        return None, self.model(**given(self.model, {**self.inputs(batch), **self.extra_inputs}))

    def leaves_logits(self, needs: Set[str]) -> bool:
        """Returns whether a pass that is run for `needs` leaves logits of all positions in its outputs."""
        return "outputs" in needs or (self.builds_logits and "logits" in needs)

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model with its own loss; returns that as the window's share, and the outputs (None if not kept).

        Raises:
            ObjectiveError: the batch has no labels.
        """
        require_labels(batch)
        if self.scaling is None and counts.target_tokens and self.divides:
            with anatomy.evaluation(self.model):
                self.scaling = measure_scaling(self.model, batch, counts)
        outputs = self.model(**batch)
        if not counts.target_tokens:
            return nothing(outputs), outputs
        return share(outputs["loss"], outputs, self.scaling, counts, window), outputs


def require_labels(batch: Mapping[str, Any]) -> None:
    """Raises ObjectiveError for a batch from which the model can make no loss of its own."""
    if batch.get("labels") is None:
        raise ObjectiveError("the objective has the term 'model', but the batch has no labels, so there is no loss")
