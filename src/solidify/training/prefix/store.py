"""What frozen layers return, kept on disk: one file for each batch, named by the digest of all that decides it.

A file appears whole, by rename, and begins with the digest of all that follows, its own key too: one that is spoilt,
or stands under another's name, is as good as none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from solidify.directory import ours
from solidify.errors import ObjectiveError, refuse
from solidify.system import console, disk
from solidify.weights import format, hashing
from solidify.weights.format import same_bits

_TRIES = 4  # to write a file while another training removes the directory
_SPARE = 2**28  # bytes that are left free for checkpoints, logs and the rest of the machine


@dataclass(frozen=True)
class Returned:
    """What a layer returned: tensors, or None, one after the other; `alone` says that it was a tensor, and no tuple."""

    parts: tuple[torch.Tensor | None, ...]
    alone: bool

    @classmethod
    def of(cls, output: Any) -> Returned | None:
        """Takes an output apart; None for one that is neither a tensor that can be written nor a tuple of them."""
        parts = output if isinstance(output, tuple) else (output,)
        if not parts or not all(part is None or _is_plain(part) for part in parts):
            return None
        return cls(tuple(parts), not isinstance(output, tuple)) if isinstance(parts[0], torch.Tensor) else None

    def output(self) -> Any:
        """Returns the output as the layer does."""
        return self.parts[0] if self.alone else self.parts

    def passing(self, hidden_states: torch.Tensor) -> Any:
        """Returns an output of this form that hands on what it was given, and nothing else."""
        return hidden_states if self.alone else (hidden_states, *(None for _ in self.parts[1:]))

    def tensors(self) -> list[torch.Tensor]:
        """Returns the parts that are tensors."""
        return [part for part in self.parts if part is not None]

    def equals(self, other: Returned) -> bool:
        """Returns whether another has the same form and the same bits."""
        if self.alone != other.alone or len(self.parts) != len(other.parts):
            return False
        return all(
            a is b is None or (a is not None and b is not None and same_bits(a, b))
            for a, b in zip(self.parts, other.parts, strict=True)
        )


def _is_plain(value: Any) -> bool:
    """Returns whether a value is a tensor whose numbers a file of safetensors holds."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        return False
    return value.dtype in format.DTYPES.values() and not (value.is_nested or value.is_quantized or value.is_meta)


@dataclass(frozen=True)
class Kept:
    """What the last layer returned, and digests of what each layer was given beside hidden states."""

    returned: Returned
    arguments: list[str]


