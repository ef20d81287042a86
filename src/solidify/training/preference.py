"""TRL's DPOTrainer with an objective: the term `model` is the preference loss that TRL computes.

TRL's loss is a mean over the pairs of a micro-batch, so a micro-batch counts by its share of the window's pairs (TRL
counts all micro-batches alike). Of the forward pass that TRL runs for it, all other terms are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from trl import DPOTrainer

from solidify.adapter import lookup
from solidify.adapter.adapters import train_parameters
from solidify.errors import ObjectiveError
from solidify.objective import window as windowing
from solidify.objective.objective import Objective
from solidify.objective.window import Counts, Window
from solidify.training.runner import WITHOUT_CACHE, TrainerRunner
from solidify.training.trainer import ObjectiveMixin

# What TRL's collator and its precomputation put into a batch beside the model's own inputs (TRL 1.16).
_BESIDE = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
_PARTS = ("prompt_ids", "chosen_ids", "rejected_ids")  # the columns of a pair's tokens
_OF_TOKENS = "sft"  # the one loss type that is a mean over tokens: those of the chosen answers
_OF_THE_BATCH = ("aot", "aot_unpaired")  # these sort the pairs of a micro-batch
TRAINED, COPY = "default", "ref"  # the names that TRL gives an adapter and the copy of it at its start


class DPORunner(TrainerRunner):
    """TRL's DPOTrainer. Rows are pairs: all chosen answers, then all rejected ones; `sequences` counts pairs.

    Labels are the tokens of the answers. `chosen_tokens` is how many of the chosen answers' the window holds.
    """

    builds_logits = False
    shows_outputs = False
    adds_auxiliary = True
    extra_inputs = WITHOUT_CACHE
    chosen_tokens = 0.0
    texts = 2
    always_shifts = True

    @classmethod
    def judge(cls, args: Any, objective: Objective) -> list[str]:
        """Names parts of TRL's loss that depend on how the pairs are split."""
        faults = super().judge(args, objective)
        kinds = [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)
        faults += [
            f"loss_type {kind!r} sorts the pairs of each micro-batch, so the loss depends on how the batch is "
            "split; choose another"
            for kind in kinds
            if kind in _OF_THE_BATCH
        ]
        if _OF_TOKENS in kinds and args.use_weighting:
            faults.append(
                f"use_weighting weights pairs, but loss_type {_OF_TOKENS!r} is a mean over tokens; leave one of them "
                "out"
            )
        return faults

    def lengths(self, rows: Any) -> list[int]:
        """Returns the number of tokens of every pair's longer answer, with its prompt."""
        if not all(name in rows[0] for name in _PARTS):
            return super().lengths(rows)
        prompts, *answers = ([len(row[name]) for row in rows] for name in _PARTS)
        return [prompt + max(both) for prompt, *both in zip(prompts, *answers, strict=True)]

    def complete(self, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
        """Counts the chosen answers' tokens too, where a loss is a mean over them."""
        if _OF_TOKENS in self.trainer.loss_types:
            local = torch.tensor(sum(map(_chosen_tokens, batches)), device=self.trainer.args.device)
            self.chosen_tokens = float(windowing.over_ranks(local))
        return super().complete(model, batches)

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a batch."""
        counts = super().count(batch)
        return replace(counts, sequences=counts.sequences / 2)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, and as `labels` the tokens of the answers."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        return {**{key: value for key, value in batch.items() if key not in _BESIDE}, "labels": labels}

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once; TRL runs the reference beside it, without a graph."""
        share = counts.sequences / max(window.sequences, 1)
        with self._weigh_batch(batch, share):
            loss = DPOTrainer.compute_loss(self.trainer, self.model, dict(batch), False, None)
        return loss * window.ranks * share, None

    @contextmanager
    def _weigh_batch(self, batch: Mapping[str, Any], share: float) -> Iterator[None]:
        """Lets a mean over tokens among the loss types count by its share of tokens, where all count by pairs."""
        before = self.trainer.loss_weights
        tokens = _chosen_tokens(batch) / max(self.chosen_tokens, 1)
        self.trainer.loss_weights = [
            weight * tokens / share if kind == _OF_TOKENS else weight
            for kind, weight in zip(self.trainer.loss_types, before, strict=True)
        ]
        try:
            yield
        finally:
            self.trainer.loss_weights = before


def _chosen_tokens(batch: Mapping[str, Any]) -> float:
    mask = batch["completion_mask"]
    return float(mask[: len(mask) // 2, 1:].sum())


class ComparingMixin(ObjectiveMixin):
    """What TRL's trainers share that compare a model with a reference: the copy of an adapter at its start."""

    def __init__(self, model: Any, ref_model: Any = None, *args: Any, objective: Any, **kwargs: Any) -> None:
        copies = ref_model is None and isinstance(model, PeftModel)
        with complete_copy(model) if copies else nullcontext():
            super().__init__(model, ref_model, *args, objective=objective, **kwargs)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """Computes the reference's log-probabilities; what is trainable stays as it was."""
        with lookup.trainable_kept(self.model):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the scaled objective in training, TRL's loss otherwise; what is trainable stays as it was."""
        with lookup.trainable_kept(self.model):
            return super().compute_loss(*args, **kwargs)


class ObjectiveDPOTrainer(ComparingMixin, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer, trained on an `Objective`; all other arguments are DPOTrainer's.

    TRL's reference of a model with an adapter is the adapter as it stands now, of which a copy is kept; it is complete
    here (buffers and single parameters too), so the loss begins at log 2. The reference that other terms ask for
    (`reference_logits`) is the unmodified base, as everywhere.

    Raises:
        ObjectiveError: a part of TRL's loss depends on how the pairs are split, a term asks for `outputs`, which TRL
            does not build, or the model's adapter is not called `default`.
    """

    runner_of = DPORunner


@contextmanager
def complete_copy(model: PeftModel) -> Iterator[None]:
    """Lets the adapter that TRL adds as its reference hold all that the trained one does.

    TRL (1.16) makes it with `add_adapter` and then copies parameters by name. Buffers of trained modules (a trash can's
    threshold) and parameters that are trained one by one would stay at the base's values.
    """
    active = model.active_adapters
    if COPY in model.peft_config or active != [TRAINED]:
        raise ObjectiveError(
            f"TRL trains the adapter {TRAINED!r} against a copy {COPY!r} of it, but the model has "
            f"{', '.join(model.peft_config)}, active: {', '.join(active)}; attach one adapter under its usual name "
            f"(and take an older copy off with model.delete_adapter({COPY!r}))"
        )
    add = model.add_adapter
    holder, buffers = lookup.trained_parameters(model), lookup.trained_buffers(model)

    def add_whole(name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter with a version of every single parameter and with the trained modules' buffers."""
        with lookup.trainable_kept(model):
            add(name, *args, **kwargs)
            if holder is not None:
                train_parameters(model, holder.names(TRAINED), name)
                holder.trained[name].load_state_dict(holder.trained[TRAINED].state_dict())
                model.set_adapter(TRAINED)
        held = dict(model.named_buffers())
        for path, buffer in held.items():
            parts = path.split(".")
            if TRAINED in parts:
                held[".".join(name if part == TRAINED else part for part in parts)].copy_(buffer)
        if buffers is not None:
            buffers.take(name, buffers.versions(TRAINED))
        if holder is not None:
            holder.trained[name].requires_grad_(False)

    model.add_adapter = add_whole
    try:
        yield
    finally:
        del model.add_adapter
