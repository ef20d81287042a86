"""Digests: BLAKE3, a cryptographic hash as fast as memory is read (https://github.com/BLAKE3-team/BLAKE3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from solidify.system import files

if TYPE_CHECKING:
    import torch

ALGORITHM = "blake3"


def tensor_hasher(dtype: torch.dtype | str, sizes: Sequence[int]) -> blake3:
    """Returns the hasher of a tensor's dtype (or torch's word for it), shape and bytes; the bytes are still to come."""
    return blake3(f"{dtype}{list(sizes)}".encode())


def digest_bytes(content: bytes) -> str:
    """Returns the digest of some bytes."""
    return blake3(content).hexdigest()


def digest_file(path: Path) -> str:
    """Returns the digest of a file that stands beside weights.

    Raises:
        ArtifactError: it is no regular file, is too large to be one of these, or cannot be read.
    """
    return digest_bytes(files.content(path))


def digest_large(path: Path) -> str:
    """Returns the digest of a file of any size, which is read in pieces.

    Raises:
        ArtifactError: it is no regular file.
        OSError: it cannot be read.
    """
    files.require_regular(path)
    return str(blake3().update_mmap(path).hexdigest())


def digest_values(values: Any) -> str:
    """Returns the digest of plain values, whatever the order of their keys."""
    return digest_bytes(json.dumps(values, sort_keys=True).encode())
