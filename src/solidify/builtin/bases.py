"""The built-in bases by the names that recipes call them by."""

from __future__ import annotations

from pathlib import Path

from solidify.builtin import names, smollm2, tiny_olmoe


def directory(name: str) -> Path | None:
    """Returns where a built-in base stands, made at first use; None for a name that is not of that kind.

    Raises:
        ModelError: there is none of that name, or a package that it is made from is not installed.
    """
    names.refuse_unknown(name)
    if name == names.TINY_OLMOE:
        return tiny_olmoe.directory()
    return smollm2.directory() if name == names.SMOLLM2 else None
