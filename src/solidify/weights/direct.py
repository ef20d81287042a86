"""Direct I/O: large files pass between disk and memory without a copy of them in the page cache.

A copy through the cache keeps a core busy for longer than a solid-state disk takes (figures: docs/benchmarks.md). Linux
can do without (`O_DIRECT`, open(2)); it wants offsets, sizes and addresses at whole blocks: what lies before the
first and behind the last whole block goes through the cache. Where a system or a file system cannot, all of it does.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from solidify.errors import ArtifactError

LARGE = 2**29  # bytes; files from this size on are read and written past the cache
STEP = 2**25  # bytes that the disk is asked for at a time
_BLOCK = 4096  # bytes; no disk asks for more
_LITTLE = 2**20  # bytes; less is not worth an alignment
_FLAG = getattr(os, "O_DIRECT", 0)
_CLOSED = getattr(os, "O_CLOEXEC", 0)
_CACHED = getattr(os, "RWF_NOWAIT", 0)  # of preadv(2): give what is in the cache, and wait for nothing


class Source:
    """A file of which a part is read (`what`, in errors): from the page cache, and what of a large file is not in it,
    past it, unless that is to be kept.

    Raises:
        ArtifactError: the file cannot be read, or ends within the part.
    """

    def __init__(self, path: Path, what: str, *, keep: bool = False) -> None:
        self.path, self._what, self._keep = path, what, keep
        self._direct: int | None = None

    def __enter__(self) -> Source:
        with self._telling():
            self._plain = os.open(self.path, os.O_RDONLY | _CLOSED)
        if not self._keep and os.fstat(self._plain).st_size >= LARGE:
            self._direct = _open_direct(self.path, os.O_RDONLY)
        return self

    def __exit__(self, _type: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def stat(self) -> os.stat_result:
        """Returns what the system says of the very file that is read."""
        return os.fstat(self._plain)

    def pieces(self, start: int, count: int) -> Iterator[memoryview]:
        """Yields so many bytes from an offset on, a step at a time; each piece is valid until the next."""
        end = start + count
        with _lent(min(STEP, count)) as buffer:
            while start < end:
                with self._telling():
                    piece = self._read(buffer, start, min(STEP, end - start))
                if not piece:
                    raise self._short()
                yield piece
                start += len(piece)

    def fill(self, target: memoryview, start: int) -> None:
        """Fills a buffer from an offset on."""
        done = 0
        if self._direct is not None and len(target) >= _LITTLE:
            for piece in self.pieces(start, len(target)):
                target[done : done + len(piece)] = piece
                done += len(piece)
        while done < len(target):
            with self._telling():
                count = os.preadv(self._plain, [target[done:]], start + done)
            if not count:
                raise self._short()
            done += count

    @property
    def descriptor(self) -> int:
        """The file's number for reading through the cache."""
        return self._plain

    def _short(self) -> ArtifactError:
        return ArtifactError(f"{self.path} ends within {self._what}: it is truncated")

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(f"{self.path} cannot be read: {error.strerror}") from error

    def _read(self, buffer: memoryview, start: int, count: int) -> memoryview:
        """Reads what it can of some bytes into a buffer of whole blocks, and returns the part that holds them."""
        if self._direct is None or count < _LITTLE:
            return buffer[: os.preadv(self._plain, [buffer[:count]], start)]
        if _CACHED:
            with suppress(OSError):  # nothing is cached, or the file system cannot say
                if found := os.preadv(self._plain, [buffer[:count]], start, _CACHED):
                    return buffer[:found]
        before = start % _BLOCK
        try:
            found = os.preadv(self._direct, [buffer[: _up(before + count)]], start - before)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return buffer[: os.preadv(self._plain, [buffer[:count]], start)]
        return buffer[before : min(found, before + count)]


