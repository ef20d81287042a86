"""The recipe: what to make, as frozen values. No torch, no user code, nothing that runs.

Goes in: a YAML file and `key=value` overrides. Comes out: a `Recipe` whose every key is known. Sections that belong
to PEFT or transformers (`adapter.lora`, `training`) pass through verbatim; they are judged where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

import yaml
from blake3 import blake3
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, model_validator

from solidify.errors import DataError, RecipeError, refuse
from solidify.recipe.sections import (
    COMPARED,
    DESCRIBED,
    LISTED,
    NAMED,
    TAUGHT,
    Adapter,
    Base,
    Data,
    Heal,
    ParameterGroup,
    Section,
    Term,
    Trainer,
)
from solidify.surgery.catalogue import ASKED
from solidify.surgery.operation import RULE, Operation, broken_rule
from solidify.system import files

_DIGESTS = "digests"  # of files, in a recipe that was written down beside its results: they are taken anew


def _find_operation(step: Any) -> str | None:
    """Returns which operation a step of surgery is: the one whose name is among its keys."""
    if isinstance(step, dict):
        return next((name for name in ASKED if name in step), None)
    return next((name for name, kind in ASKED.items() if isinstance(step, kind)), None)


if TYPE_CHECKING:
    Step = Operation
else:
    _tagged = tuple(Annotated[kind, Tag(name)] for name, kind in ASKED.items())
    Step = Annotated[Union[_tagged], Discriminator(_find_operation)]  # noqa: UP007  # made of the catalogue


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Recipe(Section):
    """A recipe: what to make, section by section; without `surgery` the base itself is trained.

    `cache_prefix` has layers before all that learn computed once for each batch, instead of once for each epoch.
    Relative paths start at `directory`, where its file is; `name` is that file's, without its ending.
    """

    base: Base
    surgery: list[Step] = Field(default_factory=list)
    heal: Heal | None = None
    adapter: Adapter | None = None
    objective: list[Term] = Field(default_factory=lambda: [Term(loss="model")])
    trainer: Trainer = "auto"
    teacher: Base | None = None
    reference: Base | None = None
    rewards: list[str] = Field(default_factory=list)
    parameter_groups: list[ParameterGroup] = Field(default_factory=list)
    cache_prefix: bool | None = None
    data: Data | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    output: str | None = None
    directory: Path = Field(default=Path(), exclude=True)
    name: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _check_complete(self) -> Recipe:
        if not self.surgery and self.adapter is None:
            raise broken_rule("nothing is to be done: give `surgery`, an `adapter`, or both")
        if not self.surgery and self.heal is not None:
            raise broken_rule("`heal` brings a changed model back to its base: give `surgery`")
        if self.adapter is not None and self.data is None:
            raise broken_rule("`adapter` needs something to be trained on: give `data`")
        if self.heal is not None and self.data is None:
            raise broken_rule("`heal` needs something to learn from: give `data`")
        if self.data is None and any(step.calibrates for step in self.surgery):
            raise broken_rule("`keep` and `weights: frequency` are about what experts do on data: give `data`")
        distilled = self.heal is not None and self.heal.distill is not None
        if self.base.quantization is not None and self.adapter is None and not distilled:
            raise broken_rule(
                "`base.quantization` says how the artifact is loaded to be trained, and nothing is trained: give an "
                "`adapter`, or leave it out (what is built is never quantised)"
            )
        if self.teacher is not None and self.teacher.quantization is not None:
            raise broken_rule("`teacher.quantization` is not offered: name a teacher that is stored quantised")
        if self.data is not None and self.data.streaming:
            self._check_streaming()
        if self.adapter is None and self.teacher is not None:
            raise broken_rule("`teacher` needs an `adapter` that says what is trained")
        if self.adapter is None and self.training:
            raise broken_rule("`training` needs an `adapter` that says what is trained")
        if self.adapter is None and self.parameter_groups:
            raise broken_rule("`parameter_groups` needs an `adapter` that says what is trained")
        if self.adapter is None and self.cache_prefix:
            raise broken_rule("`cache_prefix` needs an `adapter` that says what is trained")
        self._check_trainer()
        return self

    def _check_streaming(self) -> None:
        if self.heal is not None:
            raise broken_rule("`heal` reads its rows again and again, which `data.streaming` cannot; leave one out")
        if self.adapter is not None and not _is_count(self.training.get("max_steps")):
            raise broken_rule(
                "`data.streaming` does not know how many rows there are, so a training must say how long it is: give "
                "`training.max_steps`"
            )

    def _check_trainer(self) -> None:
        if self.adapter is None and (self.trainer != "auto" or self.rewards or self.reference is not None):
            raise broken_rule("`trainer`, `rewards` and `reference` need an `adapter` that says what is trained")
        if self.trainer in TAUGHT and self.teacher is None:
            raise broken_rule(
                f"`trainer: {self.trainer}` learns from a second model: say which in `teacher: {{model: ...}}`"
            )
        if self.trainer == "grpo" and not self.rewards:
            raise broken_rule(
                "`trainer: grpo` raises what reward functions return: name them in `rewards: [file.py:function, ...]`"
            )
        if self.trainer != "grpo" and self.rewards:
            raise broken_rule(f"`rewards` are what `trainer: grpo` raises, but the trainer is {self.trainer!r}")
        if self.trainer not in COMPARED and self.reference is not None:
            raise broken_rule(
                f"`reference` is what {' and '.join(COMPARED)} compare with, but the trainer is {self.trainer!r}; what "
                "terms compare with is `teacher`, or the base"
            )

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a recipe and applies overrides such as `training.max_steps=10` or `surgery.0.count=4`.

        Raises:
            RecipeError: no such file, not YAML, an unknown key, a wrong type, an override that points nowhere. All
                faults that a reading of the whole can name are listed together.
        """
        return load(path, list(overrides))

    def document(self) -> dict[str, Any]:
        """Returns the recipe as plain values, with the keys of the YAML file.

        A chat template stands there itself, and beside files of weights or tokens their `digests`: results are compared
        by what files hold, and not by what they are called.
        """
        found = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if self.data is not None and self.data.chat_template is not None:
            with suppress(DataError):  # which says a plan
                found["data"]["chat_template"] = self.chat_template()
        names = sorted({name for step in self.surgery for name in step.files()})
        standing = [name for name in names if files.is_file(self.directory / name)]
        if standing:
            found[_DIGESTS] = {name: _digest_file(self.directory / name) for name in standing}
        return found

    def chat_template(self) -> str | None:
        """Returns the chat template that `data` gives as the name of a file beside the recipe, or as it stands.

        Raises:
            DataError: it is neither.
        """
        given = self.data.chat_template if self.data is not None else None
        if given is None or "{" in given:
            return given
        try:
            return files.text(self.directory / given, DataError).replace("\r\n", "\n")
        except DataError as error:
            raise DataError(
                f"chat_template: {self.directory / given} cannot be read, and {given!r} is no template itself"
            ) from error

    def inputs(self) -> list[Path]:
        """Returns what it reads on this machine: models, files of modules and terms, weights, data."""
        models = [source.model for source in (self.base, self.teacher, self.reference) if source is not None]
        references = [name for step in self.surgery for name in step.references()]
        references += [*(term.loss for term in self.objective), *self.rewards]
        if self.heal is not None and self.heal.distill is not None:
            references += [term.loss for term in self.heal.distill.objective]
        files: list[str | None] = [name.rpartition(":")[0] for name in references]
        files += [name for step in self.surgery for name in step.files()]
        files += [*self.data.paths(), self.data.chat_template] if self.data is not None else []
        names = [name for name in (*models, *files) if name and not name.startswith("builtin:")]
        found = [*(self.directory / name for name in names), *map(Path, models)]
        return [path for path in found if os.path.exists(path)]


