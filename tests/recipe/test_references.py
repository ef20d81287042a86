from __future__ import annotations

from pathlib import Path

import pytest
import torch

from solidify.errors import RecipeError
from solidify.recipe import references


def test_a_file_beside_the_recipe_and_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from .helper import twice\n\ndef four():\n    return twice(2)\n")
    (tmp_path / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    assert references.resolve("mine.py:four", tmp_path)() == 4


def test_an_installed_module() -> None:
    assert references.resolve("torch.nn:Linear") is torch.nn.Linear


def test_a_module_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "a_module_of_mine.py").write_text("x = 5\n")
    assert references.resolve("a_module_of_mine:x", tmp_path) == 5


def test_files_of_one_name_in_two_directories_do_not_meet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"x = {name!r}\n")
    assert [references.resolve("mine.py:x", tmp_path / n) for n in ("a", "b", "a")] == ["a", "b", "a"]


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from .helper import x\n")
    (tmp_path / "helper.py").write_text("x = 1\n")
    assert references.resolve("mine.py:x", tmp_path) == 1
    (tmp_path / "helper.py").write_text("x = 2\n")
    assert references.resolve("mine.py:x", tmp_path) == 2


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("mine.py", "is written `file.py:Name`"),
        ("none.py:X", "none.py does not exist"),
        ("mine.py:Mien", "defines no 'Mien'.*it has: Mine"),
        ("no.such.module:X", "is neither installed nor beside the recipe"),
        ("broken.py:X", "failed with SyntaxError"),
        ("missing.py:X", "failed with ModuleNotFoundError: No module named 'not_there'"),
        ("imports_nothing:X", "imports 'not_there', which is not installed"),
    ],
)
def test_references_that_lead_nowhere_say_why(tmp_path: Path, reference: str, words: str) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    pass\n")
    (tmp_path / "broken.py").write_text("def x(:\n")
    (tmp_path / "missing.py").write_text("import not_there\n")
    (tmp_path / "imports_nothing.py").write_text("import not_there\n")
    with pytest.raises(RecipeError, match=words):
        references.resolve(reference, tmp_path)
