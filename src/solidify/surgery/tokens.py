"""Which tokens are added to a tokenizer, which ids they get, and from which old ones each of them starts.

Everything is tried on a copy first: a tokenizer is changed in place when nothing can fail any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from solidify.errors import SurgeryError, refuse
from solidify.system import files, foreign

Start = str | Mapping[str, str]
STARTS = "'mean', 'text', {copy: TOKEN} or {text: TEXT}"
TITLE = "the tokens cannot be added as asked"


@dataclass(frozen=True)
class Asked:
    """One token that is to be added, and how its rows start."""

    text: str
    start: Start


@dataclass
class Additions:
    """The tokens with their ids, and for each id the old ids whose rows it starts from: all that are known, if none.

    `forms` are the tokens as the tokenizer takes them, `known` the ids that it had before.
    """

    ids: dict[str, int]
    sources: dict[int, list[int]]
    forms: list[Any]
    special: bool
    known: list[int] = field(default_factory=list)

    def add_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Adds the tokens, in place."""
        tokenizer.add_tokens(self.forms, special_tokens=self.special)


def read(tokens: Sequence[Any] | str | Path, start: Start) -> list[Asked]:
    """Reads what is to be added: tokens, or `{token: ..., start: ...}`, listed or in a file (one a line, or JSON).

    Raises:
        SurgeryError: it is no such list; all faults together.
    """
    listed = _read_file(Path(tokens)) if isinstance(tokens, Path) else tokens
    if isinstance(listed, (str, bytes, Mapping)) or not isinstance(listed, Sequence) or not listed:
        raise SurgeryError(f"{TITLE}: give a list of tokens, as in ['<tool>', '</tool>'], or the Path of a file")
    faults = [f"the start of the tokens: {fault}" for fault in _start_faults(start)]
    asked = []
    for each in listed:
        text, own = (each, start) if not isinstance(each, Mapping) else (each.get("token"), each.get("start", start))
        strange = sorted(set(each) - {"token", "start"}) if isinstance(each, Mapping) else []
        if not isinstance(text, str) or not text.strip() or strange:
            faults.append(f"{each!r} is no token: write its text, or {{token: TEXT, start: ...}}")
            continue
        faults += [f"{text!r}: {fault}" for fault in (_start_faults(own) if own is not start else [])]
        asked.append(Asked(text, own))
    texts = [each.text for each in asked]
    faults += [f"{text!r} is listed twice" for text in dict.fromkeys(texts) if texts.count(text) > 1]
    refuse(SurgeryError, TITLE, faults)
    return asked


def _read_file(path: Path) -> list[Any]:
    text = files.text(path, SurgeryError)
    if path.suffix != ".json":
        return [line for line in text.splitlines() if line.strip()]
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SurgeryError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, list) else []


def _start_faults(start: Any) -> list[str]:
    if start in ("mean", "text"):
        return []
    given = list(start.items()) if isinstance(start, Mapping) else []
    if len(given) == 1 and given[0][0] in ("copy", "text") and isinstance(given[0][1], str) and given[0][1]:
        return []
    return [f"a start is {STARTS}, not {start!r}"]


def plan(tokenizer: Any, asked: Sequence[Asked], rows: int, *, special: bool) -> Additions:
    """Finds the ids that tokens get and where they start; `rows` is how many embeddings there are.

    A token that the tokenizer has already, but the model has no embedding for, is given one under its id.

    Raises:
        SurgeryError: there is no tokenizer; a token has an embedding already, or would not be read as one id; a start
            names what the tokenizer does not know. All faults together.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        found = "there is none" if tokenizer is None else f"this is a {type(tokenizer).__name__}"
        raise SurgeryError(f"{TITLE}: tokens are added to a model and its tokenizer, and {found}")
    before = tokenizer.get_vocab()
    faults = [
        f"{each.text!r} is a token already (id {before[each.text]}), and has an embedding; leave it out, and train it "
        "with trainable_token_indices"
        for each in asked
        if before.get(each.text, rows) < rows
    ]
    sources = [_find_sources(tokenizer, each, before, rows, faults) for each in asked]
    forms, ids = _choose_forms(tokenizer, asked, special, faults)
    refuse(SurgeryError, TITLE, faults)
    taken = set(ids.values())
    known = sorted(number for number in set(before.values()) if number < rows and number not in taken)
    return Additions(ids, {ids[each.text]: s for each, s in zip(asked, sources, strict=True)}, forms, special, known)


def _find_sources(
    tokenizer: PreTrainedTokenizerBase, asked: Asked, before: Mapping[str, int], rows: int, faults: list[str]
) -> list[int]:
    """Returns the old ids that a token starts from; none for the mean of all."""
    start: Any = asked.start
    if start == "mean":
        return []
    if start != "text" and "copy" in start:
        number = before.get(start["copy"], rows)
        if number >= rows:
            faults.append(f"{asked.text!r} shall start as a copy of {start['copy']!r}, which is no token of the model")
        return [number]
    text = asked.text if start == "text" else start["text"]
    pieces = [int(number) for number in tokenizer(text, add_special_tokens=False)["input_ids"]]
    unknown = tokenizer.unk_token_id
    if not pieces or any(number >= rows for number in pieces) or set(pieces) == {unknown}:
        faults.append(f"{asked.text!r} shall start from {text!r}, of which the tokenizer knows no piece")
    return pieces


def _choose_forms(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked], special: bool, faults: list[str]
) -> tuple[list[Any], dict[str, int]]:
    """Returns the tokens in the form in which each, and it alone, becomes one id; and the ids."""
    forms = {each.text: AddedToken(each.text, special=special, normalized=not special) for each in asked}
    trial = _with_tokens(tokenizer, list(forms.values()), special)
    if any(_is_split(trial, text) for text in forms):
        raw = {
            t: AddedToken(t, special=special, normalized=False) if _is_split(trial, t) else f for t, f in forms.items()
        }
        forms, trial = raw, _with_tokens(tokenizer, list(raw.values()), special)
    faults += [
        f"{text!r} is not read as one id: the tokenizer changes its text before it looks for tokens"
        for text in forms
        if _is_split(trial, text)
    ]
    return list(forms.values()), {text: int(trial.convert_tokens_to_ids(text)) for text in forms}


def _with_tokens(tokenizer: PreTrainedTokenizerBase, forms: Sequence[Any], special: bool) -> PreTrainedTokenizerBase:
    with foreign.calling("the tokenizer does not take the tokens", SurgeryError):
        trial = deepcopy(tokenizer)
        trial.add_tokens(list(forms), special_tokens=special)
    return trial


def _is_split(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Returns whether a token's own text becomes something else than its id."""
    number = tokenizer.convert_tokens_to_ids(text)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) != [number]
