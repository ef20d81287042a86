"""From a recipe to examples: text and images read, made tokens, and put into batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from solidify.adapter import lookup
from solidify.builtin import corpus
from solidify.errors import DataError, RecipeError, raised_as, refuse
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import PARTS, Source
from solidify.system import files
from solidify.training import (
    batching,
    chats,
    data,
    examples,
    formats,
    images,
    labelling,
    numbering,
    packing,
    sources,
)
from solidify.training.collating import Masking
from solidify.training.examples import Counted, Reading

PROBES = 8  # sequences on which the independence of accumulation is shown

Batches = list[dict[str, torch.Tensor]]


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
    read = []
    for source in given:
        path = recipe.directory / source.path
        beside = path / "*" if source.path and files.is_directory(path) else path  # a file, beside which images stand
        read.append(finish(_rename(_read_source(recipe, source, part, streaming), source), beside))
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


def make_examples(recipe: Recipe, processor: Any, model: nn.Module | None = None) -> tuple[Any, Any]:
    """Returns training and evaluation examples (None without the latter), as `prepare` makes them."""
    prepared = prepare(recipe, processor, model)
    return prepared.train, prepared.held_out


def make_sft_rows(recipe: Recipe, processor: Any, model: nn.Module) -> Prepared:
    """Returns what TRL's SFTTrainer reads: text as it stands, or examples of what else teaches the next token.

    Raises:
        RecipeError: the windows would be packed here, and in TRL.
    """
    assert recipe.data is not None
    if recipe.data.packing:
        raise RecipeError(
            "data.packing: TRL's trainer packs by its own field; write training.packing, or leave TRL's out"
        )
    if find_format(recipe, read_rows(recipe)[0], model) == "text":
        return Prepared("text", *read_texts(recipe), None, {})
    return prepare(recipe, processor, model)


def make_collator(recipe: Recipe, processor: Any, model: nn.Module | None = None) -> Any:
    """Returns what makes a batch of a recipe's examples."""
    assert recipe.data is not None
    if is_multimodal(recipe, model):
        return images.Collator(processor)
    train, _ = read_rows(recipe)
    return examples.collator(open_reading(recipe, train, processor, model))


@dataclass(frozen=True)
class Prepared:
    """What a training reads: its examples and what makes batches of them, in which format, and what was cut off.

    `held_out` is None without evaluation data; `counted` has numbers for each part that is no stream.
    """

    format: str
    train: Any
    held_out: Any
    collate: Any
    counted: Mapping[str, Counted]


def unpacked(recipe: Recipe) -> Recipe:
    """Returns a recipe whose texts each stand in a window of their own."""
    assert recipe.data is not None
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": False})})


def prepare(recipe: Recipe, processor: Any, model: nn.Module | None = None, parts: Sequence[str] = PARTS) -> Prepared:
    """Reads the recipe's rows and makes examples of them for a model's head (without one: for the next token).

    Of the `parts`, that is: of others the columns are looked at.

    Raises:
        DataError: the rows cannot be read, or are not what the head learns from.
    """
    assert recipe.data is not None
    if is_multimodal(recipe, model):
        return _prepare_images(recipe, processor)
    train, held_out = read_rows(recipe)
    reading = open_reading(recipe, train, processor, model)
    collate = examples.collator(reading)
    made: dict[str, Any] = {"train": None, "eval": None}
    counted = dict[str, Counted]()
    for part, rows in (("train", train), ("eval", held_out)):
        if rows is not None and part in parts:
            with raised_in(f"data.{part}"):
                made[part], counts = examples.make(name_text(recipe, rows, reading.format), reading)
            counted |= {part: counts} if counts is not None else {}
    if reading.packing and made["train"] is not None:
        made["train"] = packing.pack(
            made["train"], reading.max_length, seed=recipe.data.seed if recipe.data.shuffle else None
        )
    if reading.format == "masked" and made["eval"] is not None:
        with raised_in("data.eval"):
            made["eval"] = examples.hide(made["eval"], collate)
    return Prepared(reading.format, made["train"], made["eval"], collate, counted)


def _prepare_images(recipe: Recipe, processor: Any) -> Prepared:
    assert recipe.data is not None
    options: dict[str, Any] = {"text": recipe.data.text, "max_length": recipe.data.max_length}
    train, held_out = (
        images.tokenize(rows, processor, **options) if rows is not None else None for rows in read_texts(recipe)
    )
    return Prepared("text", train, held_out, images.Collator(processor), {})


def is_multimodal(recipe: Recipe, model: nn.Module | None = None) -> bool:
    """Returns whether rows are text with images among it, for a head that predicts the next token."""
    assert recipe.data is not None
    asked = recipe.data.image is not None and recipe.data.format in (None, "text")
    return asked and (model is None or formats.learns_next_token(model))


