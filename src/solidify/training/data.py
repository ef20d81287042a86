"""Text becomes tokenised, labelled examples. Nothing is dropped: what is longer than a window is cut into several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq

from solidify.adapter import lookup
from solidify.errors import DataError, refuse
from solidify.model import anatomy
from solidify.objective.internals import shifts_labels
from solidify.system import console
from solidify.training import formats, sources

TOKENS = 2048  # in one forward pass of a measurement
IMAGES = "images"  # the column that lists the images of a row
_HEADS = ("ForTokenClassification", "ForImageClassification", "ForSequenceClassification")  # what chooses classes


def read(path: Path, text: str, image: str | None = None) -> datasets.Dataset:
    """Reads a file (`.jsonl`, `.json`, `.csv`, `.parquet`, `.txt`) and keeps its column `text`.

    With `image`, a column that names an image beside the file, or several (or none), the column `images` lists where
    they are; they are opened when a batch needs them.

    Raises:
        DataError: the file does not exist, is of another kind, cannot be parsed, is empty, or has no such column, or an
            image is missing.
    """
    # In pieces, a column that is empty in the first of them is taken for one that is always empty.
    data = sources.read_file(path, whole=image is not None)
    return select(data, text, image, path)


def select(data: datasets.Dataset, text: str, image: str | None, file: Path) -> datasets.Dataset:
    """Keeps the column `text` of rows that were read, and of `image` where the images are, beside `file`.

    Raises:
        DataError: there is no such column, or an image is missing.
    """
    found = sources.columns(data)
    for column in (text, image):
        if column is not None and column not in found:
            raise DataError(f"{file} has no column {column!r}; it has: {', '.join(found)}")
    if image is None:
        return data.select_columns([text])
    located = data.select_columns([text, image]).map(
        _find_images,
        batched=True,
        with_indices=True,
        remove_columns=[image],
        features=datasets.Features({text: data.features[text], IMAGES: datasets.List(datasets.Value("string"))}),
        load_from_cache_file=False,  # files come and go
        fn_kwargs={"image": image, "file": str(file)},
    )
    return located.select_columns([text, IMAGES])


def _find_images(
    rows: dict[str, list[Any]], numbers: list[int], *, image: str, file: str
) -> dict[str, list[list[str]]]:
    """Makes paths of the names of images; raises all that lead nowhere."""
    image_paths = []
    missing = []
    for value, number in zip(rows[image], numbers, strict=True):
        names = [value] if isinstance(value, str) else value or []
        paths = [(Path(file).parent / name).resolve() for name in names if name]
        missing += [f"row {number}: {path}" for path in paths if not path.is_file()]
        image_paths.append([str(path) for path in paths])
    refuse(DataError, f"{file} names images that do not exist", few(missing))
    return {IMAGES: image_paths}


def locate_images(rows: Any, file: Path) -> Any:
    """Returns rows whose column `image`, where it names files that exist, says where they are; others as they were."""
    if rows.features is None:  # of a stream nothing else says what a column holds
        named = isinstance(sources.first(rows, 1)[0].get("image"), str)
    else:
        named = isinstance(rows.features.get("image"), datasets.Value)
    if not named:
        return rows
    # Files come and go; and a stream forgets by which names it numbers its classes, if nothing says it again.
    options = {"features": rows.features} if sources.is_stream(rows) else {"load_from_cache_file": False}
    return rows.map(_find_image, fn_kwargs={"file": str(file)}, **options)


def _find_image(row: dict[str, Any], *, file: str) -> dict[str, Any]:
    path = (Path(file).parent / str(row["image"])).resolve()
    return {"image": str(path) if row["image"] and path.is_file() else row["image"]}


def refuse_untaught(model: nn.Module) -> None:
    """Raises DataError for a model whose labels are not the tokens that come next, which is all that text gives."""
    if not formats.learns_next_token(model):
        raise DataError(
            "data: text teaches causal language models and those that read images beside it, and "
            f"{type(model).__name__} is neither: its labels are not the next tokens"
        )


def few(faults: Sequence[str]) -> list[str]:
    """Returns the first few faults, and how many more there are."""
    return [*faults[:6], f"and {len(faults) - 6} more"] if len(faults) > 6 else list(faults)


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
            examples += cut(ended(ids, tokenizer), max_length)
        return {"input_ids": examples, "labels": [list(piece) for piece in examples]}

    result = data.map(windows, batched=True, remove_columns=sources.columns(data))
    if not sources.is_stream(result) and not len(result):
        raise DataError("no text of the data yields two tokens, so there is nothing to predict")
    return result


def ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Returns the tokens of a text with the end token after them, if there is one and it is not there."""
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        return [*ids, tokenizer.eos_token_id]
    return ids


