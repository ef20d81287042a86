"""`cache_prefix` of a recipe: whether its batches come again, which layers are computed once, their size on disk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from solidify.adapter import lookup
from solidify.errors import ObjectiveError, RecipeError, raised_as, refuse
from solidify.objective.objective import Objective
from solidify.recipe import datasets, kinds
from solidify.recipe.kinds import Kind
from solidify.recipe.schema import Recipe
from solidify.training.prefix import cached, in_trainer


def refuse_uncacheable(recipe: Recipe, kind: Kind, arguments: Any) -> None:
    """Raises RecipeError where `cache_prefix` is asked for, and no batch would come again."""
    assert recipe.data is not None
    if not recipe.cache_prefix:
        return
    faults = in_trainer.setting_faults(arguments, kind.trainer.runner_of, recipe.data.group_by)
    if recipe.data.streaming:
        faults.append("data.streaming gives rows as a stream, which may come otherwise in each epoch; leave it out")
    refuse(RecipeError, f"cache_prefix: trainer: {kind.name} cannot compute frozen layers once", faults)


def shuffles_once(recipe: Recipe, kind: Kind, arguments: Any) -> bool:
    """Returns whether rows are shuffled before a training whose sampler keeps their order, and nothing else does so."""
    assert recipe.data is not None
    shuffled = recipe.data.packing or recipe.data.streaming or kind.name == "kto"
    return recipe.data.shuffle and arguments.train_sampling_strategy == "sequential" and not shuffled


def plan(recipe: Recipe, peft_model: Any, objective: Objective, read: Mapping[str, Any]) -> dict[str, Any] | None:
    """Says which layers are computed once, and about how many bytes they return; None where none are asked for.

    `read` says how rows are read, and how many tokens they have where that was counted; else each row is taken to be
    as long as it may be.

    Raises:
        RecipeError: there are none, or tokens are hidden anew in each epoch.
    """
    if not recipe.cache_prefix:
        return None
    assert recipe.data is not None
    looked = [name for spec in objective.captures.values() for name in spec.find(peft_model)]
    with raised_as(RecipeError, of=ObjectiveError):
        found = cached.refuse_none(cached.find_prefixes(peft_model, looked))
    if read["format"] == "masked":
        raise RecipeError(
            "cache_prefix: other tokens are hidden in each epoch (format: masked), so no batch comes again"
        )
    tokens = int(read.get("tokens", 0))
    if not tokens:
        rows = sum(len(each) for each in datasets.read_rows(recipe) if each is not None)
        tokens = rows * recipe.data.max_length * kinds.find(recipe).trainer.runner_of.texts
    size = in_trainer.measure(found, lookup.plain_model(peft_model), tokens)
    return {"layers": [str(each) for each in found], "bytes": size}
