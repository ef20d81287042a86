"""Files and words that nobody wrote on purpose: every command ends with a sentence and an exit code of 0, 1 or 2.

The examples of the quick run are the same every time; `make test-all` draws others, and more of them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from solidify.__main__ import main
from solidify.errors import RecipeError
from solidify.recipe import schema
from solidify.system import files

QUICK = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
GOOD: dict[str, Any] = {
    "base": {"model": "base"},
    "surgery": [{"replace": "**.mlp", "expect": "LlamaMLP", "with": "wrappers.py:Scaled", "count": 2}],
    "adapter": {
        "lora": {"r": 4, "target_modules": ["**.q_proj"], "rank_pattern": {"**.q_proj": 2}},
        "train": ["**.scale"],
    },
    "objective": [{"loss": "model"}, {"loss": "solidify.losses:weight_penalty", "weight": 0.1}],
    "data": {"train": "text.jsonl", "max_length": 16},
    "training": {"max_steps": 1, "learning_rate": 1e-3},
    "output": "out",
}

ODD = ["", ".", "..", "/", "**", "*", "[/]", "[red]", "\x1b[31m", "\x00", "é" * 300, "a/../../b", "(a+)+$", "~", "NaN"]
NAMES = ["model", "builtin:none", "x.py:Y", "os:system", "torch.nn:Linear", "base", "text.jsonl", "wrappers.py:Scaled"]
WORDS = st.sampled_from([*ODD, *NAMES, "file\nname"])
NUMBERS = st.one_of(
    st.integers(-3, 3), st.sampled_from([10**30, -(10**30), 1e308, float("nan"), float("inf"), 0.5, 2**63])
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    PLAIN, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)), max_leaves=6
)


def places(document: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Lists the path of everything in a nested value."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [at, *(found for key, value in items for found in places(value, (*at, key)))]


@st.composite
def spoilt(draw: Any, good: Any) -> Any:
    """A good document in which one to three places hold something else, are gone, or stand twice."""
    document = deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(document)))
        if not path:
            continue
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        how = draw(st.sampled_from(["other", "gone", "more"]))
        if how == "gone":
            del inner[path[-1]]
        elif how == "more" and isinstance(inner, dict):
            inner[draw(WORDS)] = draw(VALUES)
        else:
            inner[path[-1]] = draw(VALUES)
    return document


def run(*words: str) -> tuple[int, str]:
    """Runs a command in this process; returns the exit code and all that was printed."""
    told, before = io.StringIO(), sys.argv
    sys.argv = ["solidify", *words]
    try:
        with redirect_stdout(told), redirect_stderr(told), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0), told.getvalue()


def ends_well(*words: str) -> None:
    code, told = run(*words)
    assert code in (0, 1, 2), told[-3000:]
    assert "Traceback" not in told and "an unexpected error" not in told, told[-3000:]


@settings(QUICK, max_examples=150)
@given(st.one_of(spoilt(GOOD).map(lambda d: yaml.safe_dump(d, allow_unicode=True)), st.text(max_size=200)))
@example("a: &x [1]\nb: *x\n")
@example("[" * 10_000)
@example("output: a\noutput: b\n")
@example("1: 2\n")
@example("x: !!python/object/apply:os.system [echo]\n")
@example("base: {model: 2001-12-14}\n")
@example("x: " + "9" * 5000)
def test_a_recipe_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        schema.load(path)
    except RecipeError as error:
        assert str(path) in str(error)


@settings(QUICK, max_examples=100)
@given(st.one_of(st.text(max_size=30), st.tuples(WORDS, WORDS).map("=".join), st.just("surgery.²=1")))
@example("surgery.0.count=[")
@example("output=*x")
def test_an_override_is_applied_or_refused(tmp_path_factory: pytest.TempPathFactory, word: str) -> None:
    path = tmp_path_factory.getbasetemp() / "good.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    try:
        schema.load(path, [word])
    except RecipeError as error:
        assert str(error)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base, a module and a text, for the recipe above."""
    directory = tmp_path_factory.mktemp("fuzz")
    pico.llama().save_pretrained(directory / "base")
    shutil.copy(Path(pico.__file__).parent / "user_modules" / "wrappers.py", directory)
    (directory / "text.jsonl").write_text('{"text": "a b c"}\n')
    return directory


def plans(place: Path, document: Any) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    ends_well("plan", str(place / "recipe.yaml"))


@settings(QUICK, max_examples=20)
@given(document=spoilt(GOOD))
def test_a_plan_ends_in_a_sentence(place: Path, document: Any) -> None:
    plans(place, document)


@pytest.mark.slow
@settings(QUICK, max_examples=800, derandomize=False)
@given(document=spoilt(GOOD))
def test_a_plan_ends_in_a_sentence_for_many_more(place: Path, document: Any) -> None:
    plans(place, document)


def look(place: Path, spoiled: str, content: bytes) -> None:
    """Looks by every verb that reads a directory at a copy of which one file holds something else."""
    directory = place / "copy"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(place / "base", directory)
    (directory / spoiled).write_bytes(content)
    ends_well("inspect", str(directory))
    ends_well("diff", str(place / "base"), str(directory))
    ends_well("check", str(directory))


@st.composite
def spoilt_files(draw: Any) -> tuple[str, bytes]:
    """The name of a file of a model directory, and other bytes for it: spoilt JSON, or bytes at random."""
    name = draw(st.sampled_from(["config.json", "generation_config.json", "model.safetensors.index.json"]))
    good: Any = {"weight_map": {"lm_head.weight": "model.safetensors"}, "metadata": {"total_size": 5}}
    if name == "config.json":
        good = pico.llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    text = draw(spoilt(good).map(lambda d: json.dumps(d, default=str).encode()))
    return name, draw(st.one_of(st.just(text), st.binary(max_size=60), st.just(text[: len(text) // 2])))


@settings(QUICK, max_examples=12)
@given(file=spoilt_files())
def test_a_directory_is_read_or_refused(place: Path, file: tuple[str, bytes]) -> None:
    look(place, *file)


@pytest.mark.slow
@settings(QUICK, max_examples=500, derandomize=False)
@given(file=spoilt_files())
def test_many_more_directories_are_read_or_refused(place: Path, file: tuple[str, bytes]) -> None:
    look(place, *file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe.yaml", "base/config.json"])
def test_what_is_no_file_is_not_opened(place: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(GOOD))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    words = [sys.executable, "-m", "solidify", "plan", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "is a pipe" in done.stderr, done.stderr


def test_a_message_does_not_steer_the_terminal_and_knows_ascii(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "output\x1b[31m": "é"}), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    words = [sys.executable, "-m", "solidify", "plan", str(path)]
    done = subprocess.run(words, capture_output=True, env=environment, timeout=60, check=False)
    assert done.returncode == 2 and b"unknown key" in done.stderr
    assert b"\x1b" not in done.stderr and b"Traceback" not in done.stderr


def test_text_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"#" * (files.LARGEST_RECIPE + 1))
    with pytest.raises(RecipeError, match=f"at most {files.LARGEST_RECIPE} are read"):
        schema.load(path)
