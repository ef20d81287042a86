"""Where solidify keeps and puts things: its cache, and output directories that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from solidify.errors import ArtifactError

# A directory with one of these files was made by solidify and may be replaced by a newer one.
MARKERS = ("solidify.json", "report.json")


def cache() -> Path:
    """Returns the user's cache directory for solidify (`SOLIDIFY_HOME`, else under `XDG_CACHE_HOME` or ~/.cache)."""
    home = os.environ.get("SOLIDIFY_HOME")
    if home:
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solidify"


def refuse_foreign(output: Path) -> None:
    """Raises ArtifactError when `output` exists and was not made by solidify: nothing of the user's is overwritten."""
    if not output.exists() and not output.is_symlink():
        return
    if output.is_dir() and (not any(output.iterdir()) or any((output / m).is_file() for m in MARKERS)):
        return
    what = "a directory that solidify did not make" if output.is_dir() else "not a directory"
    raise ArtifactError(f"the output {output} exists and is {what}; name another, or remove it first")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yields a directory beside `output` that takes its name when the block ends without an error.

    What stood at `output` before (an earlier result of ours) is replaced in the same moment.

    Raises:
        ArtifactError: `output` exists and is not ours, another process writes it now, or its place cannot be written.
    """
    refuse_foreign(output)
    with _beside(output, "partial") as staging:
        yield staging
        old = output.parent / f".{output.name}.replaced-{os.getpid()}"
        if output.exists():
            output.rename(old)
        staging.rename(output)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """Yields a directory beside `output`, on its file system, that is gone when the block ends.

    Raises:
        ArtifactError: another process writes `output` now, or its place cannot be written.
    """
    with _beside(output, "scratch") as directory:
        yield directory


@contextmanager
def _beside(output: Path, kind: str) -> Iterator[Path]:
    """Yields a hidden directory beside `output` while no other process writes there; it does not outlive the block."""
    directory = output.parent / f".{output.name}.{kind}-{os.getpid()}"
    with _alone(output):
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            _sweep(output)
            directory.mkdir()
        except OSError as error:
            raise ArtifactError(f"{output.parent} cannot be written to: {error.strerror}") from error
        try:
            yield directory
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ArtifactError(f"{output.parent} is full; make room, or choose another output") from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps other processes from writing an output; the system ends that with the process, however it dies."""
    name = hashlib.sha256(os.fsencode(output.absolute())).hexdigest()[:16]
    try:
        (cache() / "locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache() / "locks" / name, is_singleton=True)
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        raise ArtifactError(f"another process is writing {output} now; wait for it, or name another output") from error


def _sweep(output: Path) -> None:
    """Removes what runs that were killed left beside `output`; a result that was about to be replaced goes back."""
    for left in output.parent.glob(f".{output.name}.*-*"):
        kind, _, process = left.name.removeprefix(f".{output.name}.").rpartition("-")
        if not process.isdigit() or kind not in ("partial", "replaced", "scratch") or _alive(int(process)):
            continue
        if kind == "scratch" and int(process) == os.getpid():
            continue  # it is in use
        if kind == "replaced" and not output.exists():
            left.rename(output)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
