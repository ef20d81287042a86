"""What the documents say of the repository is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from solidify import recipe
from solidify.cli import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def text_of(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_and_file_that_is_named_exists(document: Path) -> None:
    text = document.read_text()
    for file, name in TEST.findall(text):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{document.name} names {file}::{name}"
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_at_least_thirty_traps_are_listed_each_with_a_test() -> None:
    rows = [line for line in text_of("traps.md").splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 30
    assert all(TEST.search(row) for row in rows)


def test_every_trap_test_is_listed() -> None:
    listed = {name for _, name in TEST.findall(text_of("traps.md"))}
    for path in (ROOT / "tests" / "traps").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            assert name in listed, f"docs/traps.md lacks {path.name}::{name}"


def test_the_steps_refer_to_traps_that_are_there() -> None:
    count = len(re.findall(r"^\| \d+ \|", text_of("traps.md"), re.MULTILINE))
    numbers = [
        int(n) for group in re.findall(r"\[(\d+(?:, \d+)*)\]", text_of("from_a_script.md")) for n in group.split(", ")
    ]
    assert numbers
    assert max(numbers) <= count


def test_the_readmes_recipe_is_one() -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert recipe.Recipe.model_validate(yaml.safe_load(block.group(1))).adapter is not None


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_starts_with_its_command_and_fits_a_screen(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# solidify run examples/{path.name}")
    assert len(lines) <= 40
    recipe.load(path)


def test_every_verb_is_documented() -> None:
    for command in app.registered_commands:
        assert f"solidify {command.name or command.callback.__name__}" in text_of("recipe.md")
