"""Follows names through a series of edits: where each new module stands now, and which old tensor each tensor was.

Edits are taken as their documents (`Edit.document()`), because that is how manifests hold them. A name in an edit is as
it was when the edit was made; layers inserted or removed later move it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]


def places(edits: Sequence[Record]) -> dict[str, Record]:
    """Returns what stands at which place after all edits: module name -> the edit that put it there."""
    now: dict[str, Record] = {}
    for edit in edits:
        name = edit["name"]
        if edit["operation"] == "rearrange":
            now = {new: record for old, record in now.items() for new in _moved(old, name, edit["settings"]["order"])}
        else:
            inside = [n for n in now if n == name or n.startswith(name + ".")]
            kept = {n for n in inside if n != name and _kept_inside(edit, n)}
            now = {n: record for n, record in now.items() if n not in inside or n in kept}
            now[name] = edit
    return now


def _moved(place: str, layers: str, order: Sequence[int]) -> list[str]:
    """Returns the names that a place has once a list of layers has another order: none, one or several."""
    if not place.startswith(layers + "."):
        return [place]
    number, _, rest = place.removeprefix(layers + ".").partition(".")
    tail = f".{rest}" if rest else ""
    return [f"{layers}.{new}{tail}" for new, old in enumerate(order) if old == int(number)]


def _kept_inside(edit: Record, name: str) -> bool:
    """Returns whether an earlier module still stands, under its name, within the one that an edit put around it."""
    return any(new == old and new.startswith(name + ".") for new, old in edit["kept"].items())


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
        origin = _before(key, edits)
        kept |= {origin} if origin is not None else set()
        new += origin is None
    gone: set[str] = set()
    for place, edit in enumerate(edits):
        origins_ = (_before(name, edits[:place]) for name in edit["dropped"])
        gone |= {origin for origin in origins_ if origin is not None}
    return {"kept": len(kept), "new": new, "dropped": len(gone - kept)}


def _before(key: str, edits: Sequence[Record]) -> str | None:
    """Returns the name that a tensor had before some edits; None for one that an edit made."""
    for edit in reversed(edits):
        if key in edit["kept"]:
            key = edit["kept"][key]
        elif key in edit["new"]:
            return None
    return key
