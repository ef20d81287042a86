"""English text that every CPython carries: the language reference behind `help()`, cut into training and held-out."""

from __future__ import annotations

from pydoc_data import topics

NAMES = {"builtin:pydoc": "train", "builtin:pydoc-heldout": "heldout"}


def texts(split: str) -> list[str]:
    """Returns the topics of a split (`train` or `heldout`); every tenth topic by name is held out."""
    names = sorted(topics.topics)
    held = set(names[::10])
    return [topics.topics[name] for name in names if (name in held) == (split == "heldout")]
