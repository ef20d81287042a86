"""Measures commands: wall time and the peak memory of the process and all of its descendants (Linux)."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL = 0.02


@dataclass(frozen=True)
class Measurement:
    """What one run of a command took.

    `imports` are the seconds that it needed before it began to work; `flushed` those until all that it had written was
    on the disk. `resident` is the largest peak of any one process of the tree, with the pages of files that it mapped;
    `private` is the peak of what all of its processes held together without those pages, which the kernel can drop.
    """

    seconds: float
    imports: float
    flushed: float
    resident: int
    private: int


class CommandFailed(Exception):
    """A command that was to be measured ended with an error; the message has the end of what it wrote."""


def measure(
    command: Sequence[str | Path], *, imports: str = "", environment: Mapping[str, str] | None = None
) -> Measurement:
    """Runs a command after everything written so far has reached the disk; its output is shown only if it fails.

    `imports` are modules, between commas, that a Python command needs: they are imported first, and that is timed.
    """
    if imports:
        command = [command[0], Path(__file__).with_name("imported.py"), imports, *command[1:]]
    os.sync()
    with tempfile.TemporaryFile("w+") as output, tempfile.NamedTemporaryFile("w+") as note:
        passed = {"BENCHMARK_IMPORTS": note.name, "BENCHMARK_START": str(time.time())} if imports else {}
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {}), **passed},
        )
        resident, private = _watch(process)
        seconds = time.perf_counter() - start
        os.sync()
        flushed = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            words = " ".join(map(str, command))
            raise CommandFailed(f"exit code {process.returncode}: {words}\n{output.read()[-4000:]}")
        return Measurement(seconds, float(note.read() or 0), flushed, resident, private)


def _watch(process: subprocess.Popen[Any]) -> tuple[int, int]:
    """Waits until a process ends; returns the peaks of its tree."""
    resident = private = 0
    ended = os.pidfd_open(process.pid)
    try:
        while process.poll() is None:
            found = [_memory(number) for number in _tree(process.pid)]
            resident = max(resident, *(peak for peak, _ in found))
            private = max(private, sum(held for _, held in found))
            select.select([ended], [], [], INTERVAL)
    finally:
        os.close(ended)
        process.kill()  # does nothing to one that has ended
    return resident, private


def forget(directories: Iterable[Path]) -> None:
    """Takes the files of directories out of the page cache, so that they are next read from the disk."""
    os.sync()
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remember(directories: Iterable[Path]) -> None:
    """Reads the files of directories, so that they are next read from the page cache."""
    buffer = bytearray(1 << 24)
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _tree(root: int) -> list[int]:
    """Returns a process and its descendants."""
    found = [root]
    for number in found:
        for task in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it has ended
                continue
    return found


def _memory(number: int) -> tuple[int, int]:
    """Returns a process's peak resident memory and what it holds now outside of files, in bytes."""
    try:
        lines = Path(f"/proc/{number}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0, 0
    sizes = {
        name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
    return sizes.get("VmHWM", 0), sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)


if __name__ == "__main__":  # python benchmarks/processes.py COMMAND...: for a look at one command
    taken = measure(sys.argv[1:])
    print(
        f"{taken.seconds:.2f} s, {taken.flushed:.2f} s with flushing, {taken.resident / 1e9:.2f} GB resident at most",
        end="",
    )
    print(f", {taken.private / 1e9:.2f} GB of it outside files")
