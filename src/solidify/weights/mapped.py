"""Which tensors in memory are a part of a file, unchanged: the operating system's own word, without reading them.

A loader maps a file privately; a page that is written to becomes the process's own (anonymous) page. Where Linux says
that a mapping has no such page, what stands there is the file. Elsewhere nothing is known, and tensors are read.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_MAPS, _SMAPS, _STATM = Path("/proc/self/maps"), Path("/proc/self/smaps"), Path("/proc/self/statm")
_MUCH = 2**29  # bytes
_HEAD = r"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)$"
_FILES = re.compile(_HEAD, re.MULTILINE)
_LINES = r"\n(?:[A-Z].*\n)*?"  # what else is said of a mapping, as little as possible
_DETAILS = re.compile(rf"{_HEAD}{_LINES}Anonymous: +(\d+) kB{_LINES}Swap: +(\d+) kB$", re.MULTILINE)
_DONTNEED = 4  # MADV_DONTNEED of Linux


@dataclass(frozen=True)
class _Area:
    begin: int
    end: int
    offset: int
    inode: tuple[int, int]
    path: str
    own: int  # bytes that were written to, in memory or swapped out


class Maps:
    """The process's file mappings as they are now."""

    def __init__(self) -> None:
        self._spans = _read_spans()
        self._areas: list[_Area] | None = None  # read when a tensor stands in a file: the system looks at every page
        self._begins: list[int] = []
        self._same: dict[_Area, bool] = {}

    def find_region(self, tensor: torch.Tensor) -> tuple[Path, int] | None:
        """Returns the file of which a tensor is an unchanged part, and where in it; None where that is not known."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return None
        address = tensor.data_ptr()
        span = bisect.bisect_right(self._spans, (address, sys.maxsize)) - 1
        if span < 0 or address >= self._spans[span][1]:
            return None
        if self._areas is None:
            self._areas = sorted(_list_areas(), key=lambda area: area.begin)
            self._begins = [area.begin for area in self._areas]
        index = bisect.bisect_right(self._begins, address) - 1
        area = self._areas[index] if index >= 0 else None
        if area is None or address + tensor.nbytes > area.end or area.own or not self._is_mapped(area):
            return None
        return Path(area.path), area.offset + address - area.begin

    def _is_mapped(self, area: _Area) -> bool:
        """Returns whether the file of that name is still the one that is mapped."""
        if area not in self._same:
            try:
                found = os.stat(area.path)
            except OSError:
                self._same[area] = False
            else:
                self._same[area] = found.st_ino == area.inode[1] and found.st_dev == area.inode[0]
        return self._same[area]


def _read_spans() -> list[tuple[int, int]]:
    """Returns where files are mapped, in order."""
    if not _MAPS.is_file():
        return []
    text = _MAPS.read_text(encoding="utf-8", errors="surrogateescape")
    return sorted((int(found[0], 16), int(found[1], 16)) for found in _FILES.findall(text))


def _list_areas() -> Iterator[_Area]:
    if not _SMAPS.is_file():
        return
    yield from _read_areas(_SMAPS.read_text(encoding="utf-8", errors="surrogateescape"))


def _read_areas(text: str) -> Iterator[_Area]:
    """Yields the mappings of files that a text as of `smaps` lists."""
    for begin, end, offset, major, minor, inode, path, anonymous, swapped in _DETAILS.findall(text):
        device = os.makedev(int(major, 16), int(minor, 16))
        own = int(anonymous) + int(swapped)  # a page that was written to and swapped out is not anonymous any more
        yield _Area(int(begin, 16), int(end, 16), int(offset, 16), (device, int(inode)), path, own * 1024)


def release(modules: Sequence[nn.Module]) -> None:
    """Gives the memory of mapped parameters of some modules back, once files fill much of it.

    They are read again when they are used.
    """
    if _resident_files() >= _MUCH:
        release_tensors([parameter for module in modules for parameter in module.parameters()])


def release_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Gives the memory of those of some tensors back that are a part of a file; they are read again when used."""
    maps = Maps()
    found = {id(tensor): tensor for tensor in tensors}
    _make_releaser([_find_pages(t) for t in found.values() if maps.find_region(t.detach()) is not None])()


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Gives the memory of mapped parameters back after each module has run; they are read again when they are used."""
    maps = Maps()
    handles = []
    for module in model.modules():
        pages = [_find_pages(p) for p in module.parameters(recurse=False) if maps.find_region(p.detach()) is not None]
        if pages:
            handles.append(module.register_forward_hook(_make_releaser(pages)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _resident_files() -> int:
    """Returns how many bytes of files are in the process's memory (0 where the system does not say)."""
    try:
        return int(_STATM.read_text().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def _find_pages(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the whole pages within a tensor: address and length."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    return begin, max(0, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin)


def _make_releaser(pages: list[tuple[int, int]]) -> Any:
    system: Any = ctypes.CDLL(None, use_errno=True)

    def release(*_: Any) -> None:
        """Gives the pages back; as a hook, whatever it is given."""
        for begin, length in pages:
            if length:
                system.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _DONTNEED)

    return release


def file_regions(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[Path, int]]:
    """Returns for every tensor of a state that is an unchanged part of a file, which part of which file it is."""
    maps = Maps()
    return {name: region for name, tensor in state.items() if (region := maps.find_region(tensor.detach())) is not None}
