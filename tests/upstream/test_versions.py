"""Whoever installs the package gets the minor versions whose private names were read."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from solidify.upstream import peft, transformers

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


@pytest.mark.parametrize(("library", "tested"), [("transformers", transformers.TESTED), ("peft", peft.TESTED)])
def test_what_was_read_is_what_is_asked_for(library: str, tested: str) -> None:
    assert f"{tested}.99" in ASKED[library].specifier
