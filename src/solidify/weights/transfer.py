"""Files that stay as they are: linked where the file system allows it, else copied by the kernel."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from solidify.errors import ArtifactError
from solidify.weights import digest_cache, format


def link_or_copy(source: Path, target: Path, *, link: bool) -> bool:
    """Puts a file at another path, linked if that is wanted and possible, else copied; returns whether it is linked.

    A link is the same file under a second name: who writes into one of them writes into both. Nothing here ever does.

    Raises:
        ArtifactError: the file cannot be read, or there is no room.
    """
    source = source.resolve()  # in the hub's cache, files are symbolic links into a store
    noted = digest_cache.recall(source)
    before = read_state(source)
    if link:
        try:
            os.link(source, target)
        except OSError:  # another file system, one without links, or a file that is not ours to link
            link = False
    if not link:
        _copy_bytes(source, target)
    if noted is not None and not link and read_state(source) == before:
        digest_cache.remember(target, noted)
    return link


def copied(files: Iterable[Path], directory: Path, *, link: bool) -> list[Path]:
    """Returns which of some files will surely be copied when they are put into a directory."""
    return [path for path in files if not link or path.stat().st_dev != directory.stat().st_dev]


def read_state(path: Path) -> tuple[int, int]:
    """Returns what changes when a file is written to, but not when it is linked."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _copy_bytes(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            left = os.fstat(reader.fileno()).st_size
            while left:
                count = os.copy_file_range(reader.fileno(), writer.fileno(), min(left, 2**30))
                if not count:
                    raise ArtifactError(f"{source} became shorter while it was copied")
                left -= count
    except (OSError, AttributeError):  # not between these file systems, or not on this system
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise format.unwritten(error, target, source.stat().st_size) from error
            raise ArtifactError(f"{source} cannot be copied to {target}: {error.strerror}") from error
