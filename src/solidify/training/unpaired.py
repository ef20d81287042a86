"""TRL's KTOTrainer with an objective: the term `model` is the loss of single answers, good or bad, that TRL computes.

TRL's loss is a mean over the rows of a micro-batch, so a micro-batch counts by its share of the window's rows (TRL
counts all micro-batches alike). In it stands an estimate of the divergence from the reference, of answers that stand
with another row's prompt: TRL takes it over each micro-batch, here it is that of the whole step, on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from trl import KTOTrainer

from solidify.adapter import lookup
from solidify.objective import window as windowing
from solidify.objective.window import Counts, Window
from solidify.training.preference import COPY, ComparingMixin
from solidify.training.runner import WITHOUT_CACHE, TrainerRunner
from solidify.upstream.trl import DivergenceSeams, use_adapter

# What TRL's collator and its precomputation put into a batch beside the model's own inputs (TRL 1.16).
_BESIDE = ("completion_mask", "label", "ref_logps")
_MISMATCHED = ("KL_", "ref_KL_")  # how the names of what belongs to mismatched answers begin
_PARTS = ("prompt_ids", "completion_ids")  # the columns of a row's tokens


class KTORunner(TrainerRunner):
    """TRL's KTOTrainer. Labels are the tokens of the answers."""

    builds_logits = False
    shows_outputs = False
    adds_auxiliary = True
    extra_inputs = WITHOUT_CACHE
    texts = 2
    always_shifts = True

    def lengths(self, rows: Any) -> list[int]:
        """Returns the number of tokens of every row's prompt and answer."""
        if not all(name in rows[0] for name in _PARTS):
            return super().lengths(rows)
        return [sum(len(row[name]) for name in _PARTS) for row in rows]

    def complete(self, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
        """Measures the step's divergence from the reference, where the loss has one."""
        if self.trainer.calculate_KL and self.trainer.objective.has_model_term:
            self.trainer.step_divergence = self._measure_divergence(model, batches)
        return super().complete(model, batches)

    def _measure_divergence(self, model: nn.Module, batches: Sequence[Any]) -> float:
        trainer, sums = self.trainer, torch.zeros(2, device=self.trainer.args.device)
        trainer.step_divergence = None
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for batch in map(self.prepare, batches):
                policy = trainer.mismatched_log_probs(model, batch)
                reference = batch.get("ref_KL_logps")
                if reference is None:
                    other, switched = self._reference()
                    with switched, lookup.trainable_kept(trainer.model):
                        reference = trainer.mismatched_log_probs(other, batch)
                sums += torch.stack([(policy - reference).sum().float(), torch.tensor(float(len(policy))).to(sums)])
        total, rows = map(float, windowing.over_ranks(sums))
        return total / max(rows, 1.0)

    def _reference(self) -> tuple[Any, Any]:
        """Returns the model that TRL compares with, and what switches it so."""
        trainer = self.trainer
        plain = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.ref_model is not None or not isinstance(plain, PeftModel):
            return trainer.ref_model, nullcontext()
        return trainer.model, use_adapter(plain, adapter_name=COPY if COPY in plain.peft_config else None)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, and as `labels` the tokens of the answers."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        kept = {k: v for k, v in batch.items() if k not in _BESIDE and not k.startswith(_MISMATCHED)}
        return {**kept, "labels": labels}

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once; TRL runs the reference beside it, without a graph."""
        loss = KTOTrainer.compute_loss(self.trainer, self.model, dict(batch), False, None)
        return loss * window.ranks * counts.sequences / max(window.sequences, 1), None


class ObjectiveKTOTrainer(ComparingMixin, DivergenceSeams, KTOTrainer):  # type: ignore[misc]
    """TRL's KTOTrainer, trained on an `Objective`; all other arguments are KTOTrainer's.

    TRL's reference of a model with an adapter is the adapter as it stands now, as in `ObjectiveDPOTrainer`. The
    reference that other terms ask for is the unmodified base, as everywhere.

    Raises:
        ObjectiveError: a part of TRL's loss depends on how the rows are split, a term asks for `outputs`, which TRL
            does not build, or the model's adapter is not called `default`.
    """

    runner_of = KTORunner

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates as TRL does, which takes the divergence of each batch."""
        self.step_divergence = None
        return super().evaluate(*args, **kwargs)
