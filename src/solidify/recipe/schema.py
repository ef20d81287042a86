"""The recipe: what to make, as frozen values. No torch, no user code, nothing that runs.

Goes in: a YAML file and `key=value` overrides. Comes out: a `Recipe` whose every key is known. Sections that belong
to PEFT or transformers (`adapter.lora`, `training`) pass through verbatim; they are judged where they are used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from solidify.errors import RecipeError, refuse
from solidify.surgery.catalogue import ASKED
from solidify.surgery.operation import RULE, Operation, broken_rule
from solidify.system import files

Format = Literal[
    "text",
    "messages",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "prompts",
    "classification",
    "regression",
    "multi_label",
    "token_classification",
    "image_classification",
    "masked",
    "seq2seq",
]
PARTS: tuple[Literal["train", "eval"], ...] = ("train", "eval")
Trainer = Literal["auto", "sft", "dpo", "kto", "distill", "gkd", "reward", "grpo", "classification"]
TAUGHT = ("distill", "gkd")  # trainers whose loss is a divergence from the teacher
COMPARED = ("dpo", "kto")  # trainers whose loss compares with a reference


class _Section(BaseModel):
    # Strict: `true` is no number, and a number in quotes is none; so says the JSON schema (json_schema.py) too.
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Base(_Section):
    """A model that a recipe names: what the surgery starts from, or the teacher.

    Its own code, if it has any, runs with `trust_remote_code` only. `quantization` says how the artifact that surgery
    makes of it is loaded to be trained: `nf4`, `int8`, or the fields of one of transformers' quantization configs.
    """

    model: str
    revision: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    quantization: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_quantization(self) -> Base:
        if isinstance(self.quantization, str) and self.quantization not in ("nf4", "int8"):
            raise broken_rule(
                f"the quantization is {self.quantization!r}; write nf4 or int8, or the fields of a quantization config "
                "of transformers, as a mapping"
            )
        return self


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


class Adapter(_Section):
    """What is trained: PEFT's LoRA fields verbatim, and names of modules or parameters trained in full."""

    lora: dict[str, Any] | None = None
    train: str | list[str] = []

    @model_validator(mode="after")
    def _check_trains(self) -> Adapter:
        if self.lora is None and not self.train:
            raise broken_rule("an adapter needs something to train: give `lora`, `train`, or both")
        return self


class Term(_Section):
    """One part of the objective: `model`, or a reference to a function or class, and its weight.

    The weight is a number, `{schedule: ...}` or `{constraint: ...}`; both are judged where objectives are made.
    """

    loss: str
    weight: float | dict[str, Any] = 1.0
    statistics: Literal["window", "micro_batch"] = "window"
    name: str | None = None
    arguments: dict[str, Any] = {}


class ParameterGroup(_Section):
    """What is trained, by name, with a learning rate, a weight decay or optimizer settings of its own."""

    parameters: str | list[str]
    learning_rate: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    optimizer: dict[str, Any] = {}


