"""What a merged model's files hold of tensors that were trained in full, or of whose rows some were: read back.

For models that are too large to be run: the files of base, adapter and result are compared, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from solidify.merging.mathematics import Change
from solidify.merging.rewriting import Prepared
from solidify.merging.sums import Off
from solidify.weights import checkpoint
from solidify.weights.format import Entry
from solidify.weights.reverting import rows_of

_SAMPLED = 16
_BLOCK = 2**25  # bytes that are compared at a time
_SAME, _OTHER = Off(0.0), Off(math.inf)


def read_back(prepared: Prepared, directory: Path) -> dict[str, Off]:
    """Compares what was trained without a low-rank update with the files of `directory`; evenly sampled, by name.

    What stands there must be the adapter's bits, in the dtype of the base's tensor. Tensors that a checkpoint holds in
    another form than the model, or that the result alone has, are left out.
    """
    merger, stored, after = prepared.merger, prepared.stored, checkpoint.read(directory)
    keys = {
        name: stored.layout.stored[name]
        for name, change in merger.changes.items()
        if change.layer is None and stored.layout.stored.get(name) in after.entries
    }
    found = {}
    for name in list(keys)[:: max(1, len(keys) // _SAMPLED)]:
        change, key = merger.changes[name], keys[name]
        alike = _are_alike(change, merger.entries[change.keys[0]], stored.checkpoint.entries[key], after.entries[key])
        found[name] = _SAME if alike else _OTHER
    return found


def _are_alike(change: Change, given: Entry, before: Entry, after: Entry) -> bool:
    """Returns whether a tensor's file holds what the adapter gives: all of it, or the rows of some tokens."""
    if (before.shape, after.file.name) != (after.shape, before.file.name):
        return False
    if change.tokens is None:
        return all(_are_equal(rows_of(given, rows), rows_of(after, rows)) for rows in _blocks(after))
    ids = dict(zip(change.tokens, given.read(), strict=True))
    for rows in _blocks(after):
        expected = rows_of(before, rows).read()
        for offset, number in enumerate(rows if rows is not None else range(len(expected))):
            if number in ids:
                expected[offset] = ids[number]
        if not torch.equal(expected, rows_of(after, rows).read()):
            return False
    return True


def _are_equal(given: Entry, after: Entry) -> bool:
    return torch.equal(given.read().to(after.shape.dtype), after.read())


def _blocks(entry: Entry) -> Iterator[range | None]:
    """Splits the first axis of a tensor so that a block of rows fits into little memory."""
    sizes = entry.shape.sizes
    if not sizes or not sizes[0] or entry.shape.nbytes <= _BLOCK:
        yield None
        return
    step = max(1, sizes[0] * _BLOCK // entry.shape.nbytes)
    yield from (range(first, min(first + step, sizes[0])) for first in range(0, sizes[0], step))
