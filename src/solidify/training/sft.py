"""TRL's SFTTrainer with an objective: the term `model` is the loss that TRL computes without ever building logits."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from trl import SFTTrainer

from solidify.errors import ObjectiveError
from solidify.objective.runner import share
from solidify.objective.window import Counts, Window
from solidify.training.runner import WITHOUT_CACHE, TrainerRunner
from solidify.training.trainer import ObjectiveMixin


class SFTRunner(TrainerRunner):
    """TRL's SFTTrainer, which takes its loss from the decoder's output.

    Where a term asks for logits, they are made of that same output. When one asks for `outputs`, the model's own
    forward runs instead, and TRL's entropy and token accuracy are not logged.
    """

    builds_logits = False
    extra_inputs = WITHOUT_CACHE

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once."""
        if "outputs" in needs:
            if self.trainer.args.loss_type != "nll":
                raise ObjectiveError(
                    f"a term asks for outputs, which TRL's loss_type={self.trainer.args.loss_type!r} does not build"
                )
            return super().own_loss(batch, needs, counts, window)
        inputs = {**self.inputs(batch), **self.extra_inputs}
        loss = SFTTrainer.compute_loss(self.trainer, self.model, inputs, False, self.items)
        return (loss if self.items is not None else share(loss, None, None, counts, window)), None


class ObjectiveSFTTrainer(ObjectiveMixin, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer, trained on an `Objective`; all other arguments are SFTTrainer's."""

    runner_of = SFTRunner
