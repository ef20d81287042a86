"""Where solidify keeps and puts things: its cache, and output directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from solidify import console
from solidify.errors import ArtifactError, SolidifyError

# A directory with one of these files was made by solidify and may be replaced by a newer one.
MARKERS = ("solidify.json", "report.json")
_HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|scratch)-(\d+)")
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD
_used: set[Path] = set()  # hidden directories of this process


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
    if output.is_dir() and (all(map(_left, output.iterdir())) or any((output / m).is_file() for m in MARKERS)):
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
        output = output.resolve()
        try:
            _put(staging, output)
        except OSError as error:
            raise ArtifactError(f"{output} cannot be put in its place: {error.strerror}") from error


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """Yields a directory beside `output`, on its file system, that is gone when the block ends.

    Raises:
        ArtifactError: `output` exists and is not ours, another process writes it now, or its place cannot be written.
    """
    refuse_foreign(output)
    with _beside(output, "scratch") as directory:
        yield directory


@contextmanager
def _beside(output: Path, kind: str) -> Iterator[Path]:
    """Yields a hidden directory beside `output` while no other process writes there; it does not outlive the block."""
    output = output.resolve()  # one place has one name, whatever links lead to it
    directory = output.parent / f".{output.name}.{kind}-{os.getpid()}"
    with _alone(output):
        made: list[Path] = []
        try:
            made = [parent for parent in output.parents if not parent.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            _sweep(output)
            directory.mkdir()
        except OSError as error:
            _remove(made)
            raise ArtifactError(f"{output.parent} cannot be written to: {error.strerror}") from error
        _used.add(directory)
        try:
            yield directory
        except Exception as error:
            words = None if isinstance(error, SolidifyError) else _words(error, directory)
            if words is None:
                raise
            raise ArtifactError(words) from error
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            _used.discard(directory)
            _remove(made)


def _words(error: Exception, directory: Path) -> str | None:
    """Says what hinders the writing into a hidden directory; None if that is not what went wrong."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and tokenizers say it in words alone.
    if number in numbers or (number is None and any(f"(os error {full})" in str(error) for full in numbers)):
        files = [path for path in directory.rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
        return (
            f"{directory.parent} became full: {console.size(written)} were written, and "
            f"{console.size(shutil.disk_usage(directory).free)} are free; make room, or choose another output"
        )
    if isinstance(error, OSError) and directory in Path(os.fsdecode(error.filename or "")).parents:
        return f"{error.filename} cannot be written: {error.strerror}; choose another output"
    return None


def _put(staging: Path, output: Path) -> None:
    """Gives a finished directory its name; where the system can, what stood there changes places with it at once."""
    if not output.exists():
        staging.rename(output)
    elif not _exchanged(staging, output):
        old = output.parent / f".{output.name}.replaced-{os.getpid()}"
        output.rename(old)
        staging.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchanges two names in one step; returns whether the system did so."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    return bool(exchange(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0)


def _remove(made: list[Path]) -> None:
    """Removes directories that were made, as far as they are empty."""
    with suppress(OSError):
        for directory in made:
            directory.rmdir()


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps other processes from writing an output; the system ends that with the process, however it dies."""
    name = hashlib.sha256(os.fsencode(output)).hexdigest()[:16]
    locks = cache() / "locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        held = FileLock(locks / name, is_singleton=True).acquire(timeout=0)
    except Timeout as error:
        raise ArtifactError(f"another process is writing {output} now; wait for it, or name another output") from error
    except OSError as error:
        raise ArtifactError(
            f"{locks} cannot be written to: {error.strerror}; say with SOLIDIFY_HOME where solidify may keep its cache"
        ) from error
    with held:
        yield


def _sweep(output: Path) -> None:
    """Removes what runs that were killed left beside `output`; a result that was about to be replaced goes back."""
    for left in [path for path in output.parent.iterdir() if _left(path)]:
        found = _HIDDEN.fullmatch(left.name)
        assert found is not None
        if found[1] != output.name:
            continue
        if found[2] == "replaced" and not output.exists():
            left.rename(output)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _left(path: Path) -> bool:
    """Returns whether a path is a hidden directory that a run has left which is over."""
    found = _HIDDEN.fullmatch(path.name)
    return found is not None and path not in _used and not _alive(int(found[3]))


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