class Source(_Section):
    """Where rows come from: a file or a directory beside the recipe, a `builtin:` name, or a data set of the hub.

    `name`, `split` and `revision` are of the hub alone; `columns` says what a column is called here (ours: theirs).
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: float | None = Field(default=None, gt=0)
    columns: dict[str, str] = {}


def _find_kind(value: Any) -> str | None:
    """Returns which of the ways to write down a source a value is."""
    kinds = {str: _NAMED, dict: _DESCRIBED, Source: _DESCRIBED, list: _LISTED}
    return next((tag for kind, tag in kinds.items() if isinstance(value, kind)), None)


_NAMED, _DESCRIBED, _LISTED = "<name>", "<source>", "<sources>"  # these words are taken out of messages
_One = Annotated[Annotated[str, Tag(_NAMED)] | Annotated[Source, Tag(_DESCRIBED)], Discriminator(_find_kind)]
Sources = Annotated[
    Annotated[str, Tag(_NAMED)]
    | Annotated[Source, Tag(_DESCRIBED)]
    | Annotated[list[_One], Field(min_length=1), Tag(_LISTED)],
    Discriminator(_find_kind),
]


class Data(_Section):
    """Training and evaluation rows, and how a model reads them; `format` is found from the columns if left out.

    `text`, `image` and `columns` name columns of the data: of text, of an image (or several, or none) beside the file,
    and of anything else (ours: theirs). `chat_template` is a file beside the recipe, or the template; `labels` names
    classes in their order; `group_by` says which rows come together.
    """

    train: Sources
    eval: Sources | None = None
    format: Format | None = None
    text: str = "text"
    image: str | None = None
    columns: dict[str, str] = {}
    max_length: int = Field(default=1024, ge=2)
    chat_template: str | None = None
    loss_on: Literal["all", "assistant", "last"] = "assistant"
    labels: list[str] | None = None
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    packing: bool = False
    streaming: bool = False
    shuffle: bool = True
    seed: int = 42
    group_by: list[Literal["modality", "length"]] = []

    def sources(self, part: Literal["train", "eval"]) -> list[Source]:
        """Returns where the rows of a part come from; none where the recipe has no such part."""
        given = self.train if part == "train" else self.eval
        listed = [] if given is None else given if isinstance(given, list) else [given]
        found = [each if isinstance(each, Source) else Source(path=each) for each in listed]
        return [each.model_copy(update={"columns": {**self.columns, **each.columns}}) for each in found]

    def paths(self) -> list[str]:
        """Returns what all sources are called, each once."""
        return list(dict.fromkeys(each.path for part in PARTS for each in self.sources(part)))

    @model_validator(mode="after")
    def _check_together(self) -> Data:
        if self.packing and self.group_by:
            raise broken_rule("`packing` fills every window, so there is nothing that `group_by` could group")
        if self.packing and self.streaming:
            raise broken_rule(
                "`packing` looks at all rows first, and `streaming` has none before they come; choose one"
            )
        if self.streaming and self.group_by:
            raise broken_rule("`group_by` looks at all rows first, and `streaming` has none before they come")
        return self


class Align(_Section):
    """Each new module learns from what it replaced: the fields of `healing.learning.Alignment`, and how it is done.

    `batch_size` rows are a batch; `stream` keeps one layer in memory (left out, the free memory decides).
    """

    max_steps: int = Field(default=200, ge=1)
    match: Literal["output", "heads", "mixing", "block"] = "output"
    distance: Literal["mse", "cosine"] = "mse"
    train: str | list[str] = []
    optim: str = "AdamW"
    learning_rate: float = Field(default=1e-3, gt=0)
    optim_args: dict[str, Any] = {}
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    patience: int | None = Field(default=None, ge=1)
    inputs: Literal["base", "healed"] = "base"
    parameter_groups: list[ParameterGroup] = []
    batch_size: int = Field(default=4, ge=1)
    stream: bool | None = None
    seed: int = 42


class Place(_Section):
    """Which of the modules that a step of surgery names are changed, under one budget; `step` counts from 0."""

    layers: int | None = Field(default=None, ge=0)
    cache_bytes: int | None = Field(default=None, ge=0)
    flops: int | None = Field(default=None, ge=0)
    length: int = Field(default=1024, ge=1)
    method: Literal["additive", "greedy"] = "additive"
    step: int = Field(default=0, ge=0)
    max_steps: int = Field(default=40, ge=1)

    @model_validator(mode="after")
    def _check_budget(self) -> Place:
        if sum(value is not None for value in (self.layers, self.cache_bytes, self.flops)) != 1:
            raise broken_rule("a budget is one of `layers`, `cache_bytes` and `flops`")
        return self


class Distill(_Section):
    """The whole changed model learns from its base: what is trained (left out, what surgery made new), and how."""

    lora: dict[str, Any] | None = None
    train: str | list[str] = []
    objective: list[Term] = [Term(loss="solidify.losses:chunked_distillation")]
    parameter_groups: list[ParameterGroup] = []
    training: dict[str, Any] = {}


class Heal(_Section):
    """What brings a changed model back before its adapter is trained, in this order: `place`, `align`, `distill`."""

    place: Place | None = None
    align: Align | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _check_stages(self) -> Heal:
        if self.place is None and self.align is None and self.distill is None:
            raise broken_rule("give `place`, `align` or `distill`")
        return self


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


class Recipe(_Section):
    """A recipe: what to make, section by section; without `surgery` the base itself is trained.

    Relative paths start at `directory`, where its file is; `name` is that file's, without its ending.
    """

    base: Base
    surgery: list[Step] = []
    heal: Heal | None = None
    adapter: Adapter | None = None
    objective: list[Term] = [Term(loss="model")]
    trainer: Trainer = "auto"
    teacher: Base | None = None
    reference: Base | None = None
    rewards: list[str] = []
    parameter_groups: list[ParameterGroup] = []
    data: Data | None = None
    training: dict[str, Any] = {}
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
        """Returns the recipe as plain values, with the keys of the YAML file."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

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
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
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
        read = {key: value for key, value in document.items() if key not in own}
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
        raise RecipeError(f"the override {override!r} is not valid YAML: {error}") from error


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
    if isinstance(annotation, type) and issubclass(annotation, _Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in _list_sections(part)]


def _write_sentence(error: Any) -> str:
    """Turns one pydantic error into a sentence with the path of the key and, for unknown keys, its neighbours."""
    location = [str(part) for part in error["loc"] if part not in (_NAMED, _DESCRIBED, _LISTED)]
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
