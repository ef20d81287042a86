"""What can go wrong, one class per stage.

SolidifyError
├── RecipeError      the recipe, or an argument instead of one, breaks a rule
├── ModelError       a pretrained model cannot be loaded as asked
├── SurgeryError     a change of the model cannot be made as asked
├── ArtifactError    a directory is not the artifact that it claims to be, or cannot become one
├── AdapterError     an adapter does not fit its base, or is not what was declared
├── ObjectiveError   a loss term or a trainer cannot do as it was declared
├── HealingError     a changed model cannot learn from its base as asked
├── DataError        the data cannot be read as asked
└── CheckFailed      a check found that a promise does not hold

All but `CheckFailed` mean that the input is wrong: the command line prints the message and exits with 2.
`CheckFailed` exits with 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_INDEX = re.compile(r"(?<=[A-Za-z_]\.)\d+")  # a number in a dotted name: of a layer, of an expert
_LISTED = 4  # faults that differ in such numbers only; of more, the first and the last are named


class SolidifyError(Exception):
    """Root of everything that solidify raises on purpose.

    `faults` are the single things that are wrong, a sentence each: those of a whole stage are raised together.
    """

    faults: tuple[str, ...]

    def __init__(self, message: str = "", faults: Iterable[str] = ()) -> None:
        """Makes an error of a message; without `faults`, that is the one fault."""
        super().__init__(message)
        self.faults = tuple(faults) or (message,)


class RecipeError(SolidifyError, ValueError):
    """The recipe, or an argument instead of one, breaks a rule."""


class ModelError(SolidifyError, ValueError):
    """A pretrained model cannot be loaded as asked; where a recipe names it, that is a RecipeError."""


class SurgeryError(SolidifyError, ValueError):
    """A change of the model cannot be made as asked."""


class ArtifactError(SolidifyError, ValueError):
    """A directory is not the artifact that it claims to be, or cannot become one."""


class AdapterError(SolidifyError, ValueError):
    """An adapter does not fit its base, or is not what was declared."""


class ObjectiveError(SolidifyError, ValueError):
    """A loss term cannot be computed, or a trainer cannot train, as it was declared."""


class HealingError(SolidifyError, ValueError):
    """A changed model cannot learn from its base as it was asked to."""


class DataError(SolidifyError, ValueError):
    """The data cannot be read as asked."""


class CheckFailed(SolidifyError, RuntimeError):
    """A check found that a promise does not hold."""


@contextmanager
def raised_as(kind: type[SolidifyError], *, of: type[SolidifyError]) -> Iterator[None]:
    """While the block lasts, what fails as `of` is raised as `kind`, with the same words: the caller's world."""
    try:
        yield
    except of as error:
        raise kind(str(error), error.faults) from error


def refuse(kind: type[SolidifyError], title: str, faults: Iterable[str]) -> None:
    """Raises `kind` with all `faults` under one `title`; does nothing when there is no fault.

    The message names one fault of many layers once; the error's `faults` are all of them.
    """
    listed = list(faults)
    folded = list(_fold_faults(listed))
    if len(folded) == 1:
        raise kind(f"{title}: {folded[0]}", listed)
    if listed:
        raise kind(f"{title}:\n" + "\n".join(f"  - {fault}" for fault in folded), listed)


def _fold_faults(faults: Iterable[str]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for fault in faults:
        groups.setdefault(_INDEX.sub("*", fault), []).append(fault)
    for alike in groups.values():
        first, last = alike[0], alike[-1]
        apart = [b.rstrip(",;:") for a, b in zip(first.split(), last.split(), strict=True) if a != b]
        if len(alike) <= _LISTED or not apart:
            yield from alike
        else:
            yield f"{first} (and {len(alike) - 1} more like this, the last of {apart[0]})"
