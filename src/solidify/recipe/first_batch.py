"""The first batch of a recipe's data, made before anything is built: what a training would refuse, a plan refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from solidify.adapter import lookup
from solidify.errors import DataError
from solidify.model import anatomy
from solidify.recipe import datasets
from solidify.recipe.schema import Recipe
from solidify.system import foreign
from solidify.training import examples, packing, sources

FEW = 1000  # rows that a plan reads


def rehearse(recipe: Recipe, processor: Any, model: nn.Module) -> dict[str, Any]:
    """Makes one batch of the recipe's first rows and runs a model on the meta device on it; returns what was found.

    Raises:
        DataError: the rows are not what the model's head learns from, or it does not take the batch.
        RecipeError: the `data` section asks for what cannot be.
    """
    assert recipe.data is not None
    datasets.refuse_unprepared(recipe, processor, model)
    if datasets.is_multimodal(recipe, model):
        datasets.read_texts(recipe)
        return {"format": "text", "images": True}
    train, held_out = datasets.read_rows(recipe)
    tokens = 0
    reading = datasets.open_reading(recipe, train, processor, model)
    if reading.packing:
        with datasets.raised_in("data"):
            packing.refuse_unpackable(model)
    for part, rows in (("train", train), ("eval", held_out)):
        if rows is None:
            continue
        with datasets.raised_in(f"data.{part}"):
            if part == "eval":
                datasets.find_format(recipe, rows, model)
            named = datasets.name_text(recipe, rows, reading.format)
            made, _ = examples.make(_take(named), reading)
            tokens += _count_tokens(rows, made)
            batch = examples.collator(reading)([made[n] for n in range(min(2, len(made)))])
            _run_on_meta(model, batch)
    return {
        "format": reading.format,
        **reading.limits,
        **({"tokens": tokens} if tokens else {}),
        **({"loss": reading.chat.way} if reading.chat is not None and reading.format == "messages" else {}),
        **({"packing": True} if reading.packing else {}),
    }


def _count_tokens(rows: Any, made: Any) -> int:
    """Returns about how many tokens all rows have, from examples of the first; 0 where they have none."""
    if sources.is_stream(rows) or "input_ids" not in made.column_names:
        return 0
    return sum(map(len, made["input_ids"])) * len(rows) // max(min(len(rows), FEW), 1)


def _take(rows: Any) -> Any:
    """Returns all rows where there are few, so that all that is wrong is said; else the first."""
    if not sources.is_stream(rows) and len(rows) <= FEW:
        return rows
    return rows.take(FEW) if not sources.is_stream(rows) else Dataset.from_list(sources.first(rows, FEW), rows.features)


def _run_on_meta(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raises DataError for a batch that a model does not take, as far as that shows without weights."""
    inputs = {name: each.to("meta") if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
    with torch.no_grad(), anatomy.evaluation(model):
        ran = foreign.attempt(model, **inputs)
    if isinstance(ran.error, (TypeError, ValueError)) and "meta" not in str(ran.error):
        raise DataError(f"{type(lookup.plain_model(model)).__name__} does not take a batch: {foreign.said(ran.error)}")
