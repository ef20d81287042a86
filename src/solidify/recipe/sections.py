"""The sections of a recipe, each frozen values with its own rules; schema.py makes a recipe of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from solidify.surgery.operation import broken_rule

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


class Section(BaseModel):
    """Known keys alone, each of its own kind, none changed later."""

    # Strict: `true` is no number, and a number in quotes is none; so says the JSON schema (json_schema.py) too.
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Base(Section):
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


class Adapter(Section):
    """What is trained: PEFT's LoRA fields verbatim, and names of modules or parameters trained in full."""

    lora: dict[str, Any] | None = None
    train: str | list[str] = []

    @model_validator(mode="after")
    def _check_trains(self) -> Adapter:
        if self.lora is None and not self.train:
            raise broken_rule("an adapter needs something to train: give `lora`, `train`, or both")
        return self


class Term(Section):
    """One part of the objective: `model`, or a reference to a function or class, and its weight.

    The weight is a number, `{schedule: ...}` or `{constraint: ...}`; both are judged where objectives are made.
    """

    loss: str
    weight: float | dict[str, Any] = 1.0
    statistics: Literal["window", "micro_batch"] = "window"
    name: str | None = None
    arguments: dict[str, Any] = {}


class ParameterGroup(Section):
    """What is trained, by name, with a learning rate, a weight decay or optimizer settings of its own."""

    parameters: str | list[str]
    learning_rate: float | None = Field(default=None, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    optimizer: dict[str, Any] = {}


class Source(Section):
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
    kinds = {str: NAMED, dict: DESCRIBED, Source: DESCRIBED, list: LISTED}
    return next((tag for kind, tag in kinds.items() if isinstance(value, kind)), None)


NAMED, DESCRIBED, LISTED = "<name>", "<source>", "<sources>"  # these words are taken out of messages
_One = Annotated[Annotated[str, Tag(NAMED)] | Annotated[Source, Tag(DESCRIBED)], Discriminator(_find_kind)]
Sources = Annotated[
    Annotated[str, Tag(NAMED)]
    | Annotated[Source, Tag(DESCRIBED)]
    | Annotated[list[_One], Field(min_length=1), Tag(LISTED)],
    Discriminator(_find_kind),
]


class Data(Section):
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
        if self.streaming and self.image is not None:
            raise broken_rule(
                "`image` opens what all rows name, and `streaming` has none before they come; leave one out"
            )
        return self


class Align(Section):
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


class Place(Section):
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


class Distill(Section):
    """The whole changed model learns from its base: what is trained (left out, what surgery made new), and how."""

    lora: dict[str, Any] | None = None
    train: str | list[str] = []
    objective: list[Term] = [Term(loss="solidify.losses:chunked_distillation")]
    parameter_groups: list[ParameterGroup] = []
    training: dict[str, Any] = {}


class Heal(Section):
    """What brings a changed model back before its adapter is trained, in this order: `place`, `align`, `distill`."""

    place: Place | None = None
    align: Align | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _check_stages(self) -> Heal:
        if self.place is None and self.align is None and self.distill is None:
            raise broken_rule("give `place`, `align` or `distill`")
        return self
