"""Sentences that say what changed when a library no longer is as the package knows it."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any


def same_minor(library: str, tested: str) -> None:
    """Fails where another minor version is installed than the one that the private names were read in."""
    found = version(library)
    assert found.startswith(f"{tested}."), (
        f"{library} {found} is installed, and its private names were read in {tested}: read those in "
        f"src/solidify/upstream/{library}.py again, then move TESTED and the range in pyproject.toml"
    )


def attribute(owner: Any, name: str) -> Any:
    """Returns an attribute that a library is known to have."""
    assert hasattr(owner, name), f"{_called(owner)} has no {name} any more: find what took its place"
    return getattr(owner, name)


def same_parameters(owner: Any, name: str, expected: tuple[str, ...]) -> None:
    """Fails where a function of a library takes other parameters than it was known to take."""
    found = tuple(inspect.signature(attribute(owner, name)).parameters)
    assert found == expected, f"{_called(owner)}.{name} takes {', '.join(found)}, and took {', '.join(expected)}"


def _called(owner: Any) -> str:
    named = owner if isinstance(owner, type) or inspect.ismodule(owner) else type(owner)
    return str(getattr(named, "__qualname__", named.__name__))