class Target:
    """A file of known size that several threads write, each its own parts."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._direct: int | None = None
        self._own = threading.local()

    def __enter__(self) -> Target:
        self._plain = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | _CLOSED, 0o666)
        try:
            if self.size >= LARGE:
                self._direct = _open_direct(self.path, os.O_WRONLY)
            if self._direct is not None:
                _reserve(self._plain, self.size)
            os.truncate(self._plain, self.size)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, _type: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    @property
    def descriptor(self) -> int:
        """The file's number for writing through the cache."""
        return self._plain

    def stream(self, offset: int) -> Stream:
        """Returns what writes one part, from an offset on."""
        return Stream(self, offset)

    def write(self, memory: memoryview, offset: int) -> None:
        """Writes through the cache."""
        while memory:
            done = os.pwrite(self._plain, memory, offset)
            memory, offset = memory[done:], offset + done

    def write_blocks(self, memory: memoryview, offset: int) -> None:
        """Writes whole blocks, past the cache where that is possible."""
        while memory and self._direct is not None:
            try:
                done = os.pwrite(self._direct, memory, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break
            memory, offset = memory[done:], offset + done
            if done % _BLOCK:
                break
        self.write(memory, offset)

    def buffer(self) -> memoryview:
        """Returns memory at whole blocks, of this thread alone."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(mmap.mmap(-1, STEP))
        found: memoryview = self._own.buffer
        return found

    @property
    def past_cache(self) -> bool:
        """Whether whole blocks go past the cache."""
        return self._direct is not None


class Stream:
    """One part of a file, written from its begin to its end by one thread: put all of it, and `finish`."""

    def __init__(self, target: Target, offset: int) -> None:
        self._target, self._offset, self._rest = target, offset, b""

    def put(self, memory: memoryview) -> None:
        """Writes the next bytes; what is less than a block waits for the next ones."""
        if not self._target.past_cache:
            self._target.write(memory, self._offset)
            self._offset += len(memory)
            return
        if not self._rest and (before := -self._offset % _BLOCK):
            head = memory[:before]
            self._target.write(head, self._offset)
            memory, self._offset = memory[len(head) :], self._offset + len(head)
        while memory:
            buffer, held = self._target.buffer(), len(self._rest)
            part = memory[: STEP - held]
            buffer[:held], buffer[held : held + len(part)] = self._rest, part
            whole = (held + len(part)) // _BLOCK * _BLOCK
            self._target.write_blocks(buffer[:whole], self._offset)
            self._rest = bytes(buffer[whole : held + len(part)])
            memory, self._offset = memory[len(part) :], self._offset + whole

    def finish(self) -> None:
        """Writes what waits."""
        self._target.write(memoryview(self._rest), self._offset)
        self._offset, self._rest = self._offset + len(self._rest), b""


_free: list[memoryview] = []  # buffers for whole steps: memory that was never written to costs a fault for each page


@contextmanager
def _lent(count: int) -> Iterator[memoryview]:
    """Lends memory at whole blocks, for so many bytes from anywhere in a block on."""
    if count < STEP:
        yield memoryview(mmap.mmap(-1, _up(count) + _BLOCK))
        return
    try:
        buffer = _free.pop()
    except IndexError:
        buffer = memoryview(mmap.mmap(-1, STEP + _BLOCK))
    try:
        yield buffer
    finally:
        _free.append(buffer)


def _up(count: int) -> int:
    return -(-count // _BLOCK) * _BLOCK


def _open_direct(path: Path, flags: int) -> int | None:
    """Opens a file for direct I/O; None where there is none."""
    if not _FLAG:
        return None
    with suppress(OSError):
        return os.open(path, flags | _FLAG | _CLOSED)
    return None


def _reserve(descriptor: int, size: int) -> None:
    """Has the file system set its blocks aside at once, which makes them lie together; it may not know how.

    `os.posix_fallocate` would write to every block where it does not.

    Raises:
        OSError: there is no room.
    """
    try:
        reserve = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return
    reserve.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if reserve(descriptor, 0, 0, size) and (number := ctypes.get_errno()) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
        raise OSError(number, os.strerror(number))
