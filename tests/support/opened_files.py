"""Which files are opened, by whomever: as Linux tells (inotify), so that no hook stays in the process."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_OPENED, _OVERFLOWN, _ONLY_DIRECTORY, _OF_DIRECTORY = 0x20, 0x4000, 0x01000000, 0x40000000  # of <sys/inotify.h>
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name behind it


@contextmanager
def opened(*directories: Path) -> Iterator[list[str]]:
    """Gives a list to which, when the block ends, the names of the files come that were opened in directories and in
    those within them."""
    if sys.platform != "linux":
        pytest.skip("only Linux tells which files are opened")
    system, found = ctypes.CDLL(None, use_errno=True), list[str]()
    queue = system.inotify_init1(os.O_NONBLOCK)
    assert queue >= 0
    try:
        within = {Path(folder) for directory in directories for folder, _, _ in os.walk(directory)}
        for folder in within:
            assert system.inotify_add_watch(queue, os.fsencode(folder), _OPENED | _ONLY_DIRECTORY) >= 0
        try:
            yield found
        finally:
            found += _read_names(queue)
    finally:
        os.close(queue)


def _read_names(queue: int) -> Iterator[str]:
    while True:
        try:
            content = os.read(queue, 2**16)
        except BlockingIOError:
            return
        while content:
            _, mask, _, length = _EVENT.unpack_from(content)
            assert not mask & _OVERFLOWN
            name = content[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
            content = content[_EVENT.size + length :]
            if not mask & _OF_DIRECTORY and name:
                yield os.fsdecode(name)
