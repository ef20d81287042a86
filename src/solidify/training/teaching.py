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
from trl.models import unwrap_model_for_generation

from solidify.objective.runner import share
from solidify.objective.window import Counts, Window
from solidify.training.runner import TrainerRunner
from solidify.training.trainer import ObjectiveMixin
from solidify.upstream.trl import suppress_experimental_warning

with suppress_experimental_warning():  # the docstring of the class says it
    from trl.experimental.gkd import GKDTrainer

_OF_THE_MODEL = ("input_ids", "attention_mask", "labels")


class GKDRunner(TrainerRunner):
    """TRL's GKDTrainer. The model sees tokens and their mask; the rest of a batch is for writing answers."""

    always_shifts = True

    @classmethod
    def writes(cls, args: Any) -> bool:
        """Returns whether the student or the teacher writes answers, with these settings."""
        return bool(args.lmbda or args.seq_kd)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, with `labels`."""
        return {key: batch[key] for key in _OF_THE_MODEL}

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once; TRL runs the teacher beside it, without a graph."""
        # Without a number of items TRL takes the mean over the micro-batch's target tokens.
        loss, outputs = GKDTrainer.compute_loss(self.trainer, self.model, self.inputs(batch), True, None)
        return share(loss, outputs, None, counts, window), outputs

    def complete(self, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
        """Replaces, as often as `lmbda` says, a batch's answers by ones that the student (or the teacher) writes."""
        return [self._answer_batch(model, batch) for batch in batches]

    def _answer_batch(self, model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
        trainer = self.trainer
        if random.random() <= trainer.lmbda:
            author, checkpointing = model, trainer.args.activation_checkpointing_kwargs
        elif trainer.seq_kd:
            author, checkpointing = trainer.teacher_model, None
        else:
            return batch
        with unwrap_model_for_generation(
            author,
            trainer.accelerator,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=checkpointing,
        ) as writing:
            written = trainer.generate_on_policy_outputs(writing, self.prepare(batch), trainer.generation_config)
        return {**batch, **dict(zip(_OF_THE_MODEL, written, strict=True))}


class ObjectiveGKDTrainer(ObjectiveMixin, GKDTrainer):  # type: ignore[misc]
    """TRL's GKDTrainer, trained on an `Objective`; all other arguments are GKDTrainer's.

    It is one of TRL's experimental trainers, which may change in any release of TRL (written against 1.16).
    `GKDConfig.temperature` is that of sampling; the divergence is taken at 1, as TRL means it.
    """

    runner_of = GKDRunner

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Does as SFTTrainer does: GKDTrainer's own would write answers again, after the count."""
        step: torch.Tensor = super(GKDTrainer, self).training_step(
            model, self.open_step(model, inputs), num_items_in_batch
        )
        return step
