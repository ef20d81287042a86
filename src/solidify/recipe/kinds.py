"""The trainers that a recipe may name, and what each needs: settings, rows, a head, other models, reward functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from transformers import PreTrainedModel, TrainingArguments
from trl import (
    DistillationConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    RewardConfig,
    SFTConfig,
    is_conversational,
    maybe_convert_to_chatml,
)

from solidify.adapter import lookup
from solidify.errors import DataError, RecipeError, refuse
from solidify.objective.internals import refuse_other_vocabulary
from solidify.objective.objective import Objective
from solidify.recipe import datasets, models, references, trl_rows
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import PARTS
from solidify.system import foreign
from solidify.training import data, formats, sources
from solidify.training.distilling import ObjectiveDistillationTrainer
from solidify.training.preference import ObjectiveDPOTrainer
from solidify.training.reinforcing import ObjectiveGRPOTrainer
from solidify.training.rewarding import ObjectiveRewardTrainer
from solidify.training.sft import ObjectiveSFTTrainer
from solidify.training.trainer import ObjectiveTrainer
from solidify.training.unpaired import ObjectiveKTOTrainer

_OF_TEXTS = ("classification", "multi_label", "regression")  # what a head for texts learns from
_GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)  # to a reward function


@dataclass(frozen=True)
class Kind:
    """A trainer: its class, whose fields `training` holds, and what it needs of a recipe.

    `formats` are those whose rows the trainer reads as they are, and makes tokens of them itself; without, rows become
    examples here. `head` is what the model must predict: `tokens`, a `score`, `classes`, or anything (None), which the
    format decides. `lengths` says that the settings have a `max_length`.
    """

    name: str
    trainer: type[Any]
    config: type[Any] = TrainingArguments
    formats: tuple[str, ...] = ()
    head: str | None = "tokens"
    lengths: bool = False

    @property
    def takes_rows(self) -> bool:
        """Whether the trainer reads rows as they are, and makes tokens of them itself."""
        return bool(self.formats)


def _find_taught() -> Kind:
    """GKDTrainer is one of TRL's experimental trainers: it is loaded where a recipe names it."""
    from solidify.training.teaching import ObjectiveGKDTrainer

    from trl.experimental.gkd import GKDConfig  # isort: skip  # after ours, which keeps TRL's announcement away

    return Kind("gkd", ObjectiveGKDTrainer, GKDConfig, ("messages",), lengths=True)


_KINDS: dict[str, Callable[[], Kind]] = {
    "auto": lambda: Kind("auto", ObjectiveTrainer, head=None),
    "sft": lambda: Kind("sft", ObjectiveSFTTrainer, SFTConfig, lengths=True),
    "dpo": lambda: Kind("dpo", ObjectiveDPOTrainer, DPOConfig, ("preference",), lengths=True),
    "kto": lambda: Kind("kto", ObjectiveKTOTrainer, KTOConfig, ("unpaired_preference", "preference"), lengths=True),
    "distill": lambda: Kind("distill", ObjectiveDistillationTrainer, DistillationConfig, ("prompts",)),
    "gkd": _find_taught,
    "reward": lambda: Kind("reward", ObjectiveRewardTrainer, RewardConfig, ("preference",), "score", lengths=True),
    "grpo": lambda: Kind("grpo", ObjectiveGRPOTrainer, GRPOConfig, ("prompts",)),
    "classification": lambda: Kind("classification", ObjectiveTrainer, head="classes"),
}


def find(recipe: Recipe) -> Kind:
    """Returns the trainer that a recipe names; with `auto` a field that only SFTConfig has asks for TRL's.

    Raises:
        RecipeError: the training section has a field that the trainer's settings have not.
    """
    kind = _KINDS[recipe.trainer]()
    known = {f.name for f in fields(kind.config)}
    where = f"{kind.config.__name__} (trainer: {recipe.trainer})"
    if kind.name == "auto":
        sft = {f.name for f in fields(SFTConfig)}
        kind = _KINDS["sft"]() if any(key in sft - known for key in recipe.training) else kind
        known, where = known | sft, "TrainingArguments or SFTConfig"
    faults = []
    for key in recipe.training:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else _name_owners(key)
            faults.append(f"training.{key} is not a field of {where}{hint}")
    refuse(RecipeError, "the training section does not fit", faults)
    return kind


