"""What makes a batch of examples, for each kind of head; transformers' own collators wherever it has one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
)
from transformers.image_utils import load_image

from solidify.errors import DataError
from solidify.system import foreign

Row = Mapping[str, Any]


def padding(form: str, tokenizer: Any) -> Any:
    """Returns what pads a batch of labelled examples; labels of tokens with -100.

    Raises:
        DataError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has no padding token, and examples of different lengths are padded; set one")
    if form == "token_classification":
        return DataCollatorForTokenClassification(tokenizer)
    if form == "seq2seq":
        return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    return DataCollatorWithPadding(tokenizer)


class Masking:
    """Hides tokens as transformers does (`DataCollatorForLanguageModeling`), by a generator with a seed of its own.

    Examples that have labels already were hidden before, by `hide`; they are padded as they are.
    """

    def __init__(self, tokenizer: Any, probability: float, seed: int) -> None:
        self.probability = probability
        with foreign.calling("no tokens can be hidden", DataError):
            self._make = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)
        self._pad = padding("token_classification", tokenizer)

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns what the model reads, and `labels` (batch_size, sequence_length): -100 but where one is hidden."""
        if "labels" in rows[0]:
            return dict(self._pad([{k: v for k, v in row.items() if k != "special_tokens_mask"} for row in rows]))
        return dict(self._make([dict(row) for row in rows]))

    def hide(self, row: Row) -> dict[str, Any]:
        """Returns an example with tokens hidden once and for all."""
        made = self._make([dict(row)])
        return {name: tensor[0].tolist() for name, tensor in made.items()}


class Packed:
    """Puts the documents of a batch one after the other into one row: positions begin again with each, and no
    attention goes from one to the other where a model reads them (transformers' `DataCollatorWithFlattening`)."""

    def __init__(self) -> None:
        self._flatten = DataCollatorWithFlattening()

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns `input_ids`, `labels` and `position_ids` (1, number of tokens); no label begins a document.

        `use_cache` is False beside them: with a cache, even an empty one, transformers reads no mask from positions.
        """
        documents = []
        for row in rows:
            start = 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                span = slice(start, start + length)
                documents.append({name: list(row[name][span]) for name in ("input_ids", "labels")})
                start += length
        return {**self._flatten(documents), "use_cache": False}


class Pictures:
    """Opens the images of a batch and has the model's processor make pixels of them."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Returns `pixel_values` (batch_size, channels, height, width) and `labels` (batch_size,).

        Raises:
            DataError: an image cannot be opened.
        """
        opened = []
        for row in rows:
            with foreign.calling(f"the image {row['image']} cannot be opened", DataError):
                opened.append(load_image(row["image"]).convert("RGB"))
        made = self.processor(images=opened, return_tensors="pt")
        return {**made, "labels": torch.tensor([row["labels"] for row in rows])}
