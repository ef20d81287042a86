"""What surgery reads of a recipe's data before it changes anything: rows as batches, and scores of experts on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedModel

from solidify.healing import calibrating
from solidify.recipe import datasets
from solidify.recipe.schema import Recipe
from solidify.surgery.expert_scores import ExpertScores

_TOGETHER = 4  # rows of a batch


def score_experts(
    recipe: Recipe, processor: Any, model: PreTrainedModel, names: Sequence[str], by: str, rows: int
) -> ExpertScores:
    """Scores the experts of blocks on the first rows of the recipe's training data.

    Raises:
        DataError: the rows cannot be read, or are no text.
        HealingError: the model does not run on them.
    """
    prepared = datasets.prepare(datasets.unpacked(recipe), processor, parts=("train",))
    batches = datasets.collate_rows(prepared.collate, islice(prepared.train, rows), _TOGETHER)
    return calibrating.score_experts(model, names, batches, by=by)
