"""Text becomes tokenised, labelled examples. Nothing is dropped: what is longer than a window is cut into several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import DataCollatorForSeq2Seq

from solidify import console
from solidify.errors import DataError
from solidify.model import anatomy

TOKENS = 2048  # in one forward pass of a measurement
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read(path: Path, text: str) -> datasets.Dataset:
    """Reads a file (`.jsonl`, `.json`, `.csv`, `.parquet`, `.txt`) and keeps its column `text`.

    Raises:
        DataError: the file does not exist, is of another kind, cannot be parsed, is empty, or has no such column.
    """
    if not path.is_file():
        raise DataError(f"the data file {path} does not exist")
    kind = _FORMATS.get(path.suffix)
    if kind is None:
        raise DataError(f"{path} is no data file that is known here; known: {', '.join(_FORMATS)}")
    try:
        data = datasets.load_dataset(kind, data_files=str(path), split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as {kind}: {str(error).splitlines()[0]}") from error
    if text not in data.column_names:
        raise DataError(f"{path} has no column {text!r}; it has: {', '.join(data.column_names)}")
    if not len(data):
        raise DataError(f"{path} holds no rows")
    return data.select_columns([text])


def from_texts(texts: Sequence[str], text: str) -> datasets.Dataset:
    """Wraps texts that are in memory."""
    return datasets.Dataset.from_dict({text: list(texts)})


def tokenize(data: datasets.Dataset, tokenizer: Any, *, text: str, max_length: int) -> datasets.Dataset:
    """Returns examples of at most `max_length` tokens with labels equal to the inputs; each text ends in its end token.

    Raises:
        DataError: no text yields two tokens, so there would be nothing to predict.
    """

    def windows(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        """Cuts a batch of texts into examples."""
        examples = []
        for ids in tokenizer(rows[text], add_special_tokens=True, verbose=False)["input_ids"]:
            if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
                ids = [*ids, tokenizer.eos_token_id]
            pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
            examples += [piece for piece in pieces if len(piece) > 1]
        return {"input_ids": examples, "labels": [list(piece) for piece in examples]}

    result = data.map(windows, batched=True, remove_columns=data.column_names)
    if not len(result):
        raise DataError("no text of the data yields two tokens, so there is nothing to predict")
    return result


def collator(tokenizer: Any) -> Any:
    """Returns what pads a batch: inputs with the padding token (or the end token without one), labels with -100."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has neither a padding nor an end token; set one and build again")
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)


def mean_loss(model: Any, examples: datasets.Dataset, collate: Any, *, batch_size: int = 16) -> float:
    """Returns the model's next-token loss in nats over all target tokens of some examples, each token once.

    A batch holds at most `batch_size` examples, and no more than two thousand tokens unless one example does: their
    logits are in memory at once. What takes long shows a bar.
    """
    total, tokens = 0.0, 0
    rows = examples.select_columns(["input_ids", "labels"])
    longest = max(map(len, rows["input_ids"]))
    size = max(1, min(batch_size, TOKENS // longest))
    starts = range(0, len(rows), size)
    bar = console.progress("Measuring the loss", len(starts)) if len(starts) > 64 else nullcontext(lambda _note: None)
    with torch.no_grad(), anatomy.evaluation(model), bar as advance:
        for start in starts:
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
            count = int((batch["labels"][:, 1:] != -100).sum())
            total += model(**batch).loss.item() * count
            tokens += count
            advance(f"loss {total / tokens:.3f}")
    return total / tokens
