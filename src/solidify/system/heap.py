"""Memory that was freed goes back to the system: glibc keeps pieces of it, which others cannot use."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

_MMAP_THRESHOLD = -3  # of mallopt(3): pieces of at least so many bytes are mapped, and unmapped when they are freed
_PIECE = 2**22


def trim() -> None:
    """Gives back what is free at the moment."""
    _call("malloc_trim", 0)


def map_large() -> None:
    """From now on, gives tensors of 4 MiB and more back as soon as they are freed.

    glibc raises this bound to 32 MiB by itself, and keeps all that is smaller in a heap that breaks into pieces.
    """
    _call("mallopt", _MMAP_THRESHOLD, _PIECE)


def _call(word: str, *given: Any) -> None:
    with suppress(OSError, AttributeError):  # a word of glibc
        getattr(ctypes.CDLL(None), word)(*given)
