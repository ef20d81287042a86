"""From a recipe to examples: text and images read, made tokens, and put into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from solidify.builtin import corpus
from solidify.errors import RecipeError
from solidify.recipe.schema import Recipe
from solidify.training import batching, data, images

PROBES = 8  # sequences on which the independence of accumulation is shown


def read_texts(recipe: Recipe) -> tuple[Any, Any]:
    """Reads training and evaluation text (None without the latter)."""
    assert recipe.data is not None
    read: list[Any] = []
    for name in (recipe.data.train, recipe.data.eval):
        if name is None:
            read.append(None)
        elif name in corpus.NAMES:
            read.append(data.from_texts(corpus.texts(corpus.NAMES[name]), recipe.data.text))
        elif name.startswith("builtin:"):
            raise RecipeError(f"data: there is no {name!r}; built in: {', '.join(corpus.NAMES)}")
        else:
            read.append(data.read(recipe.directory / name, recipe.data.text, recipe.data.image))
    return read[0], read[1]


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
