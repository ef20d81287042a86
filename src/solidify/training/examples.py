"""Rows of every format become examples, and what was cut off is counted.

Text is cut into windows, so nothing of it is lost. All else is one example a row, cut at `max_length`; a row of which
no counted token is left has nothing to learn from, and is left out. A stream is cut in the same way, and not counted.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from solidify.adapter import lookup
from solidify.errors import DataError, refuse
from solidify.system import foreign
from solidify.training import chats, collating, data, labelling, numbering, sources
from solidify.training.chats import Chat
from solidify.training.formats import CLASSES, NEXT_TOKEN

_LOST, _KEPT = "lost_tokens", "counted_tokens"  # columns of what `make` counts
_READ = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")


@dataclass(frozen=True)
class Reading:
    """How rows become examples: their format, the longest example (of text), and what makes tokens or pixels of them.

    `config` is the model's, `accepts` names what its forward pass takes, `names` the classes in their order (None where
    rows have numbers alone); `spelled` are those of the data set, where it numbers its own.
    """

    format: str
    max_length: int
    processor: Any
    config: Any = None
    accepts: tuple[str, ...] = ()
    chat: Chat | None = None
    names: tuple[str, ...] | None = None
    text: str = "text"
    mask_probability: float = 0.15
    seed: int = 42
    packing: bool = False
    spelled: tuple[str, ...] | None = None

    @property
    def limits(self) -> dict[str, int]:
        """Returns the longest example by its name, where examples have a length."""
        return {} if self.format == "image_classification" else {"max_length": self.max_length}


@dataclass(frozen=True)
class Counted:
    """What became of rows: how many there were, how many were cut and what of them is gone.

    `silent` rows have lost every token that counts, and are left out; `windows` says that text was cut into several
    examples, which loses nothing. `counted` of all `tokens` count for the loss; of `images`, each does.
    """

    rows: int
    examples: int
    tokens: int
    counted: int
    cut: int = 0
    lost: int = 0
    silent: int = 0
    windows: bool = False
    images: int = 0

    def document(self) -> dict[str, Any]:
        """Returns the numbers as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        if self.images:
            return f"{self.rows:,} rows, {self.images:,} images, {self.counted:,} count"
        made = f"{self.rows:,} rows, {self.examples:,} examples of {self.tokens:,} tokens, {self.counted:,} count"
        if self.windows:
            return f"{made}; longer texts were cut into windows"
        if not self.cut and not self.silent:
            return f"{made}; none was cut"
        return (
            f"{made}; {self.cut:,} rows were cut and lost {self.lost:,} tokens, {self.silent:,} have no counted token "
            "left and are left out"
        )


def accepted(model: nn.Module) -> tuple[str, ...]:
    """Returns what a model's forward pass takes by name."""
    return tuple(inspect.signature(lookup.plain_model(model).forward).parameters)


def of_rows(rows: Any, reading: Reading) -> Reading:
    """Returns how some rows are read, which may number their classes in a way of their own.

    Raises:
        DataError: nothing says which number each of their names has.
    """
    if reading.format not in CLASSES:
        return reading
    return replace(reading, spelled=numbering.spelled_by(rows, reading.names))


def make(rows: Any, reading: Reading) -> tuple[Any, Counted | None]:
    """Returns the examples of rows, and what was counted (None of a stream).

    Raises:
        DataError: a row is not what its format says, or nothing is left to learn from.
    """
    reading = of_rows(rows, reading)
    with foreign.calling("the rows cannot be read", DataError):
        made = _make_images(rows, reading) if reading.format == "image_classification" else _map(rows, reading)
        if sources.is_stream(rows):
            return made.filter(_counts).remove_columns([_LOST, _KEPT]) if _is_counted(reading) else made, None
        counted = _count(rows, made, reading)
        made = made.filter(_counts).remove_columns([_LOST, _KEPT]) if _is_counted(reading) else made
    if not len(made):
        raise DataError(
            f"nothing is left to learn from: of {len(rows)} rows none has a token that counts within max_length "
            f"{reading.max_length}"
        )
    return made, counted


