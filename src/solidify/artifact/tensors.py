"""Tensors on disk and their digests. Writes safetensors in the model's in-memory layout, so that loading maps them."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from solidify.errors import ArtifactError, refuse

ALGORITHM = "sha256"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ALIGNMENT = 64  # bytes; a cache line, and what torch's own allocator gives
SHARD_SIZE = 5 * 10**9  # bytes
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def digest(tensor: torch.Tensor) -> str:
    """Returns the digest of a tensor's dtype, shape and bytes."""
    h = hashlib.new(ALGORITHM, f"{tensor.dtype}{list(tensor.shape)}".encode())
    h.update(_bytes(tensor))
    return h.hexdigest()


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


def digest_bytes(content: bytes) -> str:
    """Returns the digest of some bytes."""
    return hashlib.new(ALGORITHM, content).hexdigest()


def digest_values(values: Any) -> str:
    """Returns the digest of plain values, whatever the order of their keys."""
    return digest_bytes(json.dumps(values, sort_keys=True).encode())


def write(state: Mapping[str, torch.Tensor], directory: Path, *, tied: Iterable[str] = ()) -> None:
    """Writes a state dict as safetensors, one file or several with an index, tensor by tensor.

    Every matrix starts at a multiple of 64 bytes. Loaders map these files, so a tensor's place in the file is its
    place in memory, and matrix kernels give other last bits for other alignments (Intel's MKL says so of its own):
    without this, a reloaded model need not be bit-identical. The safetensors library cannot be asked for it. Names in
    `tied` are left out, because the model ties them anew.

    Raises:
        ArtifactError: two names share memory though the model does not tie them.
    """
    left_out = set(tied)
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    refuse(ArtifactError, "tensors that are shared but not tied cannot be reloaded", _shared(kept))
    shards = _shards(kept)
    if len(shards) == 1:
        _write_file(directory / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in kept.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def realign(module: nn.Module) -> None:
    """Moves in place, values unchanged, every matrix of the module that does not start at a multiple of 64 bytes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.ndim >= 2 and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _shared(state: Mapping[str, torch.Tensor]) -> list[str]:
    owners: dict[int, str] = {}
    faults = []
    for name, tensor in state.items():
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() and key in owners:
            faults.append(f"{owners[key]} and {name} share memory; give each its own, or let the model tie them")
        owners.setdefault(key, name)
    return faults


def _shards(state: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Splits by size, and so that no tensor of odd size stands before a matrix in its file."""
    even = [name for name, tensor in state.items() if tensor.nbytes % ALIGNMENT == 0]
    odd = [name for name, tensor in state.items() if tensor.nbytes % ALIGNMENT]
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name in even:
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + state[name].nbytes > SHARD_SIZE:
            shards.append({})
        shards[-1][name] = state[name]
    for name in [n for n in odd if state[n].ndim >= 2]:
        last = next(reversed(shards[-1].values()), None)
        if last is not None and last.nbytes % ALIGNMENT:
            shards.append({})
        shards[-1][name] = state[name]
    for name in [n for n in odd if state[n].ndim < 2]:
        shards[-1][name] = state[name]
    return shards


def _write_file(path: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Writes one file of the safetensors format: length of the header, header (JSON), data without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in state.values():
            file.write(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> Any:
    """Returns the memory of a tensor as a buffer; copies only when it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def weight_files(directory: Path) -> list[Path]:
    """Returns the weight files that the directory's index names, or its only one.

    Raises:
        ArtifactError: there is neither, or the index is unreadable or names a missing file.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ArtifactError(f"{index} is not a safetensors index: {error}") from error
    elif (directory / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise ArtifactError(f"{directory} holds neither {WEIGHTS} nor {INDEX}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ArtifactError(f"{index} names {', '.join(missing)}, which {directory} lacks")
    return [directory / name for name in names]


def digests_on_disk(paths: Iterable[Path]) -> dict[str, str]:
    """Returns the digest of every tensor in some safetensors files, read one by one.

    Raises:
        ArtifactError: a file is truncated or not safetensors, or two files hold the same name.
    """
    result: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in result:
                        raise ArtifactError(f"{path} holds {name!r}, which another file holds too")
                    result[name] = digest(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} cannot be read as safetensors: {error}") from error
    return result


def header_digest(path: Path) -> str:
    """Returns the digest of what stands before the tensors in a safetensors file."""
    with path.open("rb") as file:
        length = file.read(8)
        return digest_bytes(length + file.read(struct.unpack("<Q", length)[0]))
