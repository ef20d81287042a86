"""From a recipe to examples: text and images read, made tokens, and put into batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from solidify.builtin import corpus
from solidify.errors import DataError, RecipeError
from solidify.recipe.schema import PARTS, Recipe, Source
from solidify.system import files
from solidify.training import batching, data, images, sources

PROBES = 8  # sequences on which the independence of accumulation is shown


def read_rows(recipe: Recipe) -> tuple[Any, Any]:
    """Reads training and evaluation rows with their columns as they stand (None without the latter).

    Columns are renamed as `data.columns` says. With `data.streaming`, the training rows are a stream, shuffled among
    the next `sources.BUFFER` of them; evaluation rows never are.

    Raises:
        DataError: a source cannot be read, or several cannot be put together.
        RecipeError: there is no built-in text of that name.
    """
    return _read_parts(recipe, lambda rows, file: data.locate_images(rows, file))


def read_texts(recipe: Recipe) -> tuple[Any, Any]:
    """Reads training and evaluation text, with images where `data.image` says so (None without the latter)."""
    assert recipe.data is not None
    text, image = recipe.data.text, recipe.data.image
    return _read_parts(recipe, lambda rows, file: data.select(rows, text, image, file))


def _read_parts(recipe: Recipe, finish: Callable[[Any, Path], Any]) -> tuple[Any, Any]:
    assert recipe.data is not None
    train, held_out = (_read_part(recipe, part, finish) for part in PARTS)
    if recipe.data.streaming and recipe.data.shuffle:
        train = train.shuffle(seed=recipe.data.seed, buffer_size=sources.BUFFER)
    return train, held_out


def _read_part(recipe: Recipe, part: Literal["train", "eval"], finish: Callable[[Any, Path], Any]) -> Any:
    assert recipe.data is not None
    given = recipe.data.sources(part)
    if not given:
        return None
    streaming = recipe.data.streaming and part == "train"
    read = [
        finish(_rename(_read_source(recipe, source, part, streaming), source), recipe.directory / source.path)
        for source in given
    ]
    return sources.mix(read, [source.weight for source in given], seed=recipe.data.seed)


def _read_source(recipe: Recipe, source: Source, part: str, streaming: bool) -> Any:
    assert recipe.data is not None
    name, path = source.path, recipe.directory / source.path
    is_directory = bool(name) and files.is_directory(path)
    is_local = name in corpus.NAMES or is_directory or os.path.exists(path)
    if is_local and (source.split, source.name, source.revision) != (None, None, None):
        raise RecipeError(f"data.{part}: {name} is on this machine, and `split`, `name` and `revision` are of the hub")
    if name in corpus.NAMES:
        texts = data.from_texts(corpus.texts(corpus.NAMES[name]), recipe.data.text)
        return texts.to_iterable_dataset() if streaming else texts
    if name.startswith("builtin:"):
        raise RecipeError(f"data: there is no {name!r}; built in: {', '.join(corpus.NAMES)}")
    if is_directory:
        return sources.read_directory(path, streaming=streaming)
    if is_local or path.suffix in sources.KINDS:
        return sources.read_file(path, whole=recipe.data.image is not None, streaming=streaming)
    if source.split is None and part == "eval":
        raise RecipeError(f"data.eval: say which split of {name} is read: {{path: {name}, split: ...}}")
    split = source.split or "train"
    return sources.read_hub(name, name=source.name, split=split, revision=source.revision, streaming=streaming)


def _rename(rows: Any, source: Source) -> Any:
    """Calls columns what the recipe calls them."""
    found = sources.columns(rows)
    for ours, theirs in source.columns.items():
        if theirs not in found:
            raise DataError(f"{source.path} has no column {theirs!r}; it has: {', '.join(found)}")
        if ours in found and ours != theirs:
            rows = rows.remove_columns([ours])
        rows = rows.rename_column(theirs, ours) if ours != theirs else rows
    return rows


def make_examples(recipe: Recipe, processor: Any) -> tuple[Any, Any]:
    """Returns training and evaluation examples, tokenized (None without the latter)."""
    assert recipe.data is not None
    options: dict[str, Any] = {"text": recipe.data.text, "max_length": recipe.data.max_length}
    tokenize: Any = data.tokenize if recipe.data.image is None else images.tokenize
    preparing = tokenizer_of(processor) if recipe.data.image is None else processor
    train_texts, eval_texts = read_texts(recipe)
    tokenized = tokenize(train_texts, preparing, **options)
    return tokenized, tokenize(eval_texts, preparing, **options) if eval_texts is not None else None


def make_collator(recipe: Recipe, processor: Any) -> Any:
    """Returns what makes a batch of a recipe's examples."""
    assert recipe.data is not None
    return data.collator(tokenizer_of(processor)) if recipe.data.image is None else images.Collator(processor)


def tokenizer_of(processor: Any) -> Any:
    """Returns what makes tokens of text; raises RecipeError where the base has no tokenizer."""
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RecipeError(f"data: text needs a tokenizer, but the base has only {type(processor).__name__}")
    return tokenizer


def refuse_unprepared(recipe: Recipe, processor: Any) -> None:
    """Raises RecipeError when the recipe's data has images, and the base nothing that puts them among the tokens; or
    the recipe groups by images, and its data has none."""
    if recipe.data is not None and "modality" in recipe.data.group_by and recipe.data.image is None:
        raise RecipeError(
            "data.group_by: modality tells rows with images from rows without; say in data.image which are"
        )
    if recipe.data is not None and recipe.data.image is not None and not isinstance(processor, ProcessorMixin):
        raise RecipeError(
            f"data.image: {recipe.base.model} has no processor that can be loaded, and a processor says how many "
            "tokens an image takes (it needs processor_config.json beside the model, and the package pillow)"
        )


def ragged(examples: Any, batch_size: int) -> list[dict[str, Any]]:
    """Takes a few examples and cuts them to different lengths, so that micro-batches are ragged.

    All together have no more tokens than `batch_size` examples: what trains in memory is checked in it. If some have
    images, the first half has; of those nothing is cut before a token that follows the images.
    """
    kinds = batching.modalities(examples)
    rows = sorted(_alternate_rows(kinds)[:PROBES], key=lambda row: not kinds[row])
    whole = [examples[row] for row in rows]
    bound = max(len(row["input_ids"]) for row in whole) * batch_size // PROBES
    probes: list[dict[str, Any]] = []
    for index, row in enumerate(whole):
        ids, labels = list(row["input_ids"]), list(row["labels"] if "labels" in row else row["input_ids"])
        length = max(4, min(len(ids), bound) * (index + 2) // (PROBES + 2))
        others = {name: row[name] for name in (data.IMAGES,) if row.get(name)}
        if others:
            length = max(length, 2 + max(i for i, label in enumerate(labels) if label == -100))
        probes.append({"input_ids": ids[:length], "labels": labels[:length], **others})
    return probes


def _alternate_rows(modalities: Sequence[Any]) -> list[int]:
    """Returns the numbers of rows, one of each modality in turn as long as there are."""
    turns: dict[Any, int] = {}
    ranked = []
    for row, modality in enumerate(modalities):
        turns[modality] = turns.get(modality, -1) + 1
        ranked.append((turns[modality], row))
    return [row for _, row in sorted(ranked)]