class Store:
    """Outputs of layers in a directory of their own, by key.

    Raises:
        ObjectiveError: there is anything else in the directory, or it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock: int | None = None
        self._make_directory()
        strange = [
            path.name for path in sorted(directory.iterdir()) if not ours.is_activations(path) and os.path.lexists(path)
        ]
        words = f"cache_prefix: {directory} holds what is no activations of frozen layers; give a directory of its own"
        refuse(ObjectiveError, words, strange[:4])

    def hold(self) -> None:
        """Keeps the directory from being removed by another training, until `release`."""
        self._lock = self._make_directory(held=True)

    def release(self) -> None:
        """Lets others remove the directory."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def get(self, key: str, device: torch.device) -> Kept | None:
        """Returns what is kept under a key, in memory of its own; None where there is nothing, or it is spoilt."""
        path = self._locate(key)
        try:
            digest, _, content = path.read_bytes().partition(b"\n") if path.is_file() else (b"", b"", b"")
        except OSError:
            return None
        if digest != hashing.digest_bytes(content).encode():
            return None
        head, _, body = content.partition(b"\n")
        try:
            said = json.loads(head)
            return _unpack(said, safetensors.torch.load(body), device) if said["key"] == key else None
        except (ValueError, LookupError, TypeError, RuntimeError, safetensors.SafetensorError):
            return None

    def put(self, key: str, kept: Kept) -> None:
        """Keeps an output, unless something else stands in its place.

        Raises:
            ObjectiveError: the disk has no room for it, or it cannot be written.
        """
        returned = kept.returned
        orders = [None if part is None else _order_of(part) for part in returned.parts]
        named = {
            str(number): part.detach().permute(order).contiguous().cpu()
            for number, (part, order) in enumerate(zip(returned.parts, orders, strict=True))
            if part is not None and order is not None
        }
        self.refuse_full(sum(tensor.nbytes for tensor in named.values()))
        body = safetensors.torch.save(named)
        said = {"key": key, "orders": orders, "alone": returned.alone, "arguments": kept.arguments}
        content = json.dumps(said).encode() + b"\n" + body
        self._write(self._locate(key), hashing.digest_bytes(content).encode() + b"\n" + content)

    def _write(self, path: Path, content: bytes) -> None:
        for left in reversed(range(_TRIES)):
            try:
                if path.is_dir():
                    with suppress(OSError):  # there is something in it: it stays
                        path.rmdir()
                if not path.exists() or path.is_file():
                    disk.write(path, content)
                return
            except OSError as error:
                if isinstance(error, FileNotFoundError) and left:
                    self._make_directory()  # another training that ended has removed it
                    continue
                raise ObjectiveError(f"cache_prefix: {path} cannot be written ({error.strerror or error})") from error

    def drop(self, key: str) -> None:
        """Removes what is kept under a key."""
        with suppress(OSError):
            self._locate(key).unlink(missing_ok=True)

    def refuse_full(self, size: int) -> None:
        """Raises ObjectiveError where so many bytes do not fit on the disk."""
        self._make_directory()  # another training that ended may have removed it
        free = shutil.disk_usage(self.directory).free
        if free < size + _SPARE:
            raise ObjectiveError(
                f"cache_prefix: {console.size(size)} of activations do not fit in {self.directory}, whose disk has "
                f"{console.size(free)} free; choose an output directory elsewhere, or leave cache_prefix out"
            )

    def size(self) -> int:
        """Returns how many bytes are kept."""
        return sum(path.stat().st_size for path in self._list() if path.suffix == ours.ACTIVATIONS)

    def forget(self) -> None:
        """Removes all that is kept; another training in the directory computes its own again."""
        for path in self._list():
            if path.suffix == ours.ACTIVATIONS:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes all that is kept, what was half written, and the directory, unless another training is in it."""
        with suppress(OSError):  # something else is in it, or it is gone
            self.release()
            if self.directory.is_dir():
                self.hold()  # as it stands now
                if disk.held_alone(self._lock):
                    for path in self._list():
                        path.unlink(missing_ok=True)
                    self.directory.rmdir()
        self.release()

    def _list(self) -> list[Path]:
        """Returns the files of ours in the directory."""
        with suppress(OSError):
            return [path for path in self.directory.iterdir() if ours.is_activations(path)]
        return []

    def _make_directory(self, *, held: bool = False) -> int | None:
        try:
            if held:
                return disk.share(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = "it is a file" if self.directory.is_file() else error.strerror
            raise ObjectiveError(
                f"cache_prefix: no directory can be made at {self.directory} ({why}); give another path"
            ) from error
        return None

    def _locate(self, key: str) -> Path:
        return self.directory / f"{key}{ours.ACTIVATIONS}"


def _unpack(said: Any, found: dict[str, torch.Tensor], device: torch.device) -> Kept:
    """Makes an output of what a file says and holds."""
    parts: list[torch.Tensor | None] = []
    for number, order in enumerate(said["orders"]):
        if order is None:
            parts.append(None)
            continue
        # A clone, because kernels give other last bits for memory that is aligned otherwise.
        tensor = found[str(number)].to(device) if device.type != "cpu" else found[str(number)].clone()
        parts.append(tensor.permute(_invert_order(order)))
    return Kept(Returned(tuple(parts), said["alone"]), [*said["arguments"]])


def _order_of(tensor: torch.Tensor) -> list[int]:
    """Returns the order of axes in which a tensor's numbers stand in memory."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: (-strides[axis], axis))


def _invert_order(order: Sequence[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]
