"""Where rows come from: files, directories of files, data sets of the hub; alone, or several mixed by weight.

Rows are returned with their columns as they stand. What is local is read from the disk alone.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from solidify.errors import DataError
from solidify.system import files, foreign
from solidify.training import numbering

Rows = datasets.Dataset | datasets.IterableDataset

BUFFER = 10_000  # rows of a stream among which the next one is drawn
KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_OF_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def read_file(path: Path, *, whole: bool = False, streaming: bool = False) -> Any:
    """Reads a file (`.jsonl`, `.json`, `.csv`, `.parquet`, `.txt`); `whole`, its JSON is looked at in one piece.

    Raises:
        DataError: the file does not exist, is of another kind, cannot be parsed, or is empty.
    """
    if not os.path.exists(path):
        raise DataError(f"the data file {path} does not exist")
    files.require_regular(path, DataError)
    kind = KINDS.get(path.suffix)
    if kind is None:
        raise DataError(f"{path} is not a data file of a known kind; known: {', '.join(KINDS)}")
    more = {"chunksize": path.stat().st_size + 1} if kind == "json" and whole else {}
    return _require_rows(_load(f"{path} cannot be read as {kind}", kind, [path], streaming, **more), path)


def read_directory(path: Path, *, streaming: bool = False) -> Any:
    """Reads all data files below a directory, which are of one kind; or, where there are none, its images.

    Images in directories of their own get the names of these as labels, as `datasets` reads an image folder.

    Raises:
        DataError: there are files of several kinds, or none that is known.
    """
    found = [each for each in sorted(path.rglob("*")) if each.is_file() and not each.name.startswith(".")]
    kinds = {kind: [each for each in found if KINDS.get(each.suffix) == kind] for kind in dict.fromkeys(KINDS.values())}
    kinds = {kind: listed for kind, listed in kinds.items() if listed}
    if len(kinds) > 1:
        counts = ", ".join(f"{len(listed)} of {kind}" for kind, listed in kinds.items())
        raise DataError(f"the directory {path} holds data files of several kinds ({counts}); name them one by one")
    for kind, listed in kinds.items():
        for each in listed:
            files.require_regular(each, DataError)
        return _require_rows(_load(f"{path} cannot be read as {kind}", kind, listed, streaming), path)
    if any(each.suffix.lower() in _PICTURES for each in found):
        words = f"{path} cannot be read as a directory of images"
        return _require_rows(
            _attempt(words, "imagefolder", data_dir=str(path.resolve()), split="train", streaming=streaming), path
        )
    raise DataError(f"the directory {path} holds no data file of a known kind ({', '.join(KINDS)}) and no image")


def read_hub(path: str, *, name: str | None, split: str, revision: str | None, streaming: bool = False) -> Any:
    """Reads one split of a data set of the hub; without the network, from the cache of `datasets`.

    Raises:
        DataError: it cannot be read.
    """
    if not _OF_HUB.fullmatch(path):
        raise DataError(f"the data file {path} does not exist, and a data set of the hub is called owner/name")
    at = f" at revision {revision}" if revision else ""
    words = (
        f"{path} is no file or directory beside the recipe, and as a data set of the hub its split {split!r}{at} "
        "cannot be read (is the name right, and the network there, or the data set in the cache?)"
    )
    return _require_rows(_attempt(words, path, name, split=split, revision=revision, streaming=streaming), path)


def mix(parts: Sequence[Any], weights: Sequence[float | None], *, seed: int) -> Any:
    """Puts the rows of several sources together, in columns that all of them have.

    Without weights one after the other (streams take turns). With weights, the next row comes from a source with a
    probability like its weight, until every row of every source was there once (`datasets.interleave_datasets`): rows
    of a source that is soon used up come again. Classes that the sources number differently get one numbering.

    Raises:
        DataError: no column is common to all.
    """
    if len(parts) == 1:
        return parts[0]
    common = [each for each in columns(parts[0]) if all(each in columns(part) for part in parts)]
    if not common:
        listed = "; ".join(", ".join(columns(part)) for part in parts)
        raise DataError(f"the sources have no column in common ({listed}); rename them with `columns`")
    alike = numbering.unite([part.select_columns(common) for part in parts])
    weighted = any(weight is not None for weight in weights)
    with foreign.calling("the sources cannot be put together; are their columns of one kind?", DataError):
        if not weighted and all(isinstance(part, datasets.Dataset) for part in alike):
            return datasets.concatenate_datasets(alike)
        shares = [weight if weight is not None else 1.0 for weight in weights]
        probabilities = [share / sum(shares) for share in shares]
        return datasets.interleave_datasets(
            alike, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted"
        )


def columns(rows: Any) -> list[str]:
    """Returns the names of the columns; of a stream, those of its first row if nothing else says."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def first(rows: Any, count: int) -> list[dict[str, Any]]:
    """Returns the first rows as plain values."""
    return list(rows.take(count))


def is_stream(rows: Any) -> bool:
    """Returns whether rows come one by one, and nobody knows how many there are."""
    return isinstance(rows, datasets.IterableDataset)


def _load(words: str, kind: str, paths: Sequence[Path], streaming: bool, **more: Any) -> Any:
    listed = [_escape_path(path) for path in paths]
    return _attempt(words, kind, data_files=listed, split="train", streaming=streaming, **more)


def _attempt(words: str, *args: Any, **options: Any) -> Any:
    read = foreign.attempt(datasets.load_dataset, *args, **options)
    if read.error is not None:
        cause = read.error.__cause__ or read.error  # what the library wraps says more than its wrapping
        raise DataError(f"{words}: {foreign.said(cause)[:300]}") from read.error
    return read.value


def _require_rows(rows: Any, path: Any) -> Any:
    if is_stream(rows):
        read = foreign.attempt(first, rows, 1)
        if read.error is not None:
            raise DataError(f"{path} cannot be read row by row: {foreign.said(read.error)[:300]}") from read.error
        empty = not read.value
    else:
        empty = not len(rows)
    if empty:
        raise DataError(f"{path} holds no rows")
    return rows


def _escape_path(path: Path) -> str:
    """Returns a file's name so that `datasets`, which takes it for a pattern, finds that file alone."""
    return glob.escape(str(path.resolve()))
