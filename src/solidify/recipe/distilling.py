"""From `heal.distill` of a recipe to the training that it stands for: an adapter's, on the aligned artifact."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from solidify.adapter import adapters, start_kinds
from solidify.adapter import plan as planning
from solidify.errors import HealingError, ObjectiveError, RecipeError, SolidifyError, raised_as
from solidify.recipe import objectives, trainers
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import Adapter
from solidify.system import console
from solidify.training import groups

# How the messages of an adapter's training name what, in a distillation, stands under `heal.distill`.
_OWN_KEY = re.compile(r"(?<![\w.`'])(training|parameter_groups|objective|train|lora)(?=[.:\[]\S|: )")
_OWN_WORDS = {
    "teacher: no term of the objective looks at it": "heal.distill.objective: no term looks at the base",
    "the parameter groups": "heal.distill.parameter_groups",
    "the training section": "heal.distill.training",
    "the adapter cannot be attached": "heal.distill cannot be trained",
    "LoRA: ": "heal.distill.lora: ",
    "the adapter": "the adapter of heal.distill",
}


@contextmanager
def naming_keys() -> Iterator[None]:
    """While the block lasts, what is refused of the training within `heal.distill` names the keys that stand there."""
    try:
        yield
    except SolidifyError as error:
        words = _name_keys(str(error))
        words = words if "heal.distill" in words else f"heal.distill: {words}"
        raise type(error)(words, map(_name_keys, error.faults)) from error


def _name_keys(words: str) -> str:
    for known, written in _OWN_WORDS.items():
        words = words.replace(known, written) if written not in words else words
    return _OWN_KEY.sub(r"heal.distill.\1", words)


def inner_recipe(recipe: Recipe, model: PreTrainedModel, edits: Sequence[Mapping[str, Any]]) -> Recipe | None:
    """Returns the recipe of distillation, whose run is `heal/`: an adapter on the aligned artifact, with the base as
    teacher. None where nothing is distilled.

    Raises:
        HealingError: it names nothing that learns, and surgery made nothing new.
    """
    heal = recipe.heal
    if heal is None or heal.distill is None:
        return None
    asked = heal.distill
    train: str | list[str] = asked.train
    if not train and asked.lora is None:
        made = {name for edit in edits for name in edit["new"]}
        train = [name for name, _ in model.named_parameters() if name in made]
        if not train:
            raise HealingError("heal.distill: surgery made nothing new; say with `train` or `lora` what learns")
    return recipe.model_copy(
        update={
            "heal": None,
            "adapter": Adapter(lora=asked.lora, train=train),
            "objective": asked.objective,
            "teacher": recipe.base.model_copy(update={"quantization": None}),
            "trainer": "auto",
            "reference": None,
            "rewards": [],
            "parameter_groups": asked.parameter_groups,
            "cache_prefix": None,
            "training": asked.training,
            "output": None,
        }
    )


def plan(inner: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """Says what a distillation would take, on the meta device.

    Raises:
        SolidifyError: it cannot begin.
    """
    with naming_keys():
        return _plan_training(inner, model)


def _plan_training(inner: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    assert inner.adapter is not None
    wanted = planning.plan(model, inner.adapter.lora, inner.adapter.train)
    arguments = trainers.training_arguments(inner, Path("nowhere"))
    trainers.refuse_unspreadable(arguments, here=False)
    if inner.parameter_groups:
        shapes = start_kinds.without_start(inner.adapter.lora)
        with console.silence(), raised_as(RecipeError, of=ObjectiveError):
            attached = adapters.attach(copy.deepcopy(model), lora=shapes, train=inner.adapter.train)
            groups.resolve(attached, trainers.parameter_groups(inner))
    return {
        "objective": [term.name for term in objectives.make_terms(inner)],
        "trained": [*wanted.modules, *wanted.parameters],
        "lora": [*wanted.lora_modules, *wanted.lora_parameters],
        "max_steps": arguments.max_steps,
    }
