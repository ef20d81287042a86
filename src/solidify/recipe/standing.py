"""Whether what a recipe names on this machine is there: asked before anything is imported that takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

from solidify.builtin import corpus, names
from solidify.errors import ModelError, RecipeError, refuse
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import PARTS
from solidify.system import files

DATA = (".jsonl", ".json", ".csv", ".parquet", ".txt")  # of files; other names may be of the hub


def refuse_missing(recipe: Recipe) -> None:
    """Refuses a recipe that names files or built-in things that do not exist.

    Raises:
        RecipeError: it does; all of them are listed.
    """
    found = [*_find_models(recipe), *_find_files(recipe), *_find_data(recipe)]
    refuse(RecipeError, "the recipe names what is not there", found)


def _find_models(recipe: Recipe) -> Iterator[str]:
    for key in ("base", "teacher", "reference"):
        source = getattr(recipe, key)
        if source is None:
            continue
        try:
            names.refuse_unknown(source.model)
        except ModelError as error:
            yield f"{key}.model: {error}"
        local = source.model.startswith((os.sep, ".", "~"))
        if local and not files.is_directory(recipe.directory / source.model) and not files.is_directory(source.model):
            yield f"{key}.model: the directory {recipe.directory / source.model} does not exist"


def _find_files(recipe: Recipe) -> Iterator[str]:
    """Finds files of modules, terms and rewards, and of weights and tokens."""
    terms = [*recipe.objective]
    if recipe.heal is not None and recipe.heal.distill is not None:
        terms += recipe.heal.distill.objective
    named = [("objective", term.loss) for term in terms] + [("rewards", name) for name in recipe.rewards]
    named += [("surgery", name) for step in recipe.surgery for name in step.references()]
    of_code = [(key, name.rpartition(":")[0]) for key, name in named]
    wanted = [(key, name) for key, name in of_code if name.endswith(".py")]
    wanted += [("surgery", name) for step in recipe.surgery for name in step.files()]
    for key, name in dict.fromkeys(wanted):
        if not os.path.exists(recipe.directory / name):
            yield f"{key}: the file {recipe.directory / name} does not exist"


def _find_data(recipe: Recipe) -> Iterator[str]:
    for part in PARTS if recipe.data is not None else ():
        assert recipe.data is not None
        for source in recipe.data.sources(part):
            path = recipe.directory / source.path
            if source.path.startswith("builtin:") and source.path not in corpus.NAMES:
                yield f"data.{part}: there is no {source.path!r}; built in: {', '.join(corpus.NAMES)}"
            elif path.suffix in DATA and not os.path.exists(path):
                yield f"data.{part}: the data file {path} does not exist"