def open_reading(recipe: Recipe, rows: Any, processor: Any, model: nn.Module | None = None) -> Reading:
    """Returns how rows become examples for a model's head; without a model, for one that predicts the next token.

    Raises:
        DataError: the rows are not what the head learns from, or there is nothing that makes tokens of them.
        RecipeError: the `data` section asks for what cannot be.
    """
    asked = recipe.data
    assert asked is not None
    with raised_in("data"):
        form = find_format(recipe, rows, model)
        config = lookup.plain_model(model).config if model is not None else None
        names = tuple(asked.labels) if asked.labels is not None else None
        if config is not None and form in formats.LABELLED:
            refuse(DataError, "the labels do not fit the head", labelling.find_faults(config, names))
        if form == "image_classification":
            maker = _require_image_processor(recipe, processor)
        else:
            maker = tokenizer_of(processor)
        return Reading(
            format=form,
            max_length=_find_longest(recipe, form, maker, config),
            processor=maker,
            config=config,
            accepts=examples.accepted(model) if model is not None else (),
            chat=_open_chat(recipe, form, rows, maker),
            names=numbering.decide(rows, config, names) if config is not None and form in formats.CLASSES else names,
            mask_probability=asked.mask_probability,
            seed=asked.seed,
            packing=asked.packing,
        )


def find_format(recipe: Recipe, rows: Any, model: nn.Module | None = None) -> str:
    """Returns what the rows are: as the recipe says, or as their columns and the model's head do.

    Raises:
        RecipeError: the columns do not make it, or the head does not learn from it.
    """
    asked = recipe.data
    assert asked is not None
    learned = formats.learned_by(model) if model is not None else formats.NEXT_TOKEN
    if model is not None and not learned:
        with raised_as(RecipeError, of=DataError):
            formats.refuse_unlearned(asked.format or "text", model)
    columns, row = sources.columns(rows), sources.first(rows, 1)[0]
    columns = [*columns, "text"] if asked.text in columns and "text" not in columns else columns
    head = type(lookup.plain_model(model)).__name__ if model is not None else "a head for the next token"
    with raised_as(RecipeError, of=DataError):
        form = formats.find(columns, learned, row, asked.format, head=head)
        if model is not None:
            formats.refuse_unlearned(form, model)
    if asked.packing and form not in formats.NEXT_TOKEN:
        raise DataError(f"packing puts texts into one window, and the rows are {form}; leave packing out")
    return form


def name_text(recipe: Recipe, rows: Any, form: str) -> Any:
    """Calls the column of text `text`, and keeps of rows of plain text that column alone."""
    assert recipe.data is not None
    text = recipe.data.text
    if text != "text" and text in sources.columns(rows) and "text" in formats.FORMATS[form].columns[0]:
        kept = rows.remove_columns(["text"]) if "text" in sources.columns(rows) else rows
        rows = kept.rename_column(text, "text")
    if "text" in formats.FORMATS[form].columns[0] and "text" not in sources.columns(rows):
        raise DataError(f"there is no column {text!r}; it has: {', '.join(sources.columns(rows))}")
    return rows.select_columns(["text"]) if form in ("text", "masked") else rows


def _open_chat(recipe: Recipe, form: str, rows: Any, tokenizer: Any) -> chats.Chat | None:
    assert recipe.data is not None
    template = recipe.chat_template()
    told = form == "prompt_completion" and isinstance(sources.first(rows, 1)[0]["prompt"], list)
    if form != "messages" and not told:
        return None
    return chats.open_chat(tokenizer, template, "all" if told else recipe.data.loss_on)


def _find_longest(recipe: Recipe, form: str, tokenizer: Any, config: Any) -> int:
    """Returns how many tokens an example has at most: what the recipe says, or as many as an encoder has positions."""
    assert recipe.data is not None
    asked = recipe.data.max_length
    if form in formats.NEXT_TOKEN or form == "image_classification":
        return asked
    own = int(tokenizer.model_max_length)
    positions = config.get_text_config().to_dict().get("max_position_embeddings") if config is not None else None
    limit = min(own, positions) if isinstance(positions, int) else None
    if "max_length" in recipe.data.model_fields_set and limit is not None and asked > limit:
        raise DataError(f"max_length is {asked}, and the model has positions for {limit} tokens")
    return asked if "max_length" in recipe.data.model_fields_set else min(asked, own, limit or asked)


@contextmanager
def raised_in(where: str) -> Iterator[None]:
    """While the block lasts, what is wrong with data says of which part of the recipe it is."""
    try:
        yield
    except (DataError, RecipeError) as error:
        says = str(error)
        raise type(error)(says if says.startswith("data") else f"{where}: {says}", error.faults) from error