def collator(reading: Reading) -> Any:
    """Returns what makes a batch of examples."""
    if reading.format == "image_classification":
        return collating.Pictures(reading.processor)
    if reading.format == "masked":
        return collating.Masking(reading.processor, reading.mask_probability, reading.seed)
    if reading.format in NEXT_TOKEN:
        return collating.Packed() if reading.packing else data.collator(reading.processor)
    return collating.padding(reading.format, reading.processor)


def hide(made: Any, collate: collating.Masking) -> Any:
    """Returns examples with tokens hidden once and for all, so that every evaluation hides the same.

    Raises:
        DataError: no token is hidden, so that there is nothing to measure.
    """
    kept = made.map(collate.hide, load_from_cache_file=False)
    if not any(label != -100 for row in kept["labels"] for label in row):
        tokens = sum(not mark for row in made["special_tokens_mask"] for mark in row)
        raise DataError(
            f"none of the {tokens} tokens is hidden at mask_probability {collate.probability}, so there is nothing to "
            "measure; give more text, or a higher mask_probability"
        )
    return kept.remove_columns([name for name in kept.column_names if name == "special_tokens_mask"])


def read_one(row: Mapping[str, Any], reading: Reading) -> tuple[dict[str, Any], int]:
    """Makes an example of one row; returns it, and how many tokens were cut off.

    Raises:
        DataError: the row is not what its format says.
    """
    if reading.format in ("messages", "prompt_completion"):
        made = (
            chats.from_messages(row, _require_chat(reading))
            if reading.format == "messages"
            else chats.from_prompt(row, reading.chat, reading.processor)
        )
        ids, labels = (part[: reading.max_length] for part in made)
        return {"input_ids": ids, "labels": labels}, len(made[0]) - len(ids)
    row = {**row, **{name: numbering.spell(row[name], reading.spelled) for name in numbering.COLUMNS if name in row}}
    whole = _encode(row, reading, {})
    if max(len(whole["input_ids"]), _width(whole, reading)) <= reading.max_length:
        return whole, 0
    cut = _encode(row, reading, {"truncation": True, "max_length": reading.max_length})
    lost = len(whole["input_ids"]) - len(cut["input_ids"]) + _width(whole, reading) - _width(cut, reading)
    return cut, lost


def _width(example: Mapping[str, Any], reading: Reading) -> int:
    return len(example["labels"]) if reading.format == "seq2seq" else 0


def _encode(row: Mapping[str, Any], reading: Reading, cut: dict[str, Any]) -> dict[str, Any]:
    if reading.format == "token_classification":
        made = labelling.of_words(row, reading.processor, reading.config, reading.names, cut)
    elif reading.format == "seq2seq":
        made = labelling.of_pair(row, reading.processor, cut)
    else:
        made = labelling.of_text(reading.format, row, reading.processor, reading.config, reading.names, cut)
    return {key: value for key, value in made.items() if key == "labels" or key in reading.accepts}


def _require_chat(reading: Reading) -> Chat:
    assert reading.chat is not None
    return reading.chat


def _is_counted(reading: Reading) -> bool:
    return reading.format not in ("text", "masked", "image_classification")


def _map(rows: Any, reading: Reading) -> Any:
    if reading.format == "text":
        return data.tokenize(rows, reading.processor, text=reading.text, max_length=reading.max_length)
    function = _make_masked if reading.format == "masked" else _make_batch
    options = {} if sources.is_stream(rows) else {"load_from_cache_file": False}  # how rows are read may have changed
    return rows.map(
        function,
        batched=True,
        with_indices=True,
        remove_columns=sources.columns(rows),
        fn_kwargs={"reading": reading},
        **options,
    )