def _name_owners(key: str) -> str:
    """Says whose settings have a field."""
    others = [name for name in _KINDS if name not in ("auto", "gkd")]
    owners = [name for name in others if key in {f.name for f in fields(_KINDS[name]().config)}]
    return f"; it is one of trainer: {' or '.join(owners)}" if owners else ""


def own_settings(kind: Kind, recipe: Recipe) -> dict[str, Any]:
    """Returns settings that a recipe's own go over."""
    assert recipe.data is not None
    has = {f.name for f in fields(kind.config)}
    values: dict[str, Any] = {}
    if "router_aux_loss_coef" in has:
        # TRL would add its own load balance to the loss of every MoE model; here the objective says what is in it.
        values["router_aux_loss_coef"] = 0.0
    if kind.lengths:
        values["max_length"] = recipe.data.max_length
    if "shuffle_dataset" in has and kind.takes_rows:
        values["shuffle_dataset"] = recipe.data.shuffle
    if kind.name == "sft":
        values["dataset_text_field"] = recipe.data.text
    return values


def setting_faults(kind: Kind, arguments: Any, objective: Objective, recipe: Recipe) -> list[str]:
    """Says what of the settings and the objective the trainer cannot do, as far as settings alone tell."""
    assert recipe.data is not None
    faults: list[str] = kind.trainer.runner_of.judge(arguments, objective)
    if kind.name == "kto" and arguments.loss_type == "kto" and arguments.per_device_train_batch_size < 2:
        faults.append(
            "per_device_train_batch_size is 1, and KTO's divergence needs the answers of other rows of a batch; give "
            "it at least 2"
        )
    if kind.name == "grpo" and recipe.data.eval is not None:
        size, answers = (
            arguments.per_device_eval_batch_size,
            arguments.num_generations_eval or arguments.num_generations,
        )
        if size * arguments.world_size % answers:
            faults.append(
                f"per_device_eval_batch_size is {size}, in which prompts with {answers} answers each do not fit "
                f"evenly; give it a multiple of {answers}, or say num_generations_eval"
            )
    return faults


def refuse_head(kind: Kind, model: PreTrainedModel) -> None:
    """Raises DataError when a model does not predict what the trainer teaches."""
    if kind.head == "tokens" and kind.takes_rows:
        data.refuse_untaught(model)
    plain, learned = lookup.plain_model(model), formats.learned_by(model)
    labels = getattr(plain.config, "num_labels", None) if set(learned) & set(_OF_TEXTS) else None
    if kind.head == "score" and labels != 1:
        raise DataError(
            f"trainer: reward teaches a model that gives a text one score, and {type(plain).__name__} gives "
            f"{labels or 'none'}; take a base with a head for sequence classification and num_labels: 1"
        )
    if kind.head == "classes" and not learned:
        raise DataError(f"trainer: classification: {formats.explain_untaught(plain)}")
    if kind.head == "classes" and not set(learned) & set(formats.LABELLED):
        raise DataError(
            f"trainer: classification teaches heads that classify texts, tokens or images, and {type(plain).__name__} "
            "is none; take a base with such a head, or another trainer"
        )


def read_rows(kind: Kind, recipe: Recipe) -> tuple[Any, Any]:
    """Reads the rows that a trainer takes as they are (None without evaluation data).

    Raises:
        DataError: they have not the columns that it needs.
        RecipeError: the data section asks for another format, or to pack what is no plain text.
    """
    assert recipe.data is not None
    asked = recipe.data
    if asked.format is not None and asked.format not in kind.formats:
        raise RecipeError(f"data.format is {asked.format}, but trainer: {kind.name} learns from {_list_formats(kind)}")
    if asked.packing:
        raise RecipeError(f"data.packing puts plain texts into one window, which trainer: {kind.name} has none of")
    read, faults = datasets.read_rows(recipe), []
    for part, rows in zip(PARTS, read, strict=True):
        columns = sources.columns(rows) if rows is not None else []
        if rows is not None and not any(formats.FORMATS[name].fits(columns) for name in kind.formats):
            faults.append(
                f"data.{part} has the columns {', '.join(columns)}, but trainer: {kind.name} learns from "
                f"{_list_formats(kind)}; rename columns with `data.columns`, or choose another trainer"
            )
    refuse(DataError, "the data does not fit the trainer", faults)
    if kind.name == "gkd":
        train, held_out = (rows.map(maybe_convert_to_chatml) if rows is not None else None for rows in read)
        return train, held_out
    if kind.name == "kto" and asked.shuffle and not asked.streaming:  # in TRL's trainer rows keep their order
        return read[0].shuffle(seed=asked.seed), read[1]
    return read