def _digest_file(path: Path) -> str:
    found = path.stat()
    return _digest_standing(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_standing(path: Path, *_: int) -> str:
    """Digests a file once, as long as it is the same (the rest of the key says so)."""
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def given(recipe: Recipe | str | Path) -> Recipe:
    """Returns a recipe as it is, or reads the one at a path."""
    return recipe if isinstance(recipe, Recipe) else load(recipe)


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Does what `Recipe.load` says.

    Raises:
        RecipeError: the file or an override is not valid.
    """
    path = Path(path)
    content = files.text(path, RecipeError, largest=files.LARGEST_RECIPE)
    try:
        document = files.parse_yaml(content)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {files.say_yaml(error)}") from error
    if not isinstance(document, dict):
        raise RecipeError(f"{path} holds {type(document).__name__}, but a recipe is a mapping of sections")
    for override in overrides or []:
        _apply_override(document, override)
    if not files.is_text(document):
        raise RecipeError(f"{path} holds half a character (a surrogate), which is not text; write it in UTF-8")
    return judge(document, path)


def judge(document: Mapping[str, Any], path: Path) -> Recipe:
    """Makes a recipe of what a file holds.

    Raises:
        RecipeError: it is not valid; all faults are listed.
    """
    own = {"directory": path.resolve().parent, "name": path.stem}
    words = f"the recipe {path} is not valid"
    faults = [_write_unknown(key, Recipe, key) for key in document if key in own]
    try:
        read = {key: value for key, value in document.items() if key not in own and key != _DIGESTS}
        recipe = Recipe.model_validate(read, by_name=False, by_alias=True)
    except ValidationError as error:
        refuse(RecipeError, words, [*faults, *map(_write_sentence, error.errors())])
        raise
    refuse(RecipeError, words, faults)
    return recipe.model_copy(update=own)


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"an override is written key=value, but {override!r} is not")
    *parents, last = key.split(".")
    node: Any = document
    for part in parents:
        if isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise RecipeError(f"the override {override!r} points nowhere: there is no {part!r} in the recipe")
    if isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        node[int(last)] = _parse_value(override, value)
    elif isinstance(node, dict):
        node[last] = _parse_value(override, value)
    else:
        raise RecipeError(f"the override {override!r} points nowhere: there is no {last!r} in the recipe")


def _parse_value(override: str, value: str) -> Any:
    try:
        return files.parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"the override {override!r} is not valid YAML: {files.say_yaml(error)}") from error


def _find_section(location: Sequence[str]) -> type[BaseModel]:
    """Returns the section in which a key of the recipe stands."""
    section: type[BaseModel] = Recipe
    for part in location[:-1]:
        field = section.model_fields.get(part)
        within = _list_sections(field.annotation) if field is not None else []
        section = within[0] if within else section
    return section


def _list_sections(annotation: Any) -> list[type[BaseModel]]:
    """Returns the sections that a field's type speaks of, also in a list, or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in _list_sections(part)]


def _write_sentence(error: Any) -> str:
    """Turns one pydantic error into a sentence with the path of the key and, for unknown keys, its neighbours."""
    location = [str(part) for part in error["loc"] if part not in (NAMED, DESCRIBED, LISTED)]
    section = _find_section(location)
    if location[:1] == ["surgery"] and len(location) > 2:
        section = ASKED[location.pop(2)]
    where = ".".join(location) or "the recipe"
    if error["type"] == "union_tag_not_found" and location[0] == "data":
        return f"{where}: give a name, a mapping with `path`, or a list of these; found {error['input']!r}"
    if error["type"] == "union_tag_not_found":
        return f"{where}: say what to do; known here: {', '.join(ASKED)}"
    if error["type"] == "extra_forbidden":
        return _write_unknown(where, section, location[-1])
    if error["type"] == "missing":
        return f"{where}: this key is required"
    if error["type"] == RULE:  # a sentence of our own, about several keys of the section
        return f"{where}: {error['msg']}"
    found = repr(error["input"])
    return f"{where}: {error['msg']}; found {found if len(found) <= 200 else found[:200] + ' …'}"


def _write_unknown(where: str, section: type[BaseModel], key: str) -> str:
    keys = [f.alias or name for name, f in section.model_fields.items() if not f.exclude]
    close = get_close_matches(key, keys, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{where}: unknown key; {hint}known here: {', '.join(keys)}"
