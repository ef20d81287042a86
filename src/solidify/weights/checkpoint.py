"""The weights of a model directory: which files there are, and where each tensor stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from solidify.errors import ArtifactError, refuse
from solidify.system import disk, files
from solidify.weights import format
from solidify.weights.format import Entry, Shape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = 5 * 10**9  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory, by name, and the files that hold them."""

    directory: Path
    files: list[Path]
    entries: dict[str, Entry]

    @property
    def nbytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(entry.shape.nbytes for entry in self.entries.values())


def read(directory: Path) -> Checkpoint:
    """Finds the tensors of a model directory; reads headers only.

    Raises:
        ArtifactError: there are no safetensors, the index is unreadable or does not agree with the files, a file is
            missing, truncated or not safetensors, or two files hold the same name. All faults together.
    """
    files = weight_files(directory)
    entries: dict[str, Entry] = {}
    faults = []
    for path in files:
        try:
            header = format.read_header(path)
        except ArtifactError as error:
            faults.append(str(error))
            continue
        faults += [f"{path} holds {name!r}, which another file holds too" for name in header if name in entries]
        entries |= header
    if not faults and (index := index_of(directory)) is not None:
        for name, file in _weight_map(index).items():
            if name not in entries or entries[name].file.name != file:
                faults.append(f"{index} says that {file} holds {name!r}, but it does not")
    refuse(ArtifactError, f"the weights in {directory} are not complete; save or download them again", faults)
    return Checkpoint(directory, files, entries)


def weight_files(directory: Path) -> list[Path]:
    """Returns the weight files that the directory's index names, or its only one.

    Raises:
        ArtifactError: there is neither, or the index is unreadable or names a missing file.
    """
    index = index_of(directory)
    if index is not None:
        names = sorted(set(_weight_map(index).values()))
    elif (directory / WEIGHTS).is_file():
        disk.refuse_names(directory / WEIGHTS, [WEIGHTS])
        names = [WEIGHTS]
    else:
        raise ArtifactError(f"{directory} holds neither {WEIGHTS} nor {INDEX}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ArtifactError(f"{index} names {', '.join(missing)}, which {directory} lacks")
    return [directory / name for name in names]


def index_of(directory: Path) -> Path | None:
    """Returns the index of a directory, if it has one that counts: beside a single file of all weights, only its own.

    transformers then reads that file, whatever other files the index names (`_get_resolved_checkpoint_files` of
    `modeling_utils.py`).

    Raises:
        ArtifactError: it is unreadable, and there is no such file; or it names files in other directories.
    """
    index = directory / INDEX
    if not index.is_file():
        return None
    if not (directory / WEIGHTS).is_file():
        return index
    named: set[str] = set()
    with suppress(ArtifactError):
        named = set(_read_weight_map(index).values())
    disk.refuse_names(index, named)
    return index if named == {WEIGHTS} else None


@contextmanager
def steady(files: Iterable[Path]) -> Iterator[None]:
    """Notices when one of some files is written to or replaced while the block lasts.

    Raises:
        ArtifactError: one was; it names all.
    """
    before = {path: _read_state(path) for path in files}
    yield
    faults = [
        f"{path} was written to while it was read" for path, state in before.items() if _read_state(path) != state
    ]
    refuse(
        ArtifactError,
        "an input changed while it was read, so nothing was written; start again when no other program writes to it",
        faults,
    )


def _read_state(path: Path) -> tuple[int, ...]:
    """Returns what changes when a file is written to or replaced, but not when it is linked."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _weight_map(index: Path) -> dict[str, str]:
    found = _read_weight_map(index)
    disk.refuse_names(index, set(found.values()))
    refuse(ArtifactError, f"{index} does not name weight files beside it", [
        repr(name) for name in sorted(set(found.values())) if "/" in name or not name.endswith(".safetensors")
    ])  # fmt: skip
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        found = files.document(index).get("weight_map")
    except ArtifactError as error:
        raise ArtifactError(f"{index.name} is not a safetensors index: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ArtifactError(f"{index} is not a safetensors index: its weight_map does not map tensors to files")
    return found


def write_index(directory: Path, files: Mapping[str, Mapping[str, Shape]]) -> None:
    """Writes which file holds which tensor; a single file of the usual name needs no index."""
    if list(files) == [WEIGHTS]:
        return
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    total = sum(shape.nbytes for shapes in files.values() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def file_names(count: int) -> list[str]:
    """Returns the usual names of so many weight files."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def shards(units: Sequence[Mapping[str, Shape]]) -> list[list[str]]:
    """Splits names by size, and so that no tensor of odd size stands before a matrix in its file.

    The names of a unit stay together: they are written at once.
    """
    even = [unit for unit in units if not _has_odd_size(unit)]
    odd = [unit for unit in units if _has_odd_size(unit)]
    found: list[list[str]] = [[]]
    size, closed = 0, False
    for unit in even:
        nbytes = sum(shape.nbytes for shape in unit.values())
        if found[-1] and size + nbytes > SHARD_SIZE:
            found.append([])
            size = 0
        found[-1] += unit
        size += nbytes
    for unit in [u for u in odd if _has_matrix(u)]:
        if closed:
            found.append([])
        found[-1] += unit
        closed = True
    found[-1] += [name for unit in odd if not _has_matrix(unit) for name in unit]  # these may stand anywhere
    return found


def _has_odd_size(unit: Mapping[str, Shape]) -> bool:
    return any(shape.nbytes % format.ALIGNMENT for shape in unit.values())


def _has_matrix(unit: Mapping[str, Shape]) -> bool:
    return any(len(shape.sizes) >= 2 for shape in unit.values())
