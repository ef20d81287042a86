"""How each trainer counts a batch and runs the model, for the engine: the trainer's own way, with one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from solidify.errors import ObjectiveError
from solidify.model import anatomy
from solidify.objective.passes import Scaling, measure_scaling, nothing, share
from solidify.objective.supply import without_logits, without_loss
from solidify.objective.window import Counts, Window, count
from solidify.upstream.transformers import prepare_inputs, shifts_labels


class TrainerRuns:
    """transformers' Trainer. `model` and `items` are those that the trainer passes to `compute_loss`."""

    builds_logits = True

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.model: nn.Module = trainer.model
        self.items: torch.Tensor | int | None = None
        self.scaling: Scaling | None = None

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a batch where the model is."""
        return prepare_inputs(self.trainer, batch)

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a batch."""
        return count(batch, shifts=shifts_labels(self.trainer))

    def view(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, with `labels`."""
        return dict(batch)

    def run(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor | None, Any]:
        """Runs the model once; returns its own loss as the window's share (None if unasked for), and its outputs."""
        inputs = self.view(batch)
        if "loss" not in needs:
            given = (without_loss if needs & {"logits", "outputs"} else without_logits)(self.model, inputs)
            return None, self.model(**given)
        if inputs.get("labels") is None:
            raise ObjectiveError("the objective has the term 'model', but the batch has no labels, so there is no loss")
        if self.scaling is None and counts.target_tokens:
            self.scaling = self._measured(inputs, counts)
        loss, outputs = Trainer.compute_loss(self.trainer, self.model, inputs, True, self.items)
        return self._scaled(loss, outputs, counts, window), outputs

    def _measured(self, inputs: Mapping[str, Any], counts: Counts) -> Scaling:
        if not self.trainer.model_accepts_loss_kwargs:
            return Scaling(False)
        model = self.trainer.model
        with anatomy.evaluation(model), self.trainer.compute_loss_context_manager():
            return measure_scaling(model, inputs, counts)

    def _scaled(self, loss: torch.Tensor, outputs: Any, counts: Counts, window: Window) -> torch.Tensor:
        divided = self.scaling is not None and self.scaling.divides and self.items is not None
        if not divided:
            if not counts.target_tokens:
                return nothing(outputs)
            return share(loss, outputs, self.scaling, counts, window)
        if self.scaling is not None and self.scaling.aux_weight:
            attended = window.ranks * counts.attended_tokens / max(window.attended_tokens, 1)
            spread = self.trainer.args.average_tokens_across_devices
            loss = loss + (attended - (window.ranks if spread else 1)) * self.scaling.aux_weight * outputs["aux_loss"]
        return loss


class SFTRuns(TrainerRuns):
    """TRL's SFTTrainer, which takes its loss from the decoder's output and never builds logits.

    Where a term asks for logits, they are made of that same output. When one asks for `outputs`, the model's own
    forward runs instead, and TRL's entropy and token accuracy are not logged.
    """

    builds_logits = False

    def run(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor | None, Any]:
        """Runs the model once."""
        inputs = {**self.view(batch), "use_cache": False}
        if "outputs" in needs:
            if self.trainer.args.loss_type != "nll":
                raise ObjectiveError(
                    f"a term asks for outputs, which TRL's loss_type={self.trainer.args.loss_type!r} does not build"
                )
            return super().run(inputs, needs, counts, window)
        if "loss" not in needs:
            return super().run(inputs, frozenset(), counts, window)
        loss = SFTTrainer.compute_loss(self.trainer, self.model, inputs, False, self.items)
        if self.items is None:
            loss = share(loss, None, None, counts, window)
        return loss, None
