"""TRL's GKDTrainer with an objective: the term `model` is the divergence from a teacher that TRL computes.

Answers that the student or the teacher writes during training are written for a whole step before anything of it is
counted; TRL writes them after the count, and then divides by the number of tokens of the answers they replace.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from trl.import_utils import suppress_experimental_warning
from trl.models.utils import unwrap_model_for_generation

from solidify.objective.passes import share
from solidify.objective.window import Counts, Window, count
from solidify.training.groups import Grouped
from solidify.training.runs import TrainerRuns
from solidify.training.trainer import ObjectiveMixin
from solidify.upstream.transformers import prepare_inputs

with suppress_experimental_warning():  # the docstring of the class says it
    from trl.experimental.gkd import GKDTrainer

_OF_THE_MODEL = ("input_ids", "attention_mask", "labels")


class GKDRuns(TrainerRuns):
    """TRL's GKDTrainer. The model sees tokens and their mask; the rest of a batch is for writing answers."""

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a batch."""
        return count(self.view(batch), shifts=True)

    def view(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, with `labels`."""
        return {key: batch[key] for key in _OF_THE_MODEL}

    def run(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor | None, Any]:
        """Runs the model once; TRL runs the teacher beside it, without a graph."""
        if "loss" not in needs:
            return super().run(batch, needs, counts, window)
        # Without a number of items TRL takes the mean over the micro-batch's target tokens.
        loss, outputs = GKDTrainer.compute_loss(self.trainer, self.model, self.view(batch), True, None)
        return share(loss, outputs, None, counts, window), outputs


class ObjectiveGKDTrainer(Grouped, ObjectiveMixin, GKDTrainer):  # type: ignore[misc]
    """TRL's GKDTrainer, trained on an `Objective`; all other arguments are GKDTrainer's.

    It is one of TRL's experimental trainers, which may change in any release of TRL (written against 1.16).
    `GKDConfig.temperature` is that of sampling; the divergence is taken at 1, as TRL means it.
    """

    runs_of = GKDRuns

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: list[dict[str, Any]] = []

    def open_window(self, batches: Sequence[dict[str, Any]]) -> None:
        """Keeps the step's batches: a resumed training takes back its random numbers only after the fetching."""
        self._unanswered = list(batches)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Writes the answers of the whole step before its first micro-batch; then as all trainers do."""
        if self._unanswered:
            batches, self._unanswered = self._unanswered, []
            for batch in batches:
                self._answer(model, batch)
            super().open_window(batches)
        # GKDTrainer's own would write answers again, after the count.
        step: torch.Tensor = super(GKDTrainer, self).training_step(model, inputs, num_items_in_batch)
        return step

    def _answer(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Replaces, as often as `lmbda` says, a batch's answers by ones that the student (or the teacher) writes."""
        if random.random() <= self.lmbda:
            author, checkpointing = model, self.args.activation_checkpointing_kwargs
        elif self.seq_kd:
            author, checkpointing = self.teacher_model, None
        else:
            return
        with unwrap_model_for_generation(
            author,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=checkpointing,
        ) as writing:
            written = self.generate_on_policy_outputs(writing, prepare_inputs(self, batch), self.generation_config)
        batch.update(zip(_OF_THE_MODEL, written, strict=True))
