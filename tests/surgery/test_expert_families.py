"""What can be done to the experts of every family: the table of docs/experts.md is made here, and held to."""

from __future__ import annotations

from pathlib import Path

import expert_families
import pytest
from expert_families import QUICK

import solidify

PAGE = Path(solidify.__file__).parents[2] / "docs" / "experts.md"
START, END = "<!-- made by tests/surgery/test_expert_families.py -->\n", "\n<!-- end of what the test makes -->"


def written() -> str:
    """What the page has between the marks."""
    return PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]


def sentences() -> list[str]:
    """The refusals of the page, in their order."""
    notes = written().partition("Refused, and what is said:\n\n")[2].strip().splitlines()
    return [note.partition(". ")[2] for note in notes]


@pytest.mark.parametrize("family", QUICK)
def test_the_table_says_what_is_done_to_a_family(family: str) -> None:
    cells = expert_families.row(family, "AutoModelForCausalLM")
    assert expert_families.line(family, cells, sentences()) in written().splitlines()


def test_the_table_has_every_family_with_experts() -> None:
    rows = [line.split(" | ")[0].removeprefix("| ") for line in written().splitlines()[2:] if line.startswith("| ")]
    assert rows == [model_type for model_type, _ in expert_families.listed()]


@pytest.mark.slow
def test_every_family_is_as_the_table_says() -> None:
    """Writes the table anew, and fails where it was another."""
    rows = {model_type: expert_families.row(model_type, auto) for model_type, auto in expert_families.listed()}
    before, table = written(), expert_families.table(rows)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(START + before + END, START + table + END), encoding="utf-8")
    assert table == before
