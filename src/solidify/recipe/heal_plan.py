"""What of a recipe's `heal` cannot be, and what it would take: told on the meta device, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from solidify.errors import HealingError, RecipeError, raised_as
from solidify.healing import work
from solidify.healing.footprint import footprint
from solidify.recipe import distilling, healing, placement
from solidify.recipe.schema import Recipe
from solidify.surgery.catalogue import Replace
from solidify.surgery.edit_record import Edit


def faults(recipe: Recipe) -> list[str]:
    """Says what of a recipe's `heal` cannot be, as far as that shows before anything runs."""
    heal, found = recipe.heal, list[str]()
    if heal is None:
        return []
    if heal.align is not None:
        found += [f"heal.align: {fault}" for fault in healing.settings_of(heal.align).faults()]
    if heal.place is not None and not isinstance(placement.find_step(recipe, heal.place), Replace):
        found.append(
            f"heal.place: step {heal.place.step} of the surgery is not a `replace`, and only replacements are placed"
        )
    return found


def plan(recipe: Recipe, model: PreTrainedModel, edits: Sequence[Edit]) -> dict[str, Any] | None:
    """Says what healing would take, on the meta device; None without `heal`. Runs nothing.

    Raises:
        RecipeError: it cannot begin: nothing learns, or a name means nothing.
    """
    if recipe.heal is None:
        return None
    assert recipe.data is not None
    records, planned = [edit.document() for edit in edits], dict[str, Any]()
    asked = recipe.heal.align
    with raised_as(RecipeError, of=HealingError):
        if asked is not None:
            settings = healing.settings_of(asked)
            units, trained = work.find_units(model, records, settings)
            more: dict[str, Any] = {"rows": asked.batch_size, "length": recipe.data.max_length}
            more["stream"] = settings.streams(model)
            planned["align"] = footprint(model, units, trained, settings, **more).document()
        inner = distilling.inner_recipe(recipe, model, records)
    if recipe.heal.place is not None:
        most, count = recipe.heal.place.layers or 0, len(placement.list_candidates(recipe, recipe.heal.place, edits))
        if most > count:
            raise RecipeError(f"heal.place.layers: {most} are to be changed, but the step names {count} candidates")
        planned["place"] = {"candidates": count, **recipe.heal.place.model_dump(exclude_none=True)}
    if inner is not None:
        planned["distill"] = distilling.plan(inner, model)
    return planned
