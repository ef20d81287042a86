"""What of a recipe's data stays with the model that is built: classes, the kind of problem, the chat template."""

from __future__ import annotations

from transformers import PreTrainedModel

from solidify.artifact import vocabulary
from solidify.artifact.data_facts import DataFacts
from solidify.artifact.loading import BaseModel
from solidify.directory.results import PROBLEMS
from solidify.errors import DataError, refuse
from solidify.recipe import datasets, kinds
from solidify.recipe.schema import Recipe
from solidify.training import formats, labelling


def of_base(recipe: Recipe, base: BaseModel) -> DataFacts:
    """Returns what a recipe says of its data that a model built of this base keeps.

    Raises:
        DataError: the labels do not fit the base's head, the template cannot be read, or there is no tokenizer to keep
            it; or the rows, which say what the head learns, cannot be read.
        RecipeError: the head does not learn from the rows.
    """
    if recipe.data is None:
        return DataFacts()
    names = tuple(recipe.data.labels) if recipe.data.labels is not None else ()
    with datasets.raised_in("data"):
        template = recipe.chat_template()
        if names:
            refuse(DataError, "the labels do not fit the head", labelling.find_faults(base.model.config, names))
        if template is not None and vocabulary.tokenizer_of(base.processor or base.tokenizer) is None:
            raise DataError(f"chat_template is kept beside a tokenizer, and {recipe.base.model} has none; leave it out")
        return DataFacts(names, _find_problem(recipe, base.model), template)


def _find_problem(recipe: Recipe, model: PreTrainedModel) -> str | None:
    """Returns what a head for texts learns, where its configuration does not say it and is not taken to mean it."""
    assert recipe.data is not None
    if not set(formats.learned_by(model)) & set(PROBLEMS) or model.config.problem_type is not None:
        return None
    form: str | None = recipe.data.format
    if form is None and recipe.adapter is not None and not kinds.find(recipe).takes_rows:
        form = datasets.find_format(recipe, datasets.read_rows(recipe)[0], model)
    return PROBLEMS.get(form or "")
