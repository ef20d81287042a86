"""Follows names through a series of edits: where each new module stands now, and which old tensor each tensor was.

Edits are taken as their documents (`Edit.document()`), because that is how manifests hold them. A name in an edit is as
it was when the edit was made; layers inserted or removed later move it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from solidify.surgery import catalogue
from solidify.surgery.operation import Operation, Record


def new_modules(edits: Sequence[Record]) -> dict[str, Record]:
    """Returns which new modules stand where after all edits: module name -> the edit that put it there."""
    return _follow_edits(edits, lambda operation: operation.puts or operation.adds)


def reshaped_modules(edits: Sequence[Record]) -> dict[str, Record]:
    """Returns which old modules have another shape after all edits: module name -> the last edit that gave it."""
    return _follow_edits(edits, lambda operation: operation.shapes)


def _follow_edits(edits: Sequence[Record], wanted: Callable[[type[Operation]], bool]) -> dict[str, Record]:
    now: dict[str, Record] = {}
    for edit in edits:
        operation = catalogue.of(edit)
        now = operation.follow(edit, now)
        if wanted(operation):
            now[edit["name"]] = edit
    return now


def origins(keys: Iterable[str], edits: Sequence[Record]) -> tuple[dict[str, str | None], set[str]]:
    """Follows tensors through edits; `keys` are their names before.

    Returns:
        For every name after the edits the name that the tensor had before them (None for a new one), and the names
        before of those that an edit says it dropped.
    """
    now: dict[str, str | None] = {key: key for key in keys}
    dropped: set[str] = set()
    for edit in edits:
        scope = edit["name"] + "."
        before = now
        dropped |= {origin for name in edit["dropped"] if (origin := before.get(name)) is not None}
        now = {key: origin for key, origin in before.items() if not key.startswith(scope)}
        now |= {new: before.get(old) for new, old in edit["kept"].items()}
        now |= dict.fromkeys(edit["new"], None)
    return now, dropped


def counts(keys: Iterable[str], edits: Sequence[Record]) -> dict[str, int]:
    """Counts what became of the base's tensors: `kept`, `new` and `dropped`; `keys` are the tensors' names after.

    It is the one count that plan, run, card and diff show.
    """
    kept: set[str] = set()
    new = 0
    for key in keys:
        origin = _find_old_name(key, edits)
        kept |= {origin} if origin is not None else set()
        new += origin is None
    gone: set[str] = set()
    for index, edit in enumerate(edits):
        origins_ = (_find_old_name(name, edits[:index]) for name in edit["dropped"])
        gone |= {origin for origin in origins_ if origin is not None}
    return {"kept": len(kept), "new": new, "dropped": len(gone - kept)}


def new_tensors(keys: Iterable[str], edits: Sequence[Record]) -> list[str]:
    """Returns which of the tensors after all edits (`keys`) the edits made: no tensor of the base became them."""
    return [key for key in keys if _find_old_name(key, edits) is None]


def _find_old_name(key: str, edits: Sequence[Record]) -> str | None:
    """Returns the name that a tensor had before some edits; None for one that an edit made."""
    for edit in reversed(edits):
        if key in edit["kept"]:
            key = edit["kept"][key]
        elif key in edit["new"]:
            return None
    return key
