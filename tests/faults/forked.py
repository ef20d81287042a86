"""Runs commands of solidify in forks of one process that has imported everything, and interferes with them.

Reads jobs (JSON, one in a line) from its standard input, runs each in a child, and answers each with a line: exit code
(negative: the signal that ended it), what it printed, and the kinds of the changes of files that it made or was about
to make. Its arguments are recipes that are built first, so that what is computed once is there for every child.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

torch.set_num_threads(1)

import solidify.__main__  # noqa: E402
from solidify.artifact import certificate, inspection  # noqa: E402, F401
from solidify.findings import Finding  # noqa: E402
from solidify.merging import export  # noqa: E402, F401
from solidify.model import anatomy  # noqa: E402
from solidify.recipe import models, stages  # noqa: E402, F401  # what takes the time to import
from solidify.recipe.schema import load  # noqa: E402
from solidify.system import console  # noqa: E402

_CHANGES = {"os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.truncate", "subprocess.Popen"}
_GROWING = {"os.mkdir", "os.link", "os.truncate", "open", "pwrite"}
_NEW_NAMESPACE = 0x20000  # CLONE_NEWNS of Linux


def _kind(event: str, place: str) -> str:
    """Says what a change is, whichever process makes it; files of one purpose are of one kind."""
    parts = re.sub(r"-\d+(?=/|$)", "", place).split("/")
    if parts[1] == "cache" or event in ("os.remove", "os.rmdir"):
        return f"{event} {'/'.join(parts[:3])}"
    return f"{event} {'/'.join([*parts[:-1], re.sub(r'[^.]+(?=[.])', '', parts[-1])])}"


class Interference:
    """Counts the changes that a process makes below some directories, and ends or fails it at one of them."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.seen: list[str] = []
        self.full = False
        self.lock = threading.RLock()
        self.pwrite, self.kept = os.pwrite, os.open(job["log"], os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(self.hook)
        os.pwrite = self.writing

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.point(event, arguments[0])
        elif event in ("os.remove", "os.rmdir"):
            self.point(event, *arguments)
        elif event in _CHANGES:
            self.point(event, arguments[1] if event in ("os.link", "os.rename") else arguments[0])

    def writing(self, descriptor: int, *rest: Any) -> int:
        self.point("pwrite", os.readlink(f"/proc/self/fd/{descriptor}"))
        return self.pwrite(descriptor, *rest)

    def point(self, event: str, place: Any, above: int | None = None) -> None:
        place = os.fsdecode(place) if isinstance(place, (str, bytes, os.PathLike)) else ""
        if above is not None and above >= 0:
            place = f"{os.readlink(f'/proc/self/fd/{above}')}/{place}"
        if event != "subprocess.Popen" and not place.startswith(f"{self.job['below']}/"):
            return
        if event == "os.mkdir" and Path(place).is_dir():
            return
        with self.lock:
            kind = _kind(event, place.removeprefix(self.job["below"]))
            self.seen.append(kind)
            os.write(self.kept, f"{kind}\n".encode())
            if [kind, self.seen.count(kind)] == self.job.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            self.full |= [kind, self.seen.count(kind)] == self.job.get("full")
            if self.full and event in _GROWING:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)


def leave_out_witness() -> None:
    """Has no fresh process look at what was written: it takes seconds."""
    certificate.witness = lambda *_: [Finding("left out", True, "")]
    certificate.Alone.__enter__ = lambda self: self  # type: ignore[method-assign]
    certificate.Alone.__exit__ = lambda *_: None  # type: ignore[method-assign]


def warm_up(recipe: str) -> None:
    """Does a build as the children will do it."""
    fresh = certificate.witness, certificate.Alone.__enter__, certificate.Alone.__exit__
    leave_out_witness()
    with tempfile.TemporaryDirectory() as directory, console.silence(), patch.object(anatomy, "LARGE", 0):
        stages.plan(load(Path(recipe)))
        stages.build(load(Path(recipe)), Path(directory))
    certificate.witness, certificate.Alone.__enter__, certificate.Alone.__exit__ = fresh  # type: ignore[method-assign]


def run(job: dict[str, Any]) -> None:
    """Does one job; does not return."""
    code = 70
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if job.get("mounts"):
            system = ctypes.CDLL(None, use_errno=True)
            if system.unshare(_NEW_NAMESPACE):
                os._exit(77)
            for command in ("mount --make-rprivate /", *job["mounts"]):
                if os.system(f"{command} >/dev/null 2>&1"):
                    os._exit(77)
        if job.get("large", True):
            anatomy.LARGE = 0
        if not job.get("witness"):
            leave_out_witness()
        if job.get("before"):
            exec(job["before"], {})
        Interference(job)
        sys.argv = ["solidify", *job["words"]]
        solidify.__main__.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        if job.get("list"):
            print("left:", *sorted(os.listdir(job["list"])), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Answers jobs until the standard input ends."""
    words = sys.stdout
    for recipe in sys.argv[1:]:
        warm_up(recipe)
    gc.freeze()  # what is there stays shared with every child
    for line in sys.stdin:
        job = json.loads(line)
        scratch = Path(tempfile.mkdtemp())
        job |= {name: str(scratch / name) for name in ("out", "err", "log")}
        child = os.fork()
        if not child:
            run(job)
        _, status = os.waitpid(child, 0)
        answer = {name: (scratch / name).read_text() if (scratch / name).exists() else "" for name in ("out", "err")}
        log = (scratch / "log").read_text().splitlines() if (scratch / "log").exists() else []
        shutil.rmtree(scratch)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), **answer, "changes": log}), file=words, flush=True)


if __name__ == "__main__":
    main()
