"""What can go wrong, one class per stage.

SolidifyError
├── RecipeError      the recipe, or an argument in its place, breaks a rule
├── ModelError       a pretrained model cannot be loaded as asked
├── SurgeryError     a replacement cannot stand where it was asked to stand
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

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


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
    """The recipe, or an argument in its place, breaks a rule."""


class ModelError(SolidifyError, ValueError):
    """A pretrained model cannot be loaded as asked; where a recipe names it, that is a RecipeError."""


class SurgeryError(SolidifyError, ValueError):
    """A replacement cannot stand where it was asked to stand."""


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
    """Raises `kind` with all `faults` under one `title`; does nothing when there is no fault."""
    listed = list(faults)
    if len(listed) == 1:
        raise kind(f"{title}: {listed[0]}", listed)
    if listed:
        raise kind(f"{title}:\n" + "\n".join(f"  - {fault}" for fault in listed), listed)
