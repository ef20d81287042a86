"""One forward pass as a plain loop runs it; trainers put their own in its place.

How a model scales its own loss is measured, not assumed: a model that accepts `num_items_in_batch` but ignores it
returns a mean; an auxiliary loss inside the model is not divided at all. Both would silently be multiplied by the
number of accumulation steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from solidify.adapter import standing
from solidify.errors import ObjectiveError
from solidify.model import anatomy
from solidify.objective.supply import encodes_and_decodes, without_logits, without_loss
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
            f"{rest:.4g} of the model's own loss of {first:.4g} does not depend on the number of tokens and is not its "
            "aux_loss; such a part would be multiplied by the accumulation steps: switch it off and add it as a term"
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


class Passes:
    """How a plain loop counts a batch and runs the model once. Trainers have the same methods and do it their way."""

    builds_logits = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        plain: Any = standing.plain_model(model)
        # The rule of transformers' Trainer (5.23, trainer.py) for whether the model shifts labels by itself.
        loss_function = LOSS_MAPPING.get(getattr(plain, "loss_type", None))
        self.shifts = loss_function is ForCausalLMLoss and not encodes_and_decodes(plain)
        parameters = inspect.signature(plain.forward).parameters
        self._accepts = "num_items_in_batch" in parameters or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )
        self._scaling: Scaling | None = None

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a batch where the model is."""
        device = next(self.model.parameters()).device
        return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a batch."""
        return count(batch, shifts=self.shifts)

    def view(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, with `labels`: what terms see."""
        return dict(batch)

    def run(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor | None, Any]:
        """Runs the model once; returns its own loss as the window's share (None if unasked for), and its outputs.

        Raises:
            ObjectiveError: the model's loss is wanted, but the batch has no labels.
        """
        if "loss" not in needs:
            given = (without_loss if needs & {"logits", "outputs"} else without_logits)(self.model, batch)
            return None, self.model(**given)
        if batch.get("labels") is None:
            raise ObjectiveError("the objective has the term 'model', but the batch has no labels, so there is no loss")
        if self._scaling is None and counts.target_tokens and self._accepts:
            with anatomy.evaluation(self.model):
                self._scaling = measure_scaling(self.model, batch, counts)
        outputs = self.model(**batch)
        if not counts.target_tokens:
            return nothing(outputs), outputs
        return share(outputs["loss"], outputs, self._scaling, counts, window), outputs
