"""Judges the numbers that loss terms are made with, when they are made."""

from __future__ import annotations

import math
from typing import Any

from solidify.errors import ObjectiveError


def number(term: str, name: str, value: Any) -> float:
    """Returns a finite number.

    Raises:
        ObjectiveError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ObjectiveError(f"{term}: {name} must be a finite number, but is {value!r}")
    return value


def positive(term: str, name: str, value: Any) -> float:
    """Returns a number above zero.

    Raises:
        ObjectiveError: it is none.
    """
    if not number(term, name, value) > 0:
        raise ObjectiveError(f"{term}: {name} must be above 0, but is {value}")
    return value  # type: ignore[no-any-return]


def share(term: str, name: str, value: Any) -> float:
    """Returns a number from 0 to 1.

    Raises:
        ObjectiveError: it is none.
    """
    if not 0 <= number(term, name, value) <= 1:
        raise ObjectiveError(f"{term}: {name} must be from 0 to 1, but is {value}")
    return value  # type: ignore[no-any-return]


def count(term: str, name: str, value: Any) -> int:
    """Returns a whole number of at least one.

    Raises:
        ObjectiveError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ObjectiveError(f"{term}: {name} must be a whole number of at least 1, but is {value!r}")
    return value
