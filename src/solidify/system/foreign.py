"""The one seam through which foreign code is called: a user's module, a family's forward or constructor, PEFT.

Foreign code may raise anything, an assertion or an exception class of its own included. Here it becomes one sentence
that names what was called and where, or an `Outcome` where an error is an answer (may a family be built like that?).
What ends a process (`KeyboardInterrupt`, `SystemExit`) passes through.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from solidify.errors import SolidifyError, SurgeryError

Value = TypeVar("Value")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FRAMES = " Exception raised from "  # torch's own frames follow, in C++
_LONGEST = 2000  # letters of what an error says


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """What a foreign call returned, or what it raised (then `value` is None)."""

    value: Value | None
    error: Exception | None

    @property
    def failed(self) -> bool:
        """Returns whether the call raised."""
        return self.error is not None


def attempt(call: Callable[..., Value], *args: Any, **kwargs: Any) -> Outcome[Value]:
    """Calls foreign code whose failure is an answer, and returns what came of it."""
    try:
        return Outcome(call(*args, **kwargs), None)
    except Exception as error:
        return Outcome(None, error)


@contextmanager
def calling(what: str, kind: type[SolidifyError] = SurgeryError, *, remedy: str = "") -> Iterator[None]:
    """Runs foreign code in the block; whatever it raises becomes one `kind` that says `what` failed, and how.

    Raises:
        SolidifyError: `kind` for an error of foreign code; one of ours passes through as it is.
        OSError: the disk is full.
    """
    try:
        yield
    except SolidifyError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise  # whoever called, the disk is the cause: who writes says how much room is left
        raise kind(f"{what}: {said(error)}{remedy and f'; {remedy}'}") from error


def said(error: BaseException) -> str:
    """Returns an error in one line: its class, and what it says, up to where a list of frames begins."""
    words = " ".join(str(error).split()).partition(_FRAMES)[0]
    words = f"{words[:_LONGEST]}…" if len(words) > _LONGEST else words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
