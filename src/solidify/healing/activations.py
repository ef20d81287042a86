"""What the layers of a base return, in a file: one number after the other, mapped, not held in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from solidify.system import disk


class Activations:
    """The output of one layer for every batch, each (batch_size, sequence_length, ...); in a file, or in memory.

    A file appears by rename once all of it is written.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype, flat: torch.Tensor) -> None:
        """`flat` holds the batches' numbers one after the other; `shapes` says how each is shaped."""
        self.shapes, self.dtype, self._flat = [tuple(shape) for shape in shapes], dtype, flat
        self._ends = [0]
        for shape in self.shapes:
            self._ends.append(self._ends[-1] + torch.Size(shape).numel())

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Activations:
        """Keeps tensors in memory."""
        return cls([t.shape for t in tensors], tensors[0].dtype, torch.cat([t.flatten() for t in tensors]))

    @classmethod
    def create(cls, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Activations:
        """Makes a file to write to, under a name that says it is not whole; `finish` gives it its own."""
        return cls(shapes, dtype, _map_file(partial(path), _count(shapes), dtype))

    @classmethod
    def open(cls, path: Path, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Activations | None:
        """Opens a file that is whole; None where there is none of this size."""
        count = _count(shapes)
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            return None
        return cls(shapes, dtype, _map_file(path, count, dtype))

    def get(self, index: int) -> torch.Tensor:
        """Returns a copy of one batch's."""
        part = self._flat[self._ends[index] : self._ends[index + 1]]
        return part.view(self.shapes[index]).clone()

    def set(self, index: int, value: torch.Tensor) -> None:
        """Writes one batch's."""
        self._flat[self._ends[index] : self._ends[index + 1]].copy_(value.flatten())


def finish(path: Path, written: Activations) -> Activations:
    """Gives a file that is whole its own name."""
    disk.sync(partial(path))
    os.replace(partial(path), path)
    return written


def partial(path: Path) -> Path:
    """Returns the name that a file has while it is written."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _map_file(path: Path, count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype)


def _count(shapes: Sequence[Sequence[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)
