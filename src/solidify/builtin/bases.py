"""The built-in bases by the names that recipes call them by."""

from __future__ import annotations

from pathlib import Path

from solidify.builtin import smollm2, tiny_olmoe
from solidify.errors import ModelError

NAMES = (tiny_olmoe.NAME, smollm2.NAME)


def directory(name: str) -> Path | None:
    """Returns where a built-in base stands, made at first use; None for a name that is not of that kind.

    Raises:
        ModelError: there is none of that name, or a package that it is made from is not installed.
    """
    if not name.startswith("builtin:"):
        return None
    if name == tiny_olmoe.NAME:
        return tiny_olmoe.directory()
    if name == smollm2.NAME:
        return smollm2.directory()
    raise ModelError(f"there is no {name!r}; built in: {', '.join(NAMES)}")
