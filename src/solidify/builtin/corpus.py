"""English text that every CPython carries: the language reference behind `help()`, cut into training and held-out."""

from __future__ import annotations

from pydoc_data import topics

NAMES = {"builtin:pydoc": "train", "builtin:pydoc-heldout": "heldout"}


def texts(split: str) -> list[str]:
    """Returns the texts of a split (`train` or `heldout`); every tenth topic by name is held out.

    Many topics are sections of others, so each paragraph is used once: a paragraph of a held-out topic is nowhere in
    the training text.
    """
    names = sorted(topics.topics)
    heldout = names[::10]
    used: set[str] = set()
    result: dict[str, list[str]] = {"train": [], "heldout": []}
    for name in [*heldout, *(n for n in names if n not in heldout)]:
        fresh = {p.strip(): p for p in topics.topics[name].split("\n\n") if p.strip() and p.strip() not in used}
        used |= set(fresh)
        if fresh:
            result["heldout" if name in heldout else "train"].append("\n\n".join(fresh.values()))
    return result[split]
