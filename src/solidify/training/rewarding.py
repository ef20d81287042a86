"""TRL's RewardTrainer with an objective: the term `model` is the loss of pairs of scores that TRL computes.

TRL's loss is a mean over the pairs of a micro-batch, so a micro-batch counts by its share of the window's pairs (TRL
counts all micro-batches alike). The model scores whole texts: there are no labels, and no next token to predict.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from trl import RewardTrainer

from solidify.objective.objective import Objective
from solidify.objective.window import Counts, Window
from solidify.training.runner import WITHOUT_CACHE, TrainerRunner
from solidify.training.trainer import ObjectiveMixin

_MARGIN = "margin"  # by how much the chosen text shall be better; what TRL's collator puts beside the model's inputs
_PARTS = ("chosen_ids", "rejected_ids")  # the columns of a pair's tokens


class RewardRunner(TrainerRunner):
    """TRL's RewardTrainer. Rows are pairs: all chosen texts, then all rejected ones; `sequences` counts pairs."""

    extra_inputs = WITHOUT_CACHE
    texts = 2

    @classmethod
    def judge(cls, args: Any, objective: Objective) -> list[str]:
        """Names terms that need what a pair of texts does not have."""
        return [
            f"the term {term.name} asks for labels, but a reward model predicts no tokens: it scores whole texts; "
            "leave the term out"
            for term in objective.terms
            if "labels" in term.asks
        ]

    def lengths(self, rows: Any) -> list[int]:
        """Returns the number of tokens of every pair's longer text."""
        if not all(name in rows[0] for name in _PARTS):
            return super().lengths(rows)
        return [max(len(row[name]) for name in _PARTS) for row in rows]

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a batch."""
        counts = super().count(batch)
        return replace(counts, sequences=counts.sequences / 2)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch."""
        return {key: value for key, value in batch.items() if key != _MARGIN}

    def own_loss(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor, Any]:
        """Runs the model once."""
        loss, outputs = RewardTrainer.compute_loss(self.trainer, self.model, dict(batch), True, None)
        return loss * window.ranks * counts.sequences / max(window.sequences, 1), outputs


class ObjectiveRewardTrainer(ObjectiveMixin, RewardTrainer):  # type: ignore[misc]
    """TRL's RewardTrainer, trained on an `Objective`; all other arguments are RewardTrainer's.

    `logits` are the scores (2 pairs, 1); `hidden_states` and what a term captures are of the same forward pass.

    Raises:
        ObjectiveError: a term asks for labels.
    """

    runner_of = RewardRunner
