"""What rows are: found from their columns, and from what a model's head can learn.

A format is a name, the columns that it needs, and the heads that learn from it. Nothing is tokenized here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from solidify.errors import DataError
from solidify.objective.internals import shifts_labels
from solidify.upstream import transformers_training as heads


@dataclass(frozen=True)
class Format:
    """What rows of a kind hold: all columns of one of `columns`; `words` says what a model learns from them."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    words: str

    def fits(self, columns: Sequence[str]) -> bool:
        """Returns whether rows with these columns can be read so."""
        return any(all(name in columns for name in needed) for needed in self.columns)

    def __str__(self) -> str:
        return f"{self.name} ({' or '.join(', '.join(needed) for needed in self.columns)})"


# In this order they are looked for: the first that the columns and the head allow is taken.
FORMATS = {
    each.name: each
    for each in (
        Format("messages", (("messages",), ("conversations",)), "turns of a conversation"),
        Format("preference", (("chosen", "rejected"),), "which of two answers is better"),
        Format("unpaired_preference", (("prompt", "completion", "label"),), "whether an answer is good"),
        Format("prompt_completion", (("prompt", "completion"),), "the completion of a prompt"),
        Format("seq2seq", (("source", "target"),), "a text made of another"),
        Format("token_classification", (("words", "tags"), ("tokens", "tags")), "a tag for each word"),
        Format("image_classification", (("image", "label"),), "the class of an image"),
        Format("classification", (("text", "label"),), "the class of a text"),
        Format("multi_label", (("text", "label"),), "all labels of a text that hold"),
        Format("regression", (("text", "label"),), "a number for a text"),
        Format("text", (("text",),), "the next token of a text"),
        Format("masked", (("text",),), "hidden tokens of a text"),
        Format("prompts", (("prompt",),), "answers to prompts, which are judged"),
    )
}
NEXT_TOKEN = ("text", "messages", "prompt_completion")
OF_TRAINERS = ("preference", "unpaired_preference", "prompts")  # learned by a trainer's own loss, not by a model's
_OF_TEXTS = ("classification", "multi_label", "regression")
CLASSES = ("classification", "multi_label", "token_classification", "image_classification")
LABELLED = (*_OF_TEXTS, "token_classification", "image_classification")

_HEADS: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...] = (
    (heads.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, _OF_TEXTS),
    (heads.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, ("token_classification",)),
    (heads.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, ("image_classification",)),
    (heads.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, ("seq2seq",)),
    (heads.MODEL_FOR_MASKED_LM_MAPPING_NAMES, ("masked",)),
)


def fitting(columns: Sequence[str]) -> list[str]:
    """Returns the names of all formats as which rows with these columns can be read."""
    return [name for name, each in FORMATS.items() if each.fits(columns)]


def learned_by(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the formats that a model's own loss learns from; none where nothing is known of its head."""
    listed = {kind.__name__ for kind in _families(model)}
    found: tuple[str, ...] = NEXT_TOKEN if learns_next_token(model) else ()
    for mapping, names in _HEADS:
        classes = {name for each in mapping.values() for name in ((each,) if isinstance(each, str) else each)}
        found += (names if names != _OF_TEXTS else _narrow(model.config)) if listed & classes else ()
    return tuple(dict.fromkeys(found))


def _narrow(config: Any) -> tuple[str, ...]:
    """Returns what a head for texts learns from: as its configuration says, or else by its number of outputs."""
    declared = {
        "single_label_classification": ("classification",),
        "multi_label_classification": ("multi_label",),
        "regression": ("regression",),
    }
    one = ("regression",) if config.num_labels == 1 else ("classification", "multi_label")
    return declared.get(config.problem_type, one)


def learns_next_token(model: nn.Module) -> bool:
    """Returns whether a model learns the next token: by its loss, and, of transformers' own, by its head's lists."""
    listed = {
        *heads.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *heads.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
    }
    families = _families(model)
    is_listed = not families or any(kind.__name__ in listed for kind in families)
    return is_listed and shifts_labels(model) and isinstance(model, PreTrainedModel) and bool(model.can_generate())


def _families(model: nn.Module) -> list[type]:
    return [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")]


def find(
    columns: Sequence[str],
    learned: Sequence[str],
    first: Mapping[str, Any],
    given: str | None = None,
    *,
    head: str = "the model",
) -> str:
    """Returns the format of rows with these columns for a head that learns from `learned`; `first` is a row.

    `head` is what the model is called in messages.

    Raises:
        DataError: nothing that the head learns from stands in the rows, or not what was given.
    """
    if given is not None:
        if not FORMATS[given].fits(columns):
            raise DataError(f"the format is {FORMATS[given]}, and the rows have: {', '.join(columns)}")
        return given
    fits = fitting(columns)
    labels = _formats_of_label(first.get("label"))
    chosen = [name for name in fits if name in learned and (name not in _OF_TEXTS or name in labels)]
    if chosen:
        return chosen[0]
    raise DataError(
        f"the rows have the columns {', '.join(columns)}{_say(fits)}, but {head} learns from {_list(learned)}; "
        "rename columns with `columns`, or take another base"
    )


def _say(fitting: Sequence[str]) -> str:
    return f", which make {' or '.join(fitting)}" if fitting else ", which make nothing that is known"


def _list(names: Sequence[str]) -> str:
    return "; ".join(str(FORMATS[name]) for name in names)


def _formats_of_label(label: Any) -> tuple[str, ...]:
    """Returns what a label can be; a whole number is a class before it is a number."""
    if isinstance(label, (list, tuple)):
        return ("multi_label",)
    if isinstance(label, float):
        return ("regression",)
    return ("classification", "regression")


def explain_untaught(model: nn.Module) -> str:
    """Says of a model that learns from no format what can be done with it."""
    kind = type(model).__name__
    taken = getattr(model.config, "example_inputs", None)
    if isinstance(taken, Mapping) and "name" in taken:
        return (
            f"{kind} is a module that solidify.wrap made a model of, which no rows of a recipe teach; train it from "
            "Python: solidify.load it, solidify.attach an adapter, give solidify.ObjectiveTrainer a data set of "
            f"`{taken['name']}` and `labels`, and solidify.merge what it learned (a recipe of `base` and `surgery` "
            "alone changes it)"
        )
    return (
        f"{kind} has a head that no format here teaches; train it from Python with solidify.ObjectiveTrainer and data "
        "of your own (a recipe of `base` and `surgery` alone changes it)"
    )


def refuse_unlearned(name: str, model: nn.Module) -> None:
    """Raises DataError for a format that a model's own loss cannot learn from, with those that it can."""
    learned = learned_by(model)
    if name in learned:
        return
    kind = type(model).__name__
    if name in OF_TRAINERS and learned:
        raise DataError(
            f"{name} ({FORMATS[name].words}) is learned by a trainer's own loss, and here {kind} is trained on its "
            f"own, which learns from {_list(learned)}"
        )
    if not learned:
        raise DataError(explain_untaught(model))
    raise DataError(f"the rows are {name} ({FORMATS[name].words}), but {kind} learns from {_list(learned)}")
