"""Digests of the tensors of a directory, computed from the first moment of a command on, beside its imports.

The disk has then delivered most of a large model when the command begins its work, and no byte is read twice. Needs no
torch. What is found is used (`digest_cache.py`) for a tensor that a checked header puts at the same bytes of a file
that has not changed since; nothing else is taken from here.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from solidify.errors import ArtifactError
from solidify.system import files
from solidify.weights import hashing, header
from solidify.weights.direct import Source

WORKERS = min(4, os.cpu_count() or 1)  # copying and digesting release the interpreter's lock
TICK = 50_000_000  # nanoseconds; longer than the clock's steps in file systems
_ODD = (ArithmeticError, struct.error)  # numbers in a header that are none, or that end too soon
_MOST = 10_000  # tensors; of those that are left, which are small, each costs more to announce than to read
State = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A tensor's bytes in a file of some state, and what torch calls its dtype and shape."""

    path: Path
    state: State
    start: int
    count: int
    dtype: str
    sizes: tuple[int, ...]


_begun: dict[Part, Future[str | None]] = {}


@contextmanager
def begun(directory: Path) -> Iterator[None]:
    """Digests the tensors of the weight files that a manifest lists while the block lasts, the largest first.

    No other file is opened: what is not listed is refused before it is read. What cannot be read is left to those who
    read it for themselves, and say why it cannot.
    """
    parts = sorted(_list_parts(directory), key=lambda part: -part.count)[:_MOST]
    stopped = threading.Event()
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="digesting")
    _begun.update({part: pool.submit(_digest_part, part, stopped) for part in parts})
    try:
        yield
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        for part in parts:
            _begun.pop(part, None)


def find(part: Part) -> Future[str | None] | None:
    """Returns the digest of a tensor, which may still be computed; None where nobody has begun with it.

    The digest itself is None where it could not be computed.
    """
    return _begun.get(part)


def state_of(found: os.stat_result) -> State:
    """Returns the same of what the system said of a file."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest_part(part: Part, stopped: threading.Event) -> str | None:
    """Returns the digest; None where the file is another by now, cannot be read, or nobody waits for it."""
    hasher = hashing.tensor_hasher(part.dtype, part.sizes)
    with suppress(ArtifactError, OSError), Source(part.path, "a tensor") as source:
        if state_of(source.stat()) != part.state:
            return None
        for piece in source.pieces(part.start, part.count):
            if stopped.is_set():
                return None
            hasher.update(piece)
        return hasher.hexdigest()
    return None


def _list_parts(directory: Path) -> Iterator[Part]:
    """Yields what the headers of a directory's listed files speak of; of a file that was just changed, nothing."""
    with suppress(OSError, RuntimeError, ArtifactError):  # as of links that lead in a circle
        headers = files.document(directory / "solidify.json").get("headers")
        listed = headers if isinstance(headers, dict) else {}
        for path in sorted(directory.resolve().glob("*.safetensors")):
            if path.name not in listed:
                continue
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, *_ODD):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode) and time.time_ns() - found.st_ctime_ns > TICK:
                    yield from _read_parts(path, state_of(found))


def _read_parts(path: Path, state: State) -> list[Part]:
    with path.open("rb") as file:
        tensors, begin = header.read(file, os.fstat(file.fileno()).st_size)
    parts = []
    for values in tensors.values():
        start, end = map(int, values["data_offsets"])
        sizes = tuple(map(int, values["shape"]))
        parts.append(Part(path, state, begin + start, end - start, header.DTYPE_NAMES[values["dtype"]], sizes))
    return parts
