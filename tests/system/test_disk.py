"""What is said to be written is on the disk; what killed processes leave behind goes; what lives is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pico
import pytest

import solidify
from solidify.directory import writing
from solidify.findings import Report
from solidify.merging import export
from solidify.system import disk
from training import awake


class Recorder:
    """Records, in order, what is synced and what gets another name; `lost` says what a power cut would take."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.synced: dict[tuple[int, int], tuple[int, int]] = {}
        self.lost: list[str] = []

    def note(self, kind: str, path: Any) -> None:
        self.events.append((kind, os.fsdecode(path)))

    def sync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self.synced[found.st_dev, found.st_ino] = found.st_size, found.st_mtime_ns
        self.note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def named(self, source: Path, target: Path) -> None:
        """Judges a rename: everything below the source, and the list of names in every directory, must be synced."""
        every = [source, *source.rglob("*")] if source.is_dir() else [source]
        for path in every:
            found = path.stat()
            if self.synced.get((found.st_dev, found.st_ino)) != (found.st_size, found.st_mtime_ns):
                self.lost.append(f"{path} is not on the disk when {target} gets its name")
        self.note("rename", target)


@contextmanager
def recorded(below: Path) -> Iterator[Recorder]:
    """Records what this process syncs and renames below a directory."""
    recorder, fsync, rename, replace = Recorder(), os.fsync, os.rename, os.replace
    exchanged = writing._exchange_names

    def naming(call: Callable[..., None]) -> Callable[..., None]:
        def work(source: Any, target: Any, **more: Any) -> None:
            if below in Path(target).parents and not re_hidden(target) and Path(source).exists():
                recorder.named(Path(source), Path(target))
            call(source, target, **more)

        return work

    def re_hidden(path: Any) -> bool:
        return Path(path).name.startswith(".")

    def exchange(a: Path, b: Path) -> bool:
        recorder.named(a, b)
        return exchanged(a, b)

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        recorder.sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", syncing)
        patch.setattr(os, "rename", naming(rename))
        patch.setattr(os, "replace", naming(replace))
        patch.setattr(writing, "_exchange_names", exchange)
        yield recorder


def survives(recorder: Recorder, output: Path) -> None:
    """Asserts that a power cut at any moment leaves the old or the new: synced, named, and the name synced."""
    assert recorder.lost == []
    named = recorder.events.index(("rename", str(output)))
    assert ("fsync", str(output.parent)) in recorder.events[named:]


def small(directory: Path) -> Path:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled, expect="LlamaMLP")
    return pico.artifact(model, edits, directory)


@pytest.mark.slow
def test_results_survive_a_power_cut(tmp_path: Path) -> None:
    """Of a build, of one over an earlier one, of an adapter and of a merge."""
    for _ in range(2):
        with recorded(tmp_path) as recorder:
            small(tmp_path / "deep" / "artifact")
        survives(recorder, tmp_path / "deep" / "artifact")
    model = awake(tmp_path / "deep" / "artifact", lora={"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj"]})
    with recorded(tmp_path) as recorder:
        solidify.save_adapter(model, tmp_path / "adapter")
    survives(recorder, tmp_path / "adapter")
    with recorded(tmp_path) as recorder:
        export.merge(tmp_path / "adapter", tmp_path / "merged")
    survives(recorder, tmp_path / "merged")


def test_a_power_cut_is_noticed_where_nothing_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: without the syncs, the recorder says what would be lost."""
    monkeypatch.setattr(disk, "sync_tree", lambda directory: None)
    with recorded(tmp_path) as recorder:
        small(tmp_path / "artifact")
    assert any("model.safetensors" in lost for lost in recorder.lost)


def test_new_directories_above_an_output_survive_too(tmp_path: Path) -> None:
    with recorded(tmp_path) as recorder, writing.staged(tmp_path / "a" / "b" / "out") as staging:
        (staging / "x").write_text("x")
    survives(recorder, tmp_path / "a" / "b" / "out")
    assert {str(tmp_path / "a"), str(tmp_path)} <= {path for kind, path in recorder.events if kind == "fsync"}


def test_a_report_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("old")
    with recorded(tmp_path) as recorder:
        report.write(tmp_path / "report.json", finished=False)
    survives(recorder, tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json")["subject"] == "old"

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut)  # the last moment before the new one stands
    with pytest.raises(KeyboardInterrupt):
        Report("new").write(tmp_path / "report.json", finished=True)
    assert Report.read(tmp_path / "report.json")["subject"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_system_sees_the_syncs(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from solidify.directory import writing\n"
        "with writing.staged(Path(sys.argv[1])) as staging: (staging / 'weights').write_text('x')\n"
    )
    command = ["strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", str(tmp_path / "trace")]
    done = subprocess.run(
        [*command, sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True
    )
    if done.returncode and "ptrace" in done.stderr:
        pytest.skip("tracing is not allowed here")
    assert done.returncode == 0, done.stderr
    lines = [line for line in (tmp_path / "trace").read_text().splitlines() if str(tmp_path) in line]
    named = next(number for number, line in enumerate(lines) if "rename" in line and f'{tmp_path}/out"' in line)
    assert any("fsync" in line and "/weights>" in line for line in lines[:named])
    assert any("fsync" in line and ".out.partial-" in line and "/weights" not in line for line in lines[:named])
    assert any("fsync" in line and f"<{tmp_path}>" in line for line in lines[named:])


HOLDER = (
    "import sys, time; from solidify.system import disk\n"
    "with disk.temporary() as directory:\n"
    "    (directory / 'big').write_text('x'); print(directory, flush=True); time.sleep(60)\n"
)


def test_temporary_directories_of_the_dead_are_swept_and_those_of_the_living_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    foreign = [tmp_path / f"{disk.PREFIX}{name}" for name in ("theirs", "999999999-x")]  # whose, nothing says
    for directory in foreign:
        directory.mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    living, dying = (
        subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    )
    try:
        alive, dead = (Path(process.stdout.readline().strip()) for process in (living, dying) if process.stdout)
        dying.kill()
        dying.wait()
        assert dead.is_dir()
        with disk.temporary() as own:
            assert not dead.exists()
            assert (alive / "big").is_file()
            disk.sweep()
            assert own.is_dir()
        assert not own.exists()
        assert all(directory.is_dir() for directory in foreign)
    finally:
        for process in (living, dying):
            process.kill()
            process.communicate()


def test_a_link_that_calls_itself_temporary_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / disk.LOCK).write_text("1\n")
    (tmp_path / "tmp" / f"{disk.PREFIX}1-x").symlink_to(tmp_path / "mine")
    disk.sweep()
    assert (tmp_path / "mine" / disk.LOCK).is_file()


def test_data_that_travels_with_code_is_unpacked_into_a_held_directory(tmp_path: Path) -> None:
    """An artifact's own code is apart from solidify: what it leaves when it is killed is known all the same."""
    from solidify.source import payload

    text = payload._CARRIER.format(title="Data.", imports="", files="", package="", seat="'x.py'", anchors="")
    (tmp_path / "carrier.py").write_text(text)
    script = "import sys, time; sys.path.insert(0, sys.argv[1]); import carrier; print(carrier.DIRECTORY, flush=True)"
    script += "; time.sleep(60)"
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        directory = Path(process.stdout.readline().strip())
        assert not disk.abandoned(directory)
    finally:
        process.kill()
        process.communicate()
    assert disk.abandoned(directory)
