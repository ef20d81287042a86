"""TRL's DistillationTrainer with an objective: the term `model` is the divergence from a teacher that TRL computes.

Its rows are prompts. The student answers all prompts of a step at once, which TRL then cuts into micro-batches; here
the answers are written before anything of the step is counted, and every term sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from trl import DistillationTrainer

from solidify.adapter import lookup
from solidify.objective.runner import share
from solidify.objective.window import Counts, Window
from solidify.training.runner import AnsweringRunner
from solidify.training.trainer import ObjectiveMixin
from solidify.upstream.transformers_training import has_length
from solidify.upstream.trl import DistillationSeams, write_answers

_PARTS = ("prompt", "completion")  # of which a batch of TRL's holds `<part>_ids` and `<part>_mask`
_TAKEN_APART = (*(f"{part}_{what}" for part in _PARTS for what in ("ids", "mask")), "tool_mask", "num_items_in_batch")
_OF_IMAGES = ("num_images", "num_tiles")  # these say where TRL cuts a batch


class DistillationRunner(AnsweringRunner):
    """TRL's DistillationTrainer."""

    def faults(self) -> list[str]:
        """Names what TRL's loss would not see (it takes the weight of the head alone), and rows that make no step."""
        args, rows = self.trainer.args, self.trainer.train_dataset
        taken = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        faults = super().faults()
        if rows is not None and has_length(rows) and len(rows) < taken:
            faults.append(f"a step takes {taken} prompts, and there are {len(rows)}: TRL would train on none of them")
        faults += [
            f"the {who}'s head is {type(head).__name__}, but TRL's loss uses only its weight and bias; train with "
            "ObjectiveTrainer and the term chunked_distillation, which runs the head as it is"
            for who, model in (("model", self.trainer.model), ("teacher", self.trainer.teacher_model))
            if model is not None
            and type(head := _find_head(model)) is not nn.Linear
            and self.trainer.objective.has_model_term
        ]
        return faults

    def complete(self, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
        """Lets TRL write the answers of a whole step; every one of its batches holds all prompts of the step."""
        model.train()
        return write_answers(self.trainer, batches[0])

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns prompts with their answers as the model takes them, and the answers' tokens as `labels`."""
        ids, mask = (torch.cat([batch[f"{part}_{what}"] for part in _PARTS], dim=1) for what in ("ids", "mask"))
        learnt = batch["completion_mask"] * batch.get("tool_mask", 1)
        labels = torch.cat([torch.zeros_like(batch["prompt_mask"]), learnt], dim=1)
        others = {key: value for key, value in batch.items() if key not in (*_TAKEN_APART, *_OF_IMAGES)}
        return {"input_ids": ids, "attention_mask": mask, **others, "labels": ids.masked_fill(labels == 0, -100)}

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once; TRL runs the teacher beside it, without a graph."""
        # Without a number of items TRL takes the mean over the micro-batch's answers.
        own = {key: value for key, value in batch.items() if key != "num_items_in_batch"}
        loss = DistillationTrainer.compute_loss(self.trainer, self.model, own, False, None)
        return share(loss, None, None, counts, window), None


def _find_head(model: nn.Module) -> nn.Module | None:
    plain: Any = lookup.plain_model(model)
    head = plain.get_output_embeddings()
    return lookup.unwrap(head) if head is not None else None


class ObjectiveDistillationTrainer(ObjectiveMixin, DistillationSeams, DistillationTrainer):  # type: ignore[misc]
    """TRL's DistillationTrainer, trained on an `Objective`; all other arguments are DistillationTrainer's.

    `DistillationConfig.temperature` is that of sampling and of the divergence, as TRL means it.

    Raises:
        ObjectiveError: a head is more than the product that TRL's loss takes it for, a term asks for `outputs`, which
            TRL does not build, or there are fewer prompts than a step takes.
    """

    runner_of = DistillationRunner