def cut(ids: list[int], max_length: int) -> list[list[int]]:
    """Cuts tokens into windows; one of a single token has nothing to predict."""
    pieces = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [piece for piece in pieces if len(piece) > 1]


def collator(tokenizer: Any) -> Any:
    """Returns what pads a batch: inputs with the padding token (or the end token without one), labels with -100."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise DataError("the tokenizer has neither a padding nor an end token; set one and build again")
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)


def mean_loss(model: Any, examples: datasets.Dataset, collate: Any, *, batch_size: int = 16) -> float:
    """Returns the model's own loss, a mean over all labels of some examples (tokens, classes, numbers), each once."""
    return measure(model, examples, collate, batch_size=batch_size)["loss"]


def measure(model: Any, examples: datasets.Dataset, collate: Any, *, batch_size: int = 16) -> dict[str, float]:
    """Returns `loss`, as `mean_loss`, and of labels that are classes `accuracy`: the share of labels (of examples, or
    of words) for which the largest logit is the label's.

    A batch holds at most `batch_size` examples, and no more than two thousand tokens unless one example does: their
    logits are in memory at once. What takes long shows a bar.

    Raises:
        DataError: no label counts (all are -100), so there is nothing to measure.
    """
    total, counted, right, classes = 0.0, 0, 0, 0
    rows, shifts = examples, shifts_labels(model)
    longest = max(map(len, rows["input_ids"])) if "input_ids" in rows.column_names else 1
    size = max(1, min(batch_size, TOKENS // longest))
    starts = range(0, len(rows), size)
    bar = console.progress("Measuring the loss", len(starts)) if len(starts) > 64 else nullcontext(lambda _note: None)
    with torch.no_grad(), anatomy.evaluation(model), bar as advance:
        for start in starts:
            batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))])
            batch = {
                key: each.to(model.device) if isinstance(each, torch.Tensor) else each for key, each in batch.items()
            }
            labels = batch["labels"][:, 1:] if shifts else batch["labels"]
            count = _count_labels(labels)
            output = model(**batch)
            total += output.loss.item() * count if count else 0.0  # a mean over nothing is no number
            if _are_classes(labels, output, model):
                right += int((output.logits.argmax(-1) == labels).sum())
                classes += count
            counted += count
            advance(f"loss {total / counted:.3f}" if counted else "no label counts yet")
    if not counted:
        raise DataError(
            f"no label of the {len(rows)} examples counts (all are -100), so there is no loss to measure; give "
            "examples with labels"
        )
    return {"loss": total / counted, **({"accuracy": right / classes} if classes else {})}


def _count_labels(labels: torch.Tensor) -> int:
    """Returns how many labels count: of numbers all of them, as no loss of transformers leaves out one."""
    return labels.numel() if labels.is_floating_point() else int((labels != -100).sum())


def _are_classes(labels: torch.Tensor, output: Any, model: Any) -> bool:
    """Returns whether the labels of a batch are numbers of classes, one for a text, an image or each word."""
    name = type(lookup.plain_model(model)).__name__
    if labels.is_floating_point() or not name.endswith(_HEADS):
        return False
    return bool(output.logits.shape[:-1] == labels.shape and output.logits.shape[-1] > 1)