def _require_image_processor(recipe: Recipe, processor: Any) -> Any:
    found = processor.image_processor if isinstance(processor, ProcessorMixin) else processor
    if not isinstance(found, BaseImageProcessor):
        raise DataError(
            f"{recipe.base.model} has nothing that makes pixels of images (preprocessor_config.json beside the model, "
            "and the packages pillow and torchvision)"
        )
    return found


def processing_class(recipe: Recipe, processor: Any, model: nn.Module | None = None) -> Any:
    """Returns what a trainer saves beside its checkpoints: the tokenizer, or what prepares images."""
    if is_multimodal(recipe, model) or not isinstance(processor, (PreTrainedTokenizerBase, ProcessorMixin)):
        return processor
    return tokenizer_of(processor)


def tokenizer_of(processor: Any) -> Any:
    """Returns what makes tokens of text; raises RecipeError where the base has no tokenizer."""
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RecipeError(f"data: text needs a tokenizer, but the base has only {type(processor).__name__}")
    return tokenizer


def refuse_unprepared(recipe: Recipe, processor: Any, model: nn.Module | None = None) -> None:
    """Raises RecipeError when the recipe's data has images, and the base nothing that puts them among the tokens; or
    the recipe groups by images, and its data has none."""
    if recipe.data is not None and "modality" in recipe.data.group_by and recipe.data.image is None:
        raise RecipeError(
            "data.group_by: modality tells rows with images from rows without; say in data.image which are"
        )
    if recipe.data is not None and is_multimodal(recipe, model) and not isinstance(processor, ProcessorMixin):
        raise RecipeError(
            f"data.image: {recipe.base.model} has no processor that can be loaded, and a processor says how many "
            "tokens an image takes (it needs processor_config.json beside the model, and the package pillow)"
        )


def collate_rows(collate: Any, rows: Any, size: int) -> Batches:
    """Makes batches of so many rows, rows of alike lengths together, so that there is little padding."""
    listed = [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])} for row in rows]
    listed.sort(key=lambda row: -len(row["input_ids"]))
    batches = [dict(collate(listed[start : start + size])) for start in range(0, len(listed), size)]
    return [{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch} for batch in batches]


def ragged(rows: Any, batch_size: int, collate: Any = None) -> list[dict[str, Any]]:
    """Takes a few examples and cuts them to different lengths, so that micro-batches are ragged.

    All together have no more tokens than `batch_size` examples: what trains in memory is checked in it. If some have
    images, the first half has; of those nothing is cut before a token that follows the images. Of a stream the first
    are taken. What is no text is taken whole; where `collate` hides tokens, they are hidden once and for all.
    """
    listed = sources.first(rows, PROBES) if sources.is_stream(rows) else rows
    if not len(listed) or "input_ids" not in listed[0]:
        return [dict(listed[row]) for row in range(min(batch_size, PROBES, len(listed)))]
    kinds = batching.modalities(listed)
    chosen = sorted(_alternate_rows(kinds)[:PROBES], key=lambda row: not kinds[row])
    whole = [collate.hide(listed[n]) if isinstance(collate, Masking) else listed[n] for n in chosen]
    bound = max(len(row["input_ids"]) for row in whole) * batch_size // PROBES
    return [_cut_row(row, index, bound) for index, row in enumerate(whole)]


def _cut_row(row: Mapping[str, Any], index: int, bound: int) -> dict[str, Any]:
    """Cuts an example to a length of its own, around its first label that counts."""
    ids = list(row["input_ids"])
    labels = row.get("labels", ids)
    length, start = max(4, min(len(ids), bound) * (index + 2) // (PROBES + 2)), 0
    others = {name: row[name] for name in (data.IMAGES,) if row.get(name)}
    aligned = isinstance(labels, (list, tuple)) and len(labels) == len(ids)
    if others:
        length = max(length, 2 + max(i for i, label in enumerate(labels) if label == -100))
    elif aligned:
        counted = next((i for i, label in enumerate(labels) if i and label != -100), 0)
        start = min(max(0, counted - length // 2), max(0, len(ids) - length))
    span = slice(start, start + length)
    return {"input_ids": ids[span], "labels": list(labels[span]) if aligned else labels, **others}


def _alternate_rows(modalities: Sequence[Any]) -> list[int]:
    """Returns the numbers of rows, one of each modality in turn as long as there are."""
    turns: dict[Any, int] = {}
    ranked = []
    for row, modality in enumerate(modalities):
        turns[modality] = turns.get(modality, -1) + 1
        ranked.append((turns[modality], row))
    return [row for _, row in sorted(ranked)]
