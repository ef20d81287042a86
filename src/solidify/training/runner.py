"""What differs between trainers: one small interface, which every trainer's file fills in its own way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from solidify.model import anatomy
from solidify.objective.objective import Objective
from solidify.objective.runner import Runner, Scaling, measure_scaling, nothing, require_labels, share
from solidify.objective.window import Counts, Window
from solidify.training import batching
from solidify.upstream.transformers import prepare_inputs
from solidify.upstream.trl import count_micro_batches

WITHOUT_CACHE: Mapping[str, Any] = {"use_cache": False}  # `extra_inputs` of trainers that never continue a text


class TrainerRunner(Runner):
    """How one trainer makes batches, counts them and runs the model; here transformers' Trainer does.

    Another trainer says only what it does otherwise:

    - `inputs(batch)`: what the model takes of a batch, with `labels`; terms see it, and it is what counts;
    - `own_loss(batch, needs, counts, window)`: one pass with the trainer's own loss, as its share of the step;
    - `complete(model, batches)`: all batches of a step become what is trained on, before any is counted;
    - `judge(args, objective)`: which of its settings make its loss another one for every split, and what of the
      objective it cannot show; `faults()` adds what only the trainer itself can tell;
    - `lengths(rows)`: how many tokens a row has, for `group_by`; `ungrouped` says why its rows cannot be grouped;
    - `texts`: how many texts of a row the model reads at most;
    - `builds_logits`, `extra_inputs`: see `Runner`; `counts_tokens`: the trainer counts the tokens that it has seen;
    - `shows_outputs`: a pass with the trainer's own loss leaves the model's outputs;
    - `adds_auxiliary`: the trainer adds an MoE's auxiliary loss to every micro-batch, if it is told to;
    - `writes(args)`: what is trained on is written in training, with these settings.

    `model` and `items` are those that the trainer passes to `compute_loss`.
    """

    counts_tokens = False
    adds_auxiliary = False
    shows_outputs = True
    ungrouped = ""
    texts = 1

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.model)
        self.trainer = trainer
        self.items: torch.Tensor | int | None = None
        self.divides = trainer.model_accepts_loss_kwargs

    @property
    def writes_answers(self) -> bool:
        """Whether answers are written in training."""
        return self.writes(self.trainer.args)

    @classmethod
    def writes(cls, args: Any) -> bool:
        """Returns whether answers are written in training, with settings of the trainer's own kind."""
        return False

    @classmethod
    def judge(cls, args: Any, objective: Objective) -> list[str]:
        """Returns in words what of the settings or of the objective cannot be one over a whole step.

        `args` are those of the trainer's own kind; nothing else is there yet.
        """
        faults = _find_auxiliary(args.router_aux_loss_coef) if cls.adds_auxiliary else []
        if not cls.shows_outputs and objective.has_model_term and objective.asks_for("outputs"):
            faults.append("a term asks for outputs, which TRL's pass does not build; ask for logits or hidden_states")
        return faults

    def faults(self) -> list[str]:
        """Returns what the settings, the objective and the model itself say against it."""
        trainer = self.trainer
        faults = self.judge(trainer.args, trainer.objective)
        if self.adds_auxiliary and trainer.aux_loss_enabled and not trainer.args.router_aux_loss_coef:
            faults += _find_auxiliary(trainer.router_aux_loss_coef)  # which the model's configuration asks for
        return faults

    def lengths(self, rows: Any) -> list[int]:
        """Returns the number of tokens of every row.

        Raises:
            DataError: the rows do not say.
        """
        return batching.lengths(rows, self.trainer.args.length_column_name)

    def complete(self, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
        """Returns one step's micro-batches as they will be trained on; called right before the first of them is."""
        return list(batches)

    def go_on(self) -> None:
        """Takes up what the trainer itself does not keep in a checkpoint; called when that was read."""

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a batch where the model is."""
        return prepare_inputs(self.trainer, batch)

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once by transformers' `Trainer.compute_loss`, whatever the trainer's own is."""
        inputs = {**self.inputs(batch), **self.extra_inputs}
        require_labels(inputs)
        if self.scaling is None and counts.target_tokens:
            self.scaling = self._measure_scaling(inputs, counts)
        loss, outputs = Trainer.compute_loss(self.trainer, self.model, inputs, True, self.items)
        return self._scale_loss(loss, outputs, counts, window), outputs

    def _measure_scaling(self, inputs: Mapping[str, Any], counts: Counts) -> Scaling:
        if not self.divides:
            return Scaling(False)
        model = self.trainer.model
        with anatomy.evaluation(model), self.trainer.compute_loss_context_manager():
            return measure_scaling(model, inputs, counts)

    def _scale_loss(self, loss: torch.Tensor, outputs: Any, counts: Counts, window: Window) -> torch.Tensor:
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


class AnsweringRunner(TrainerRunner):
    """What TRL's trainers share whose rows are prompts. Prompts are padded on the left, answers on the right; labels
    are what was written."""

    builds_logits = False
    shows_outputs = False
    extra_inputs = WITHOUT_CACHE
    counts_tokens = True
    ungrouped = "each row is a prompt that is answered in training, and TRL repeats the rows of a step in its own order"
    always_shifts = True

    @classmethod
    def writes(cls, args: Any) -> bool:
        """Returns whether answers are written in training: they always are."""
        return True

    def go_on(self) -> None:
        """Says how far the training came within the answers that are written at once."""
        state, args = self.trainer.state, self.trainer.args
        count_micro_batches(self.trainer, state.global_step * args.gradient_accumulation_steps)


def _find_auxiliary(weight: float | None) -> list[str]:
    if not weight:
        return []
    return [
        f"router_aux_loss_coef is {weight}: TRL adds the auxiliary loss of each micro-batch by itself; set it to 0.0 "
        "and add the term load_balance, which is one over the whole step"
    ]
