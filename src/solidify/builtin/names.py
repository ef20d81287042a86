"""What the built-in bases are called: told without importing what makes them."""

from __future__ import annotations

from solidify.errors import ModelError

TINY_OLMOE = "builtin:tiny-olmoe"
SMOLLM2 = "builtin:smollm2-135m"
BASES = (TINY_OLMOE, SMOLLM2)


def refuse_unknown(name: str) -> None:
    """Refuses a name that is built in by its beginning, and is none.

    Raises:
        ModelError: it is so.
    """
    if name.startswith("builtin:") and name not in BASES:
        raise ModelError(f"there is no {name!r}; built in: {', '.join(BASES)}")
