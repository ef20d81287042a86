"""Files that stay as they are: linked where the file system allows it, else copied by the kernel."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from solidify.errors import ArtifactError, refuse
from solidify.weights import digest_cache, direct, format
from solidify.weights.format import Entry

try:
    import fcntl
except ImportError:  # a system without them shares no blocks either
    fcntl = None  # type: ignore[assignment]

_CLONE = 0x40049409  # FICLONE of linux/fs.h, ioctl_ficlone(2)
_PART = 2**28  # bytes of a large file that one thread copies


def link_or_copy(source: Path, target: Path, *, link: bool) -> bool:
    """Puts a file at another path, linked if that is wanted and possible, else copied; returns whether it is linked.

    A link is the same file under a second name: who writes into one of them writes into both. Nothing here ever does.

    Raises:
        ArtifactError: the file cannot be read, or there is no room.
    """
    source = source.resolve()  # in the hub's cache, files are symbolic links into a store
    at_first = source.stat()
    noted = digest_cache.recall(source)
    if link:
        try:
            with digest_cache.kept([source]):
                os.link(source, target)
        except OSError:  # another file system, one without links, or a file that is not ours to link
            link = False
    if not link:
        _copy_bytes(source, target)
    if noted is not None and not link and not digest_cache.touched(source, at_first):
        digest_cache.remember(target, noted)
    return link


def copied(files: Iterable[Path], directory: Path, *, link: bool) -> list[Path]:
    """Returns which of some files will surely be copied when they are put into a directory."""
    return [path for path in files if not link or path.stat().st_dev != directory.stat().st_dev]


def read_state(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is written to, but not when it is linked."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def refuse_other(at_first: Mapping[Path, os.stat_result], copies: Iterable[tuple[Path, Entry, str]]) -> None:
    """Makes sure of copies that were given a digest that was known: of a file that was touched since, they are read.

    Each copy is the file that it was taken from, where it stands now, and its digest. A link that another program makes
    touches a file, too.

    Raises:
        ArtifactError: one is not what was known.
    """
    touched = {path for path, state in at_first.items() if digest_cache.touched(path, state)}
    faults = {path for path, entry, digest in copies if path in touched and entry.digest() != digest}
    refuse(
        ArtifactError,
        "an input changed while it was read, so nothing was written; start again when no other program writes to it",
        [f"{path} was written to while it was read" for path in sorted(faults)],
    )


def _copy_bytes(source: Path, target: Path) -> None:
    size = source.stat().st_size
    try:
        if size < direct.LARGE:
            _copy_by_kernel(source, target, size)
        elif not _clone_blocks(source, target):
            _copy_past_cache(source, target, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise format.unwritten(error, target, size) from error
        raise ArtifactError(f"{source} cannot be copied to {target}: {error.strerror}") from error


def _copy_by_kernel(source: Path, target: Path, size: int) -> None:
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while size:
                count = os.copy_file_range(reader.fileno(), writer.fileno(), min(size, 2**30))
                if not count:
                    raise ArtifactError(f"{source} became shorter while it was copied")
                size -= count
    except (OSError, AttributeError):  # not between these file systems, or not on this system
        shutil.copyfile(source, target)


def _clone_blocks(source: Path, target: Path) -> bool:
    """Has a new file share the blocks of another (as `cp --reflink` does); returns whether the file system could."""
    if fcntl is None:
        return False
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _CLONE, reader.fileno())
        except OSError:
            return False
    return True


def _copy_past_cache(source: Path, target: Path, size: int) -> None:
    with direct.Target(target, size) as writer:

        def copy(begin: int) -> None:
            """Copies one part."""
            stream = writer.stream(begin)
            with direct.Source(source, "what is copied") as reader:
                for piece in reader.pieces(begin, min(_PART, size - begin)):
                    stream.put(piece)
            stream.finish()

        list(format.in_parallel(copy, range(0, size, _PART)))
