"""Rows of a recipe's data as the model will read them: token by token, with what counts for the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from trl import apply_chat_template, maybe_extract_prompt

from solidify.errors import DataError
from solidify.recipe import datasets, models
from solidify.recipe.schema import Recipe, given
from solidify.system import foreign
from solidify.training import examples, formats, sources
from solidify.training.examples import Reading
from solidify.training.formats import NEXT_TOKEN, OF_TRAINERS

_ANSWERS = ("chosen", "rejected", "completion")
_PARTS = ("prompt", *_ANSWERS)  # of rows that a trainer compares


def show(recipe: Recipe | str, count: int = 3) -> dict[str, Any]:
    """Returns the first rows as plain values, and what became of all rows.

    Each of `rows` has `parts` (a name, and `tokens` with their `text`, `id` and whether it `counts`), how many tokens
    were `cut` off, and a `label` where it has one.

    Raises:
        RecipeError: there is no `data`, or the model's head learns from other rows.
        DataError: the rows cannot be read.
    """
    recipe = given(recipe)
    if recipe.data is None:
        raise DataError("the recipe has no `data`, so there is nothing to show")
    base = models.load_base(recipe, device="meta")
    processor = base.processor or base.tokenizer
    datasets.refuse_unprepared(recipe, processor, base.model)
    if datasets.is_multimodal(recipe, base.model):
        raise DataError("rows with images among their text are not shown yet; `solidify plan` looks at them")
    train, _ = datasets.read_rows(recipe)
    if (form := _find_compared(recipe, train, base.model)) is not None:
        return _show_compared(train, datasets.tokenizer_of(processor), form, count)
    return _show_read(recipe, train, processor, base.model, count)


def _find_compared(recipe: Recipe, rows: Any, model: nn.Module) -> str | None:
    """Returns the format of rows that a trainer's own loss compares; None of all others."""
    assert recipe.data is not None
    found: str | None = recipe.data.format
    columns = sources.columns(rows)
    if found is None:
        fitting = [name for name, each in formats.FORMATS.items() if each.fits(columns)]
        learned = (*formats.learned_by(model), *OF_TRAINERS)
        found = next((name for name in fitting if name in learned), None)
    return found if found in OF_TRAINERS else None


def _show_read(recipe: Recipe, train: Any, processor: Any, model: nn.Module, count: int) -> dict[str, Any]:
    reading = datasets.open_reading(recipe, train, processor, model)
    prepared = datasets.prepare(datasets.unpacked(recipe), processor, model)
    named = datasets.name_text(recipe, train, reading.format)
    reading = examples.of_rows(named, reading)
    rows = [_show_row(row, reading, number) for number, row in enumerate(_pick(named, prepared.train, reading, count))]
    packed = datasets.prepare(recipe, processor, model, ("train",)).train if reading.packing else None
    return {
        "format": reading.format,
        **reading.limits,
        **({"loss": reading.chat.way} if reading.chat is not None and reading.format == "messages" else {}),
        **({"windows": len(packed)} if packed is not None else {}),
        "counted": {part: {**each.document(), "words": str(each)} for part, each in prepared.counted.items()},
        "rows": rows,
    }


def _pick(rows: Any, made: Any, reading: Reading, count: int) -> Sequence[Any]:
    """Returns what is shown: rows, or of text the windows that it was cut into."""
    whole = reading.format in ("text", "masked", "image_classification")
    return sources.first(made if whole else rows, count)


def _show_row(row: Any, reading: Reading, number: int) -> dict[str, Any]:
    if reading.format == "image_classification":
        label = _name_label(row["labels"], reading)
        return {"row": number, "parts": {}, "cut": 0, "image": str(row["image"]), "label": label}
    made, cut = (row, 0) if reading.format in ("text", "masked") else examples.read_one(row, reading)
    made = examples.collator(reading).hide(made) if reading.format == "masked" else made
    shown: dict[str, Any] = {"row": number, "cut": cut}
    ids, labels = made["input_ids"], made["labels"]
    if reading.format == "seq2seq":
        marked = (_mark(reading, each, [counts] * len(each)) for each, counts in ((ids, False), (labels, True)))
        return {**shown, "parts": dict(zip(("source", "target"), marked, strict=True))}
    if reading.format in ("classification", "regression", "multi_label"):
        return {
            **shown,
            "parts": {"text": _mark(reading, ids, [False] * len(ids))},
            "label": _name_label(labels, reading),
        }
    first = reading.format in NEXT_TOKEN  # a first token is predicted by nothing
    counts = [label != -100 and not (first and n == 0) for n, label in enumerate(labels)]
    tokens = _mark(reading, ids, counts)
    if not first:
        tokens = [
            {**token, "label": _name_label(label, reading) if label != -100 else None}
            for token, label in zip(tokens, labels, strict=True)
        ]
    return {**shown, "parts": {"text": tokens}}


def _mark(reading: Reading, ids: Sequence[int], counts: Sequence[bool]) -> list[dict[str, Any]]:
    return _mark_tokens(reading.processor, ids, counts)


def _mark_tokens(tokenizer: Any, ids: Sequence[int], counts: Sequence[bool]) -> list[dict[str, Any]]:
    return [
        {"text": tokenizer.decode([token]), "id": token, "counts": bool(counted)}
        for token, counted in zip(ids, counts, strict=True)
    ]


def _name_label(label: Any, reading: Reading) -> Any:
    """Returns a label as a person would write it; of a hidden token, what it was."""
    if reading.format == "masked":
        return reading.processor.decode([label])
    if reading.format == "regression":
        return label
    names = reading.names or [str(reading.config.id2label[n]) for n in sorted(reading.config.id2label)]
    if reading.format == "multi_label":
        return [name for name, holds in zip(names, label, strict=True) if holds]
    return names[label]


def _show_compared(rows: Any, tokenizer: Any, form: str, count: int) -> dict[str, Any]:
    """Shows rows that a trainer compares: prompts do not count, answers do."""
    shown = []
    for number, row in enumerate(sources.first(rows, count)):
        with foreign.calling(f"row {number} cannot be written", DataError):
            told = maybe_extract_prompt(row) if form == "preference" else row
            texts = apply_chat_template(told, tokenizer) if _is_told(told) else _end_answers(told, tokenizer)
        parts = {
            name: tokenizer(str(texts[name]), add_special_tokens=False)["input_ids"] for name in _PARTS if name in texts
        }
        marked = {name: _mark_tokens(tokenizer, ids, [name != "prompt"] * len(ids)) for name, ids in parts.items()}
        shown.append({"row": number, "parts": marked, "cut": 0, **({"label": row["label"]} if "label" in row else {})})
    return {"format": form, "counted": {}, "rows": shown}


def _end_answers(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Ends answers that are plain text as TRL's trainers do, with the end token, where they do not end with it."""
    end = tokenizer.eos_token or ""
    ended = {name: f"{text.removesuffix(end)}{end}" for name, text in row.items() if name in _ANSWERS and text}
    return {**row, **ended}


def _is_told(row: Any) -> bool:
    return any(isinstance(row.get(name), list) for name in _PARTS)
