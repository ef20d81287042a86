"""What of a recipe's data stays with the model that is built: the names of classes, the chat template."""

from __future__ import annotations

from solidify.artifact import vocabulary
from solidify.artifact.loading import BaseModel
from solidify.artifact.told import Told
from solidify.errors import DataError, refuse
from solidify.recipe import datasets
from solidify.recipe.schema import Recipe
from solidify.training import chats, labelling


def of_base(recipe: Recipe, base: BaseModel) -> Told:
    """Returns what a recipe says of its data that a model built of this base keeps.

    Raises:
        DataError: the labels do not fit the base's head, the template cannot be read, or there is no tokenizer to keep
            it.
    """
    if recipe.data is None:
        return Told()
    names = tuple(recipe.data.labels) if recipe.data.labels is not None else ()
    with datasets.raised_in("data"):
        template = chats.read_template(recipe.directory, recipe.data.chat_template)
        if names:
            refuse(DataError, "the labels do not fit the head", labelling.find_faults(base.model.config, names))
        if template is not None and vocabulary.tokenizer_of(base.processor or base.tokenizer) is None:
            raise DataError(f"chat_template is kept beside a tokenizer, and {recipe.base.model} has none; leave it out")
        return Told(names, template=template)
