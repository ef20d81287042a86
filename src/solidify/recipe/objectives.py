"""From a recipe to an objective: its terms, and what they are compared with."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from solidify.directory import manifest
from solidify.errors import RecipeError
from solidify.objective.objective import Objective, Term
from solidify.recipe import models, references
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import TAUGHT


def make_terms(recipe: Recipe) -> list[Term]:
    """Makes a term of each entry under the recipe's objective; raises ObjectiveError for one that cannot be made."""
    terms = []
    for entry in recipe.objective:
        loss: Any = entry.loss
        if loss != "model":
            loss = references.resolve(loss, recipe.directory)
        name = entry.name or (entry.loss.rpartition(":")[2] if entry.loss != "model" else "model")
        terms.append(Term(loss, entry.weight, name=name, arguments=entry.arguments, statistics=entry.statistics))
    objective = Objective(terms)
    if recipe.teacher is not None and recipe.trainer not in TAUGHT and not objective.asks_reference:
        raise RecipeError("teacher: no term of the objective looks at it; add one such as solidify.losses:forward_kl")
    if recipe.trainer in TAUGHT and not objective.has_model_term and not objective.asks_reference:
        raise RecipeError(
            f"teacher: the loss of trainer: {recipe.trainer} is the term `model`, which the objective leaves out, and "
            "no other term looks at the teacher"
        )
    return terms


def make_objective(recipe: Recipe, model: PreTrainedModel) -> Objective:
    """Binds the terms of a recipe to a model; the reference is the teacher, or what the surgery started from."""
    terms = make_terms(recipe)
    objective = Objective(terms)
    if recipe.teacher is not None:
        return Objective(terms, reference=models.load_teacher(recipe))
    if objective.asks_reference and not _switching_off_is_exact(recipe, model):
        return Objective(terms, reference=models.load_base(recipe).model)
    return objective


def _switching_off_is_exact(recipe: Recipe, model: PreTrainedModel) -> bool:
    """Returns whether the model without its changes is the base."""
    return not changed_before(recipe) and all(edit.get("bypass") for edit in vars(model.config).get("surgery") or ())


def changed_before(recipe: Recipe) -> bool:
    """Returns whether the base is an artifact: what it brought would be switched off too."""
    return manifest.kind(recipe.directory / recipe.base.model) == "artifact"
