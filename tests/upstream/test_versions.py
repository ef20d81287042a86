"""Whoever installs the package gets the minor versions whose private names were read."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import installed
import pytest
from packaging.requirements import Requirement

from solidify.upstream import peft, transformers, trl

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
ASKED = {r.name: r for r in map(Requirement, tomllib.loads(PROJECT.read_text())["project"]["dependencies"])}


@pytest.mark.parametrize("library", ["transformers", "peft", "trl", "accelerate"])
def test_no_other_minor_version_is_asked_for(library: str) -> None:
    """A later one is asked for when the tests in this directory pass with it."""
    asked, found = ASKED[library].specifier, version(library)
    major, minor = map(int, found.split(".")[:2])
    assert found in asked
    assert f"{major}.{minor + 1}.0" not in asked
    assert f"{major}.{minor - 1}.99" not in asked


READ = [("transformers", transformers.TESTED), ("peft", peft.TESTED), ("trl", trl.TESTED)]


@pytest.mark.parametrize(("library", "tested"), READ)
def test_what_was_read_is_what_is_asked_for(library: str, tested: str) -> None:
    assert f"{tested}.99" in ASKED[library].specifier


def test_another_version_is_named_in_a_sentence() -> None:
    with pytest.raises(AssertionError, match=r"peft .* is installed, and its private names were read in 0\.3"):
        installed.same_minor("peft", "0.3")
    with pytest.raises(AssertionError, match="Path has no gone any more"):
        installed.attribute(Path, "gone")
    with pytest.raises(AssertionError, match="same_minor takes library, tested, and took library"):
        installed.same_parameters(installed, "same_minor", ("library",))