def _list_formats(kind: Kind) -> str:
    return " or ".join(f"{formats.FORMATS[name]}: {formats.FORMATS[name].words}" for name in kind.formats)


def rehearse_rows(kind: Kind, recipe: Recipe, tokenizer: Any) -> dict[str, Any]:
    """Looks at the rows that a trainer takes as they are, and returns how it reads them.

    Raises:
        DataError: they do not fit the trainer, or are conversations that nothing says how to write.
        RecipeError: as `read_rows`.
    """
    assert recipe.data is not None
    read = read_rows(kind, recipe)
    told = any(is_conversational(dict(sources.first(rows, 1)[0])) for rows in read if rows is not None)
    if told and not with_template(recipe, tokenizer).chat_template:
        raise DataError(
            "data: the rows are conversations, and the tokenizer has no chat template; give one with "
            "`data.chat_template` (a file beside the recipe, or the template itself)"
        )
    if kind.name == "grpo":
        find_rewards(recipe, sources.columns(read[0]))
    return {"format": name_format(kind, read[0]), **({"max_length": trl_rows.longest(recipe)} if kind.lengths else {})}


def name_format(kind: Kind, rows: Any) -> str:
    """Returns as what a trainer reads rows that have the columns that it needs."""
    return next(name for name in kind.formats if formats.FORMATS[name].fits(sources.columns(rows)))


def with_template(recipe: Recipe, tokenizer: Any) -> Any:
    """Returns a tokenizer that writes conversations as the recipe says, if it says so."""
    assert recipe.data is not None
    template = recipe.chat_template()
    if template is None:
        return tokenizer
    given = deepcopy(tokenizer)
    given.chat_template = template
    return given


@contextmanager
def pointed_out(recipe: Recipe) -> Iterator[None]:
    """While the block lasts, rows that another trainer reads are refused with that trainer's name."""
    try:
        yield
    except (DataError, RecipeError) as error:
        read = foreign.attempt(datasets.read_rows, recipe).value
        columns = sources.columns(read[0]) if read is not None else []
        form = next((each.name for each in formats.FORMATS.values() if each.fits(columns)), None)
        others = [name for name, make in _KINDS.items() if name != "gkd" and form in make().formats]
        if not others:
            raise
        hint = f"; such rows are read by trainer: {' or '.join(others)}"
        raise type(error)(f"{error}{hint}", error.faults) from error


def find_rewards(recipe: Recipe, columns: Sequence[str] = ()) -> list[Callable[..., Any]]:
    """Returns the reward functions that a recipe names; with the data's columns also whether they can be called.

    Raises:
        RecipeError: one is no function, or does not take what reward functions are given.
    """
    found, faults = [], []
    for reference in recipe.rewards:
        function = references.resolve(reference, recipe.directory)
        if not callable(function) or inspect.isclass(function):
            faults.append(f"{reference} is of type {type(function).__name__}; a reward is a function")
            continue
        given = [*_GIVEN, *(each for each in columns if each not in ("prompt", "completion", "completion_ids"))]
        called = foreign.attempt(lambda f, names: inspect.signature(f).bind(**dict.fromkeys(names)), function, given)
        if columns and isinstance(called.error, TypeError):
            faults.append(
                f"{reference} cannot be called ({called.error}): by name it is given {', '.join(given)}; let it take "
                "those that it reads, and **kwargs"
            )
        found.append(function)
    refuse(RecipeError, "the rewards cannot be called", faults)
    return found


def options(kind: Kind, recipe: Recipe, objective: Objective) -> dict[str, Any]:
    """Returns what a trainer is given beside model, settings, objective and data."""
    if kind.name in ("distill", "gkd"):
        return {"teacher_model": objective.reference}
    if kind.name in ("dpo", "kto"):
        return {"ref_model": models.load_reference(recipe)}
    return {"reward_funcs": find_rewards(recipe)} if kind.name == "grpo" else {}


def refuse_partners(kind: Kind, recipe: Recipe, model: PreTrainedModel) -> None:
    """Looks at what a trainer compares with or learns from, without its weights.

    Raises:
        RecipeError: a model cannot be had.
        ObjectiveError: a model has another vocabulary.
    """
    others = [models.load_reference(recipe, device="meta")]
    others += [models.load_teacher(recipe, device="meta")] if kind.name in ("distill", "gkd") else []
    for other in others:
        if other is not None:
            refuse_other_vocabulary(model, other)
