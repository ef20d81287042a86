"""TRL's GRPOTrainer with an objective: the term `model` is the policy's loss that TRL computes.

Its rows are prompts. TRL answers and scores the prompts of one step, or of several, at once and cuts them into
micro-batches; here those of a step are answered before anything of it is counted, and every term sees the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer

from solidify.objective.objective import Objective
from solidify.objective.window import Counts, Window
from solidify.training.runner import AnsweringRunner
from solidify.training.trainer import ObjectiveMixin
from solidify.upstream.transformers_training import has_length
from solidify.upstream.trl import AnsweringSeams, score_answers

_PARTS = ("prompt", "completion")  # of which a batch of TRL's holds `<part>_ids` and `<part>_mask`
_OF_IMAGES = (  # what TRL gives the model of a batch beside its tokens (TRL 1.16)
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)
# What loss types of TRL 1.16 are means over; all others are divided by the tokens of the step already.
_OF_SEQUENCES = ("grpo", "dr_grpo", "sapo", "luspo")
_OF_TOKENS = ("bnpo",)


class GRPORunner(AnsweringRunner):
    """TRL's GRPOTrainer."""

    adds_auxiliary = True

    @classmethod
    def judge(cls, args: Any, objective: Objective) -> list[str]:
        """Names parts of TRL's loss that depend on how the answers are split."""
        faults = super().judge(args, objective)
        if args.entropy_coef or args.use_adaptive_entropy:
            faults.append(
                "entropy_coef and use_adaptive_entropy take a mean over each micro-batch by itself; leave them out and "
                "add the term output_entropy, which is one over the whole step"
            )
        if args.top_entropy_quantile < 1:
            faults.append(
                f"top_entropy_quantile is {args.top_entropy_quantile}: TRL sorts the tokens of each micro-batch by "
                "themselves, so the loss depends on how a step is split; leave it out"
            )
        return faults

    def faults(self) -> list[str]:
        """Adds rows that make no step."""
        trainer, faults = self.trainer, super().faults()
        rows, taken = trainer.train_dataset, trainer.args.generation_batch_size // trainer.args.num_generations
        if rows is not None and has_length(rows) and len(rows) < taken:
            faults.append(
                f"{trainer.args.generation_batch_size} answers are written at once, {trainer.args.num_generations} to "
                f"each of {taken} prompts, and there are {len(rows)} prompts: TRL would train on none of them"
            )
        return faults

    def complete(self, model: nn.Module, batches: Sequence[Any]) -> list[Any]:
        """Lets TRL write and score the answers of a whole step, or cut off the next of those that it has."""
        model.train()
        return score_answers(self.trainer, batches)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns prompts with their answers as the model takes them, and the answers' tokens as `labels`."""
        ids, mask = (torch.cat([batch[f"{part}_{what}"] for part in _PARTS], dim=1) for what in ("ids", "mask"))
        learnt = batch["completion_mask"] * batch.get("tool_mask", 1)
        labels = torch.cat([torch.zeros_like(batch["prompt_mask"]), learnt], dim=1)
        others = {key: batch[key] for key in _OF_IMAGES if key in batch}
        return {"input_ids": ids, "attention_mask": mask, **others, "labels": ids.masked_fill(labels == 0, -100)}

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once; the reference ran when the answers were scored."""
        trainer = self.trainer
        loss = GRPOTrainer.compute_loss(trainer, self.model, dict(batch), False, None)
        if trainer.loss_type in _OF_SEQUENCES:
            part = counts.sequences / max(window.sequences, 1)
        elif trainer.loss_type in _OF_TOKENS:
            part = counts.target_tokens / max(window.target_tokens, 1)
        else:  # divided by all tokens that were written, and so a share of the step as it is
            return loss, None
        return loss * trainer.current_gradient_accumulation_steps * window.ranks * part, None


class ObjectiveGRPOTrainer(ObjectiveMixin, AnsweringSeams, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer, trained on an `Objective`; all other arguments are GRPOTrainer's.

    TRL's reference (with `beta`) is the model with its adapter as it is at the start: TRL keeps a copy, named `ref`. Of
    a model without an adapter TRL loads the reference again, by the name in its configuration. The reference that terms
    ask for is the unmodified base, as everywhere.

    Raises:
        ObjectiveError: a part of TRL's loss depends on how the answers are split, a term asks for `outputs`, which TRL
            does not build, or there are fewer prompts than are answered at once.
    """

    runner_of = GRPORunner
