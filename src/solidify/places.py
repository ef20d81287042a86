"""Where solidify keeps and puts things: its cache, and output directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        ArtifactError: `output` exists and is not ours.
    """
    refuse_foreign(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    staging = output.parent / f".{output.name}.partial-{os.getpid()}"
    staging.mkdir()
    try:
        yield staging
        old = output.parent / f".{output.name}.replaced-{os.getpid()}"
        if output.exists():
            output.rename(old)
        staging.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """Yields a directory beside `output`, on its file system, that is gone when the block ends."""
    output.parent.mkdir(parents=True, exist_ok=True)
    _sweep(output)
    directory = output.parent / f".{output.name}.scratch-{os.getpid()}"
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _sweep(output: Path) -> None:
    """Removes what runs that were killed left beside `output`; a result that was about to be replaced goes back."""
    for left in output.parent.glob(f".{output.name}.*-*"):
        kind, _, process = left.name.removeprefix(f".{output.name}.").rpartition("-")
        if not process.isdigit() or kind not in ("partial", "replaced", "scratch") or _alive(int(process)):
            continue
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