def _make_batch(rows: dict[str, list[Any]], numbers: list[int], *, reading: Reading) -> dict[str, list[Any]]:
    """Makes examples of a batch of rows, or raises all that is wrong with it."""
    made: list[dict[str, Any]] = []
    faults = []
    for index, number in enumerate(numbers):
        read = foreign.attempt(read_one, {name: column[index] for name, column in rows.items()}, reading)
        if read.value is None:
            says = str(read.error) if isinstance(read.error, DataError) else foreign.said(read.error or ValueError())
            faults.append(f"row {number}: {says}")
            continue
        example, lost = read.value
        made.append({**example, _LOST: lost, _KEPT: _count_labels(example, reading)})
    refuse(DataError, "the data does not fit", data.few(faults))
    return {name: [each[name] for each in made] for name in made[0]}


def _count_labels(example: Mapping[str, Any], reading: Reading) -> int:
    """Returns how many labels of an example count; a first token is predicted by nothing."""
    labels = example["labels"]
    if reading.format in NEXT_TOKEN:
        labels = labels[1:]
    if reading.format in (*NEXT_TOKEN, "seq2seq", "token_classification"):
        return sum(label != -100 for label in labels)
    return 1


def _make_masked(rows: dict[str, list[Any]], numbers: list[int], *, reading: Reading) -> dict[str, list[Any]]:
    """Cuts texts into windows, each with the special tokens of a text; tokens are hidden when a batch is made."""
    tokenizer: PreTrainedTokenizerBase = reading.processor
    if not tokenizer.is_fast:
        raise DataError("text for a masked head is cut into windows by a fast tokenizer, and the base has a slow one")
    made = tokenizer(
        rows[reading.text],
        truncation=True,
        max_length=reading.max_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    filled = [n for n, marks in enumerate(made["special_tokens_mask"]) if not all(marks)]
    names = [name for name in _READ if name in made and (name in reading.accepts or name == "special_tokens_mask")]
    return {name: [made[name][n] for n in filled] for name in names}


def _make_images(rows: Any, reading: Reading) -> Any:
    """Gives images the numbers of their classes; the images themselves are not opened."""
    kept = rows.select_columns(["image", "label"])
    if sources.is_stream(rows):
        return kept.map(_number_image, with_indices=True, remove_columns=["label"], fn_kwargs={"reading": reading})
    faults, numbers = [], []
    for index, label in enumerate(kept["label"]):
        label = numbering.spell(label, reading.spelled)
        read = foreign.attempt(labelling.number_of, label, reading.config, reading.names)
        numbers.append(read.value)
        faults += [f"row {index}: {read.error}"] if read.error is not None else []
    faults += _find_missing(kept)
    refuse(DataError, "the data does not fit", data.few(faults))
    return kept.remove_columns(["label"]).add_column("labels", numbers)


def _find_missing(rows: Any) -> list[str]:
    """Says which rows name an image that is not there; those of the web are looked at when they are opened."""
    if not isinstance(rows.features["image"], datasets.Value):
        return []
    named = enumerate(rows["image"])
    return [f"row {n}: there is no image {name!r}" for n, name in named if not _is_image(name)]


def _is_image(name: Any) -> bool:
    return isinstance(name, str) and (name.startswith(("http://", "https://")) or os.path.isfile(name))


def _number_image(row: dict[str, Any], number: int, *, reading: Reading) -> dict[str, Any]:
    return {
        "labels": labelling.number_of(numbering.spell(row["label"], reading.spelled), reading.config, reading.names)
    }


def _counts(row: Mapping[str, Any]) -> bool:
    return bool(row[_KEPT])


def _count(rows: Any, made: Any, reading: Reading) -> Counted:
    if reading.format == "image_classification":
        return Counted(len(rows), len(made), 0, len(made), images=len(made))
    tokens = sum(map(len, made["input_ids"]))
    if not _is_counted(reading):
        counted = tokens - len(made) if reading.format == "text" else tokens
        return Counted(len(rows), len(made), tokens, counted, windows=True)
    lost, kept = made[_LOST], made[_KEPT]
    return Counted(
        rows=len(rows),
        examples=sum(map(bool, kept)),
        tokens=tokens,
        counted=sum(kept),
        cut=sum(map(bool, lost)),
        lost=sum(lost),
        silent=sum(not count for count in kept),
    )
