"""Tensors in memory: their digests, samples of them, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from solidify.errors import ArtifactError
from solidify.weights import digest_cache, format, hashing, mapped, transfer
from solidify.weights.format import Entry, Shape

PAGE = 4096  # bytes that one sample looks at
SAMPLES = 5  # samples; a page of a file that is not in memory is a read of its own


def digest(tensor: torch.Tensor) -> str:
    """Returns the digest of a tensor's dtype, shape and bytes."""
    hasher = hashing.tensor_hasher(tensor.dtype, tuple(tensor.shape))
    hasher.update(format.bytes_of(tensor))
    return hasher.hexdigest()


def digests(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Returns the digest of every named tensor; shared tensors are read once."""
    seen: dict[int, str] = {}
    result = {}
    for name, tensor in tensors:
        key = id(tensor)
        if key not in seen:
            seen[key] = digest(tensor)
        result[name] = seen[key]
    return result


def sample(tensor: torch.Tensor) -> str:
    """Returns the digest of dtype and shape and of pages spread evenly over a tensor's bytes, both ends included."""
    hasher = hashing.tensor_hasher(tensor.dtype, tuple(tensor.shape))
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
    last = max(0, flat.numel() - PAGE)
    for number in range(SAMPLES):
        begin = last * number // (SAMPLES - 1)
        hasher.update(format.bytes_of(flat[begin : begin + PAGE]))
    return hasher.hexdigest()


def digests_where_they_stand(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns the digest of every tensor of a state; of those that are unchanged parts of mapped files, the file's.

    Memory is then read no more than files whose digests are not known yet, in pieces.
    """
    regions = mapped.file_regions(state)
    stored: dict[tuple[str, int], str] = {}
    for path in dict.fromkeys(path for path, _ in regions.values()):
        try:
            header = format.read_header(path)
        except ArtifactError:
            continue  # mapped too, but of another format (PyTorch's own): its tensors are read in memory
        found = digest_cache.digests([path])
        stored |= {(str(path), entry.start): found[name] for name, entry in header.items()}
    found = {name: stored[str(path), start] for name, (path, start) in regions.items() if (str(path), start) in stored}
    return {name: found.get(name) or digest(tensor) for name, tensor in state.items()}


@dataclass(frozen=True)
class Standing:
    """Where a tensor stands, unchanged, in a mapped file, and that file's state (`transfer.read_state`)."""

    entry: Entry
    state: tuple[int, int]


def standing(state: Mapping[str, torch.Tensor]) -> dict[str, Standing | str]:
    """Returns where each tensor stands in a mapped safetensors file, without reading it; else its digest."""
    found: dict[str, Standing | str] = {}
    headers: dict[Path, dict[tuple[int, Shape], Entry]] = {}
    states: dict[Path, tuple[int, int]] = {}
    for name, (path, start) in mapped.file_regions(state).items():
        if path not in headers:
            states[path] = transfer.read_state(path)
            with suppress(ArtifactError):  # mapped too, but of another format (PyTorch's own)
                headers[path] = {(entry.start, entry.shape): entry for entry in format.read_header(path).values()}
        entry = headers.setdefault(path, {}).get((start, Shape.of(state[name])))
        if entry is not None:
            found[name] = Standing(entry, states[path])
    return {name: found.get(name) or digest(tensor) for name, tensor in state.items()}


def are_same(before: Standing | str, now: Standing | str) -> bool:
    """Returns whether a tensor has the bytes that it had: it stands where it stood, or its digest is the same."""
    if isinstance(before, Standing) and isinstance(now, Standing) and before.entry.place == now.entry.place:
        return before.state == now.state
    stood = [each for each in (before, now) if isinstance(each, Standing)]
    if any(transfer.read_state(each.entry.file) != each.state for each in stood):
        return False
    first, second = (each if isinstance(each, str) else each.entry.digest() for each in (before, now))
    return first == second


def align(module: nn.Module) -> None:
    """Moves in place, values unchanged, every matrix of a module that does not start at a multiple of 64 bytes."""
    for tensor in (*module.parameters(), *module.buffers()):
        _move_tensor(tensor, 0)


def realign(entries: Mapping[str, Entry], state: Mapping[str, torch.Tensor]) -> None:
    """Moves in place, values unchanged, every matrix that stands otherwise aligned than in the file it is loaded from.

    Kernels give other last bits for other alignments, so that without it a reloaded model need not be bit-identical.
    """
    for name, entry in entries.items():
        if name in state:
            _move_tensor(state[name], entry.start % format.ALIGNMENT)


def align_to(tensor: torch.Tensor, address: int) -> None:
    """Moves in place, values unchanged, a matrix that stands otherwise aligned than what stands at an address."""
    _move_tensor(tensor, address % format.ALIGNMENT)


def _move_tensor(tensor: torch.Tensor, offset: int) -> None:
    if tensor.device.type == "cpu" and tensor.ndim >= 2 and tensor.data_ptr() % format.ALIGNMENT != offset:
        tensor.data = _copy_aligned(tensor, offset)


def _copy_aligned(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """Copies a tensor to an address that is `offset` above a multiple of the alignment."""
    room = torch.empty(tensor.nbytes + 2 * format.ALIGNMENT, dtype=torch.uint8)
    begin = (offset - room.data_ptr()) % format.ALIGNMENT
    copy = room[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor.detach())
