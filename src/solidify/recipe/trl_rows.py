"""What becomes of a recipe's rows in TRL's trainers: which fields act on them, which share a row, and what is cut off.

For SFTTrainer, rows of text stay text, and all others are made tokens and labels here. A field that acts on rows before
they are tokens would then do nothing, so it is refused, with what does it in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from solidify.recipe.schema import Recipe
from solidify.system import console, processes
from solidify.training import sources

_TEMPLATE = "training.chat_template_path: a recipe says in data.chat_template how conversations are written; write that"
_ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")  # columns of what TRL has made tokens, after `prompt_ids`


def find_sharing(recipe: Recipe) -> str | None:
    """Returns the field by which several documents stand in one row, or None where each has a row of its own."""
    if recipe.data is not None and recipe.data.packing:
        return "data.packing"
    return next((f"training.{key}" for key in ("packing", "padding_free") if recipe.training.get(key)), None)


def longest(recipe: Recipe) -> int | None:
    """Returns how many tokens a row has at most in a trainer of TRL; None where it cuts nothing."""
    assert recipe.data is not None
    found: int | None = recipe.training.get("max_length", recipe.data.max_length)
    return found


def length_faults(recipe: Recipe) -> list[str]:
    """Says where `training` and `data` give two lengths."""
    assert recipe.data is not None
    asked, own = longest(recipe), recipe.data.max_length
    if asked == own or "max_length" not in recipe.data.model_fields_set or (asked is None and _lays_out_flat(recipe)):
        return []
    return [f"training.max_length is {asked}, and data.max_length is {own}; write data.max_length alone"]


def sft_faults(recipe: Recipe, form: str) -> list[str]:
    """Says which fields of SFTConfig would do nothing to rows of a format, or something else than they say."""
    assert recipe.data is not None
    given = recipe.training
    found = [_TEMPLATE] if given.get("chat_template_path") is not None else []
    if given.get("dataset_kwargs"):
        found.append("training.dataset_kwargs: a recipe's rows are always prepared; leave it out")
    if given.get("dataset_text_field", recipe.data.text) != recipe.data.text:
        found.append(
            f"training.dataset_text_field: data.text names the column of text; write data.text: "
            f"{given['dataset_text_field']}"
        )
    found += _find_sharing_faults(recipe, form)
    return found + _find_loss_faults(recipe, form) + (_find_made_faults(recipe, form) if form != "text" else [])


def _lays_out_flat(recipe: Recipe) -> bool:
    return bool(recipe.training.get("padding_free")) and not recipe.training.get("packing")


def _find_sharing_faults(recipe: Recipe, form: str) -> list[str]:
    assert recipe.data is not None
    given, found = recipe.training, list[str]()
    if given.get("packing") and given.get("packing_strategy") == "wrapped":
        found.append(
            "training.packing_strategy: wrapped lets every document of a window see those before it; write bfd or "
            "bfd_split"
        )
    if given.get("eval_packing") and not given.get("packing") and not given.get("padding_free"):
        found.append(
            "training.eval_packing without training.packing lets documents of an evaluation see each other; leave it "
            "out, or write training.packing too"
        )
    if _lays_out_flat(recipe) and longest(recipe) is not None:
        found.append("training.padding_free: TRL then cuts no row; write training.max_length: null beside it")
    if _lays_out_flat(recipe) and form == "text" and "max_length" in recipe.data.model_fields_set:
        found.append(
            "training.padding_free: TRL then cuts no text, and data.max_length asks for it; leave data.max_length out, "
            "or write training.packing in place of padding_free"
        )
    return found


def _find_loss_faults(recipe: Recipe, form: str) -> list[str]:
    given, found = recipe.training, list[str]()
    remedy = {
        "messages": "data.loss_on says which tokens of a conversation count (all, assistant, last); write that",
        "prompt_completion": "the completion alone counts in such rows; for other labels write the rows as `messages` "
        "and say data.loss_on, or as one `text`",
    }.get(form, "all tokens of plain text count; leave it out, or give rows of `messages` and say data.loss_on")
    if given.get("assistant_only_loss"):
        found.append(f"training.assistant_only_loss: {remedy}")
    only = given.get("completion_only_loss")
    if only is not None and bool(only) != (form == "prompt_completion"):
        found.append(f"training.completion_only_loss: {remedy}")
    return found


def _find_made_faults(recipe: Recipe, form: str) -> list[str]:
    """Says which fields act on text alone, where the rows are made tokens before TRL reads them."""
    assert recipe.data is not None
    given, found = recipe.training, list[str]()
    if given.get("eos_token") is not None:
        found.append(
            f"training.eos_token: rows of {form} end as data.chat_template writes them, or in the end token of the "
            "base's tokenizer; write data.chat_template, or put the token at the end of the completions"
        )
    if given.get("truncation_mode", "keep_start") != "keep_start":
        found.append(
            f"training.truncation_mode: rows of {form} keep their start, up to data.max_length tokens; write a "
            "data.max_length that holds them"
        )
    asked = longest(recipe)
    if asked not in (None, recipe.data.max_length) and "max_length" not in recipe.data.model_fields_set:
        found.append(f"training.max_length: rows of {form} are cut at data.max_length; write data.max_length: {asked}")
    if asked is None and not _lays_out_flat(recipe):
        found.append(f"training.max_length: rows of {form} are cut at data.max_length; write that alone")
    return found


def say_cut(part: str, form: str, given: Any, read: Any, trainer: Any) -> None:
    """Says how many rows a trainer of TRL cuts and what they lose, as far as it can be counted.

    `given` are the rows as they were given to it, `read` what it made of them.
    """
    limit = getattr(trainer.args, "max_length", None)
    if given is None or limit is None or not processes.is_first():
        return
    lengths = _count_tokens(form, given, read, trainer)
    if lengths is None:
        console.words.print(f"data.{part}: {form}: TRL cuts a row at max_length, {limit} tokens")
        return
    if getattr(trainer.args, "packing", False) and trainer.args.packing_strategy != "bfd":
        console.words.print(f"data.{part}: {form}: {len(lengths):,} rows; longer ones were split, and none was cut")
        return
    lost = [length - limit for length in lengths if length > limit]
    unit = "rows" if form == "text" else "answers"
    cut = f"{len(lost):,} were cut at {limit} tokens and lost {sum(lost):,} tokens" if lost else "none was cut"
    console.words.print(f"data.{part}: {form}: {len(lengths):,} {unit}; {cut}")


def _count_tokens(form: str, given: Any, read: Any, trainer: Any) -> list[int] | None:
    """Returns the lengths of rows before they are cut; None where TRL makes tokens only as it reads."""
    if sources.is_stream(given) or sources.is_stream(read):
        return None
    if form == "text":
        return _count_texts(given[trainer.args.dataset_text_field], trainer.processing_class)
    columns = sources.columns(read)
    answers = [name for name in _ANSWERS if name in columns]
    if not answers or "prompt_ids" not in columns:
        return None
    before = list(map(len, read["prompt_ids"]))
    return [start + len(ids) for name in answers for start, ids in zip(before, read[name], strict=True)]


def _count_texts(texts: Any, tokenizer: Callable[..., Any]) -> list[int]:
    end = getattr(tokenizer, "eos_token", None) or ""
    closed = (text if text.endswith(end) else text + end for text in texts)
    return [len(tokenizer(text=text, verbose=False)["input_ids"]) for text in closed]
