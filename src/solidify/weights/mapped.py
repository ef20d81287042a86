"""Which tensors in memory are a part of a file, unchanged: the operating system's own word, with little reading.

A loader maps a file privately; a page that is written to becomes the process's own (anonymous) page. Where Linux says
that a mapping has no such page, what stands there is the file; such a page is compared with the file. Elsewhere nothing
is known, and tensors are read.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

_MAPS, _PAGES, _STATM = Path("/proc/self/maps"), Path("/proc/self/pagemap"), Path("/proc/self/statm")
_MUCH = 2**29  # bytes
_FILES = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S{3}p ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) +(/.*)$", re.MULTILINE)
_OF_FILE, _HELD = 1, 6  # bits 61 to 63 of an entry of `pagemap`: it is of a file; it is swapped out, or in memory
_ENTRY = 8  # bytes of `pagemap` for a page
_DONTNEED = 4  # MADV_DONTNEED of Linux


@dataclass(frozen=True)
class _Area:
    begin: int
    end: int
    offset: int
    inode: tuple[int, int]
    path: str


class Maps:
    """The process's file mappings as they are when the first tensor asks for them."""

    def __init__(self) -> None:
        self._areas: dict[int, _Area] = {}  # of those that were asked for: a process maps hundreds of files
        self._same: dict[_Area, bool] = {}

    @cached_property
    def _lines(self) -> list[tuple[str, ...]]:
        return sorted(_list_lines(), key=lambda line: int(line[0], 16))

    @cached_property
    def _begins(self) -> list[int]:
        return [int(line[0], 16) for line in self._lines]

    def find_region(self, tensor: torch.Tensor) -> tuple[Path, int] | None:
        """Returns the file of which a tensor is an unchanged part, and where in it; None where that is not known."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return None
        if tensor.is_conj() or tensor.is_neg():  # what stands in memory is not what it reads
            return None
        address = tensor.data_ptr()
        own = _find_own_pages(address, tensor.nbytes)
        if own is None or bool(own.all()):  # nobody tells, or none is a file's: it may hold the same, and is read
            return None
        index = bisect.bisect_right(self._begins, address) - 1
        area = self._area_at(index) if index >= 0 else None
        if area is None or address + tensor.nbytes > area.end or not self._is_mapped(area):
            return None
        region = Path(area.path), area.offset + address - area.begin
        return None if _holds_other(tensor, region, own) else region

    def _area_at(self, index: int) -> _Area:
        if index not in self._areas:
            begin, end, offset, major, minor, inode, path = self._lines[index]
            device = os.makedev(int(major, 16), int(minor, 16))
            self._areas[index] = _Area(int(begin, 16), int(end, 16), int(offset, 16), (device, int(inode)), path)
        return self._areas[index]

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


def _list_lines() -> list[tuple[str, ...]]:
    """Returns where files are mapped, as fields of `_FILES`; nothing where the system does not say what was written."""
    if not _MAPS.is_file() or not os.access(_PAGES, os.R_OK):
        return []
    return _FILES.findall(_MAPS.read_text(encoding="utf-8", errors="surrogateescape"))


def _find_own_pages(address: int, length: int) -> torch.Tensor | None:
    """Returns of each page of some memory, from the first on, whether it is the process's own; None if nobody tells."""
    first, last = address // mmap.PAGESIZE, (address + length - 1) // mmap.PAGESIZE
    size = (last - first + 1) * _ENTRY
    try:
        with open(_PAGES, "rb", buffering=0) as pages:
            entries = os.pread(pages.fileno(), size, first * _ENTRY)
    except OSError:
        return None
    return _list_own(entries) if len(entries) == size else None


def _list_own(entries: bytes) -> torch.Tensor:
    """Returns which entries of `pagemap`, 64 bits each, tell of a page in memory or swapped out that is no file's."""
    bits = torch.frombuffer(bytearray(entries), dtype=torch.int64) >> 61 & 7  # (pages,)
    return ((bits & _HELD) != 0) & ((bits & _OF_FILE) == 0)


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


def differs_from_file(tensor: torch.Tensor, region: tuple[Path, int]) -> bool:
    """Returns whether a tensor that is mapped from a part of a file, its `region`, holds other bytes than stand there.

    Pages that are the process's own are compared with the file: a neighbour in the same page may have been written to.
    A page that the system does not tell of counts as another.
    """
    own = _find_own_pages(tensor.data_ptr(), tensor.nbytes)
    return own is None or _holds_other(tensor, region, own)


def _holds_other(tensor: torch.Tensor, region: tuple[Path, int], own: torch.Tensor) -> bool:
    address, (path, offset) = tensor.data_ptr(), region
    first, end = address // mmap.PAGESIZE * mmap.PAGESIZE, address + tensor.nbytes
    try:
        with open(path, "rb", buffering=0) as file:
            for page in own.nonzero().flatten().tolist():
                begin = max(first + page * mmap.PAGESIZE, address)
                held = ctypes.string_at(begin, min(first + (page + 1) * mmap.PAGESIZE, end) - begin)
                if os.pread(file.fileno(), len(held), offset + begin - address) != held:
                    return True
    except OSError:
        return True
    return False


def file_regions(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[Path, int]]:
    """Returns for every tensor of a state that is an unchanged part of a file, which part of which file it is."""
    maps = Maps()
    return {name: region for name, tensor in state.items() if (region := maps.find_region(tensor.detach())) is not None}
