"""docs/zoo.md is made from what was measured, names every module of the zoo, and claims what the tests try."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import zoo
from torch import nn

from solidify import modules
from solidify.recipe import schema

HERE = Path(__file__).parent
DOCS, BENCHMARKS = HERE.parents[1] / "docs", HERE.parents[1] / "benchmarks"
HEADS = {"draft_head", "mtp_head", "wrapped_module"}  # not put in the place of a module


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("zoo_page")
    del sys.modules["zoo_page"]


def figures() -> dict[str, Any]:
    return json.loads((DOCS / "zoo.json").read_text(encoding="utf-8"))


def test_the_page_says_what_was_measured(page: ModuleType) -> None:
    found = figures()
    text = (DOCS / "zoo.md").read_text(encoding="utf-8")
    assert text == page.write_page(found)
    changed = {name: {**each, "kl_surgery": 9.87} for name, each in found.items()}
    assert page.write_page(changed) != text


def test_every_figure_is_of_the_trial_that_stands_in_the_gallery(page: ModuleType) -> None:
    from dataclasses import asdict

    trials = {entry.name: json.loads(json.dumps(asdict(entry.trial))) for entry in page.GALLERY}
    for name, found in figures().items():
        assert found["trial"] == trials[name], name
        if found["trial"]["steps"]:
            gone = (found["kl_surgery"] - found["kl_align"]) / found["kl_surgery"]
            assert found["recovered"] == pytest.approx(gone)
        else:
            assert found["kl_surgery"] < 1e-4, f"{name} is said to start as what it replaces"


def test_every_replacement_of_the_zoo_has_a_row(page: ModuleType) -> None:
    files = {path.stem for path in Path(modules.__file__).parent.glob("[a-z]*.py")} - HEADS
    assert {entry.file for entry in page.GALLERY} == files and len(page.GALLERY) == len(files)
    for entry in page.GALLERY:
        assert issubclass(entry.load(), nn.Module)
        text = inspect.getdoc(sys.modules[entry.load().__module__]) or ""
        assert [paper for paper in entry.papers if paper not in text] == [], entry.name


def test_every_recipe_of_a_row_makes_its_module(page: ModuleType) -> None:
    for entry in page.GALLERY:
        for recipe in entry.recipes:
            steps = schema.load(zoo.EXAMPLES / recipe).surgery
            wanted = f"solidify.modules.{entry.file}:{entry.name}"
            assert all(getattr(step, "module", None) == wanted for step in steps), recipe


def families_of(name: str) -> set[str]:
    """Reads from the tests of a module in which families it is tried."""
    tree = ast.parse((HERE / f"test_{name}.py").read_text(encoding="utf-8"))
    known = {word.lower() for word in (*zoo.FAMILIES, "qwen3_moe", "mixtral", "flex_olmo")}
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    named = {word for word in known if word in words or f"{word.replace('_', '')}forcausallm" in map(str.lower, words)}
    loops = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node) == "pytest.mark.parametrize('name', zoo.FAMILIES)"
    ]
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    named |= {"olmoe"} if "pico.olmoe" in attributes else set()
    return named | (set(zoo.FAMILIES) if loops else set())


def test_the_families_of_a_row_are_those_of_its_tests(page: ModuleType) -> None:
    for entry in page.GALLERY:
        assert set(entry.families) <= families_of(entry.file), entry.name
        assert len(entry.families) >= 4
    assert "gpt2" not in families_of("linear_attention")
