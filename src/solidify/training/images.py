"""Rows of text with images among them, and rows of text alone, become examples; images are opened batch by batch.

The model's processor says how many tokens an image takes. An example keeps where its images are, not their pixels,
which are made when a batch is put together: they would be hundreds of times larger than the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import ProcessorMixin
from transformers.image_utils import load_image

from solidify.errors import DataError, refuse
from solidify.system import foreign
from solidify.training import data
from solidify.training.data import IMAGES


def tokenize(rows: datasets.Dataset, processor: ProcessorMixin, *, text: str, max_length: int) -> datasets.Dataset:
    """Returns examples of at most `max_length` tokens: `input_ids`, `labels` and `images` (where the images are).

    A text without images is cut into windows, as all text; a row with images is kept whole. Labels are the inputs,
    but -100 where a token stands for an image; each text ends in its end token.

    Raises:
        DataError: a row with images is longer than `max_length`, an image cannot be opened, a text has more or fewer
            image tokens than its images need, or no text yields two tokens.
    """
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int64")),
            "labels": datasets.List(datasets.Value("int64")),
            IMAGES: rows.features[IMAGES],
        }
    )
    result = rows.map(
        _make_examples,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        load_from_cache_file=False,  # images may have changed
        fn_kwargs={"processor": processor, "text": text, "max_length": max_length},
    )
    if not len(result):
        raise DataError("no text of the data yields two tokens, so there is nothing to predict")
    return result


def _make_ids(processor: Any, words: str, paths: list[Any]) -> list[int]:
    seen = {"images": [load_image(path) for path in paths]} if paths else {}
    return data.ended(list(processor(text=[words], **seen)["input_ids"][0]), processor.tokenizer)


def _make_examples(
    rows: dict[str, list[Any]], numbers: list[int], *, processor: Any, text: str, max_length: int
) -> dict[str, list[Any]]:
    """Makes examples of a batch of rows, or raises all that is wrong with it."""
    made: dict[str, list[Any]] = {"input_ids": [], "labels": [], IMAGES: []}
    faults: list[str] = []
    for words, paths, number in zip(rows[text], rows[IMAGES], numbers, strict=True):
        read = foreign.attempt(_make_ids, processor, words, paths)
        if read.error is not None or read.value is None:
            faults += [f"row {number}: {foreign.said(read.error)}"] if read.error is not None else []
            continue
        ids = read.value
        marks = processor.create_mm_token_type_ids([ids])[0]
        if paths and len(ids) > max_length:
            faults.append(
                f"row {number} ({Path(paths[0]).name}): {len(ids)} tokens, {sum(map(bool, marks))} of them of images, "
                f"and max_length is {max_length}; a row with images is never cut: raise max_length, or shorten its text"
            )
        labels = [-100 if mark else token for token, mark in zip(ids, marks, strict=True)]
        pieces = [ids] if paths else data.cut(ids, max_length)
        made["input_ids"] += pieces
        made["labels"] += [labels] if paths else pieces
        made[IMAGES] += [list(paths) for _ in pieces]
    refuse(DataError, "the data does not fit", data.few(faults))
    return made


class Collator:
    """Pads a batch as `data.collator` does and adds the pixels of its images; without images there are none."""

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor: Any = processor
        self._pad = data.collator(self.processor.tokenizer)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns `input_ids`, `attention_mask` and `labels` (batch_size, sequence_length), and what images become.

        Raises:
            DataError: a row has tokens of images, but no images: the model would read them as words.
        """
        batch = dict(self._pad([{name: row[name] for name in ("input_ids", "labels")} for row in rows]))
        marks = self.processor.create_mm_token_type_ids([list(row["input_ids"]) for row in rows])
        for row, marked in zip(rows, marks, strict=True):
            if any(marked) != bool(row.get(IMAGES)):
                raise DataError(
                    f"an example has {sum(map(bool, marked))} tokens of images and {len(row.get(IMAGES) or [])} "
                    f"images; keep the column {IMAGES!r} (remove_unused_columns=False), and do not cut rows with "
                    "images"
                )
        images = [load_image(path) for row in rows for path in row.get(IMAGES) or []]
        if images:
            made = self.processor.image_processor(images=images, return_tensors="pt")
            batch |= {name: value for name, value in made.items() if name not in self.processor.unused_input_names}
        if "mm_token_type_ids" in self.processor.model_input_names:
            ids = batch["input_ids"]
            batch["mm_token_type_ids"] = ids.new_tensor(self.processor.create_mm_token_type_ids(ids.tolist()))
        return batch
