from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from solidify.directory import writing
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError
from solidify.system import disk
from solidify.weights.hashing import digest_bytes


def ours(directory: Path, text: str) -> None:
    """Makes a directory a result of ours, told from others by a text."""
    directory.mkdir(exist_ok=True)
    (directory / "told").write_text(text)
    Manifest("stock", {}, files={"told": digest_bytes(text.encode())}).write(directory)


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with writing.staged(tmp_path / "deep" / "out") as staging:
        (staging / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_harms_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing.staged(out) as staging:
        ours(staging, "old")
    with pytest.raises(KeyboardInterrupt), writing.staged(out) as staging:
        (staging / "half").write_text("x")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "told").read_text() == "old"


def test_what_a_killed_run_left_is_swept_up(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from solidify.directory import writing\n"
        "with writing.staged(Path(sys.argv[1])) as staging:\n"
        "    (staging / 'x').write_text('x'); os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    with writing.staged(tmp_path / "out") as staging:
        (staging / "y").write_text("y")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_result_that_a_killed_run_was_replacing_comes_back(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    moved = tmp_path / f".out.replaced-{int(dead.stdout)}"
    moved.mkdir()
    (moved / "report.json").write_text("mine")
    with pytest.raises(KeyboardInterrupt), writing.staged(tmp_path / "out"):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "report.json").read_text() == "mine"


def test_a_living_run_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    with writing.staged(tmp_path / "out"):
        pass
    assert other.exists()


def test_empty_directories_and_ours_may_be_used_others_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    writing.refuse_foreign(tmp_path / "empty")
    writing.refuse_foreign(tmp_path / "new")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("theirs", "link"):
        with pytest.raises(ArtifactError, match="name another, or remove it first"):
            writing.refuse_foreign(tmp_path / name)


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "a"))
    assert disk.cache() == tmp_path / "a"
    monkeypatch.delenv("SOLIDIFY_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert disk.cache() == tmp_path / "b" / "solidify"


def test_a_run_that_died_under_the_same_number_is_swept_up(tmp_path: Path) -> None:
    """Processes in containers get the same few numbers again and again."""
    for kind in ("scratch", "partial"):
        (tmp_path / f".out.{kind}-{os.getpid()}").mkdir()
    with writing.scratch(tmp_path / "out") as scratch, writing.staged(tmp_path / "out") as staging:
        assert scratch.is_dir()
        (staging / "x").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / ".[ab].partial-0999999999").mkdir()
    (tmp_path / ".a.partial-0999999999").mkdir()
    with writing.staged(tmp_path / "[ab]"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.partial-0999999999", "[ab]"]


def test_a_link_to_a_result_stays_one(tmp_path: Path) -> None:
    """The result is written where the link leads to."""
    for text in ("old", "new"):
        with writing.staged(tmp_path / "there") as staging:
            ours(staging, text)
        if text == "old":
            (tmp_path / "here").symlink_to(tmp_path / "there")
    with writing.staged(tmp_path / "here") as staging:
        ours(staging, "newest")
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "there" / "told").read_text() == "newest"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "there"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_newer_result_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool) -> None:
    if not at_once:
        monkeypatch.setattr(writing, "_exchange_names", lambda a, b: False)  # as on systems without it
    for text in ("old", "new"):
        with writing.staged(tmp_path / "out") as staging:
            ours(staging, text)
    assert (tmp_path / "out" / "told").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_was_made_for_a_result_goes_with_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), writing.staged(tmp_path / "deep" / "deeper" / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_what_killed_runs_left_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "out" / ".artifact.partial-0999999999").mkdir(parents=True)
    writing.refuse_foreign(tmp_path / "out")
