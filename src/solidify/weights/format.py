"""The safetensors format, byte by byte: where each tensor stands in a file, and files written piece by piece.

The safetensors library maps whole files or writes whole state dicts. Here files are read and written in pieces, so that
memory is bounded, and every matrix is written at a multiple of 64 bytes: loaders map these files, a tensor's place in
the file is its place in memory, and matrix kernels give other last bits for other alignments (Intel's MKL says so of
its own).
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solidify.errors import ArtifactError
from solidify.system import console, files
from solidify.weights import hashing, header
from solidify.weights.ahead import WORKERS, Part, State
from solidify.weights.direct import STEP, Source, Target

ALIGNMENT = 64  # bytes; a cache line, and what torch's own allocator gives
CHUNK = 2**21  # bytes that are digested and written at a time; more does not stay in a core's cache
_MOVED = 2**26  # bytes that the kernel is asked to copy at a time, so that a bar moves
DTYPES: dict[str, torch.dtype] = {
    word: getattr(torch, name.removeprefix("torch.")) for word, name in header.DTYPE_NAMES.items()
}
_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of the same bits, by bytes

Place = tuple[Path, int, "Shape"]
Piece = tuple[str, torch.Tensor]  # a tensor's name and its next values, in order


@dataclass(frozen=True)
class Shape:
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Shape:
        """Returns those of a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return math.prod(self.sizes) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: `start` is its offset in bytes."""

    file: Path
    name: str
    shape: Shape
    start: int

    @property
    def place(self) -> Place:
        """Which part of which file the tensor is; an empty one begins where the next does, and differs in shape."""
        return self.file, self.start, self.shape

    def part(self, state: State) -> Part:
        """Returns by what `ahead.py` knows the tensor, in a file of some state."""
        return Part(self.file, state, self.start, self.shape.nbytes, str(self.shape.dtype), self.shape.sizes)

    def read(self) -> torch.Tensor:
        """Reads the tensor into memory of its own.

        Raises:
            ArtifactError: the file cannot be read or ends before the tensor does.
        """
        whole = torch.empty(self.shape.sizes, dtype=self.shape.dtype)
        with self.reading() as source:
            source.fill(bytes_of(whole), self.start)
        return whole

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yields the tensor's bytes in order, a chunk at a time; each piece is valid until the next.

        Raises:
            ArtifactError: as `read`.
        """
        buffer = torch.empty(min(STEP, self.shape.nbytes), dtype=torch.uint8)
        with self.reading() as source:
            for done in range(0, self.shape.nbytes, STEP):
                part = buffer[: min(STEP, self.shape.nbytes - done)]
                source.fill(bytes_of(part), self.start + done)
                yield part

    def values(self, count: int) -> Iterator[torch.Tensor]:
        """Yields the tensor's values in order, so many at a time.

        Raises:
            ArtifactError: as `read`.
        """
        size = self.shape.dtype.itemsize
        with self.reading() as source:
            for begin in range(0, self.shape.nbytes, count * size):
                part = torch.empty(min(count, (self.shape.nbytes - begin) // size), dtype=self.shape.dtype)
                source.fill(bytes_of(part), self.start + begin)
                yield part

    def digest(self, *, keep: bool = False) -> str:
        """Returns the digest of the tensor, without holding more than a step of it; `keep` is that of `reading`."""
        hasher = hashing.tensor_hasher(self.shape.dtype, self.shape.sizes)
        with self.reading(keep=keep) as source:
            for piece in source.pieces(self.start, self.shape.nbytes):
                hasher.update(piece)
        return hasher.hexdigest()

    def reading(self, *, keep: bool = False) -> Source:
        """Returns the file, to be opened; with `keep`, what is read stays in the page cache, as it will be read again.

        Of files that are not large, it does so always.
        """
        return Source(self.file, self.name, keep=keep)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a tensor; copies only when it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    buffer: Any = flat.view(torch.uint8).numpy()
    return memoryview(buffer) if flat.numel() else memoryview(b"")


def has_memory(tensor: torch.Tensor) -> bool:
    """Returns whether the storage of a tensor holds all its values: one that was freed is read past its end."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return not tensor.is_meta
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + last + 1) * tensor.element_size() if tensor.numel() else 0
    return tensor.untyped_storage().nbytes() >= end


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two tensors have the same dtype, shape and bits: a NaN is itself, and 0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape or one.is_meta != other.is_meta:
        return False
    if not has_memory(one) or not has_memory(other):
        return one is other
    if one.device != other.device:
        one, other = one.cpu(), other.cpu()
    words = _OF_SIZE.get(one.element_size(), torch.uint8)
    return torch.equal(*(each.detach().contiguous().reshape(-1).view(words) for each in (one, other)))


def read_header(path: Path) -> dict[str, Entry]:
    """Returns where each tensor stands in a safetensors file, in the order of the file.

    Raises:
        ArtifactError: the file is no safetensors file or not whole, or holds a dtype that torch lacks.
    """
    files.require_regular(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            tensors, begin = header.read(file, size)
        entries = {}
        for name, values in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = values["data_offsets"]
            shape = Shape(DTYPES[values["dtype"]], tuple(values["shape"]))
            if end - start != shape.nbytes:
                raise ValueError(f"{name} has {end - start} bytes and not {shape.nbytes}")
            entries[name] = Entry(path, name, shape, begin + start)
        _refuse_gaps(entries, begin, size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: {type(error).__name__}: {error}") from error
    return entries


def _refuse_gaps(entries: Mapping[str, Entry], begin: int, size: int) -> None:
    for entry in entries.values():
        if entry.start != begin:
            raise ValueError(f"{entry.name} does not start where the tensor before it ends")
        begin += entry.shape.nbytes
    if begin > size:
        raise ValueError(f"it is truncated: {size} bytes, and its header speaks of {begin}")
    if begin < size:
        raise ValueError(f"{size - begin} bytes follow its last tensor")


def header_digest(path: Path) -> str:
    """Returns the digest of what stands before the tensors in a safetensors file."""
    files.require_regular(path)
    try:
        with path.open("rb") as file:
            return hashing.digest_bytes(b"".join(header.read_bytes(file)))
    except (ValueError, struct.error) as error:
        raise ArtifactError(f"{path} cannot be read as safetensors: its header is longer than the file") from error


@dataclass(frozen=True)
class TensorSource:
    """Where some tensors to be written come from: `pieces` yields their values in order, tensor by tensor or mixed.

    A piece may have any shape; what counts is its bytes. A tensor that is `moved` stands in a file, and its digest is
    known: the kernel copies its bytes, and they pass through no memory of ours.
    """

    shapes: dict[str, Shape]
    pieces: Callable[[], Iterator[Piece]]
    moved: tuple[Entry, str] | None = None

    @classmethod
    def stored(cls, name: str, entry: Entry, digest: str | None = None) -> TensorSource:
        """Takes a tensor as it stands in a file, under a name; with its `digest`, where that is known."""
        moved = (entry, digest) if digest is not None else None
        return cls({name: entry.shape}, lambda: ((name, piece) for piece in entry.pieces()), moved)

    @classmethod
    def made(cls, name: str, tensor: torch.Tensor) -> TensorSource:
        """Takes a tensor from memory."""
        return cls({name: Shape.of(tensor)}, lambda: iter([(name, tensor)]))


def in_parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields what some work makes of each item, in order; after an error nothing new is begun."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def write_file(
    path: Path, sources: Sequence[TensorSource], advance: Callable[[int], None] = lambda _: None
) -> dict[str, str]:
    """Writes one file from its sources, in their order, and returns the digest of every tensor.

    What is written is digested as it passes, unless its digest is known; `advance` is told of bytes written.

    Raises:
        ArtifactError: a source gave more or less than it said, or there is no room.
    """
    shapes = {name: shape for source in sources for name, shape in source.shapes.items()}
    head, starts = _make_header(shapes)
    digests: dict[str, str] = {}
    size = len(head) + sum(shape.nbytes for shape in shapes.values())
    try:
        with Target(path, size) as target:
            target.write(memoryview(head), 0)

            def work(source: TensorSource) -> dict[str, str]:
                """Puts the tensors of one source where they belong."""
                offsets = {name: len(head) + starts[name] for name in source.shapes}
                if source.moved is not None and _move_bytes(source.moved[0], target, offsets, advance):
                    return dict.fromkeys(source.shapes, source.moved[1])
                return _write_tensors(source, target, offsets, advance)

            for found in in_parallel(work, sources):
                digests |= found
    except OSError as error:
        raise unwritten(error, path, size) from error
    return {name: digests[name] for name in shapes}


def unwritten(error: OSError, path: Path, size: int) -> ArtifactError:
    """Returns an error that says why a file of some size could not be written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ArtifactError(f"{path} cannot be written: {error.strerror}; choose another output")
    written = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    return ArtifactError(
        f"the disk became full: of {path}, {console.size(written)} were written, "
        f"{console.size(max(0, size - written))} are still needed, and {console.size(free)} are free; "
        "make room, or choose another output"
    )


def _make_header(shapes: Mapping[str, Shape]) -> tuple[bytes, dict[str, int]]:
    """Makes what stands before the tensors, padded so that they begin aligned, and their offsets behind it."""
    tensors: dict[str, dict[str, Any]] = {}
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name], end = end, end + shape.nbytes
        tensors[name] = {
            "dtype": _WORDS[shape.dtype],
            "shape": list(shape.sizes),
            "data_offsets": [starts[name], end],
        }
    return header.make(tensors, ALIGNMENT), starts


def _move_bytes(entry: Entry, target: Target, offsets: Mapping[str, int], advance: Callable[[int], None]) -> bool:
    """Copies a tensor from its file to its offset in another, without a look at it; returns whether that was done.

    In a large file it passes the page cache. In others the kernel copies it, and shares the blocks where the file
    system can; between some file systems, and outside Linux, it does nothing.
    """
    (place,) = offsets.values()
    if target.past_cache:
        stream = target.stream(place)
        with entry.reading() as source:
            for piece in source.pieces(entry.start, entry.shape.nbytes):
                stream.put(piece)
                advance(len(piece))
        stream.finish()
        return True
    done = 0
    with entry.reading() as source:
        while done < entry.shape.nbytes:
            count = min(entry.shape.nbytes - done, _MOVED)
            try:
                given = (source.descriptor, target.descriptor, count, entry.start + done, place + done)
                moved = os.copy_file_range(*given)
            except (OSError, AttributeError) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                advance(-done)  # what was copied is written once more
                return False
            if not moved:  # the end of the file, or a file system that cannot: reading tells
                advance(-done)
                return False
            done += moved
            advance(moved)
    return True


def _write_tensors(
    source: TensorSource, target: Target, offsets: Mapping[str, int], advance: Callable[[int], None]
) -> dict[str, str]:
    """Writes the tensors of one source to their offsets in the file."""
    hashers = {name: hashing.tensor_hasher(shape.dtype, shape.sizes) for name, shape in source.shapes.items()}
    left = {name: shape.nbytes for name, shape in source.shapes.items()}
    streams = {name: target.stream(offset) for name, offset in offsets.items()}
    for name, tensor in source.pieces():
        memory = bytes_of(tensor)
        left[name] -= len(memory)
        if left[name] < 0:
            raise ArtifactError(f"more values came for {name} than it has room for")
        for begin in range(0, len(memory), CHUNK):
            part = memory[begin : begin + CHUNK]
            hashers[name].update(part)
            streams[name].put(part)
            advance(len(part))
    short = [name for name, count in left.items() if count]
    if short:
        raise ArtifactError(f"too few values came for {', '.join(short[:4])}")
    for stream in streams.values():
        stream.finish()
    return {name: hasher.hexdigest() for name, hasher in hashers.items()}
