"""Keys in files, and the command in this process: what the tests of signatures share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization

from solidify import __main__

Copy = Callable[..., Path]
SIGNED = "its signature holds"


@dataclass(frozen=True)
class Pair:
    """A private and a public key, in files."""

    private: Path
    public: Path


def pem(key: Any, path: Path, password: bytes | None = None) -> Path:
    if hasattr(key, "private_bytes"):
        how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        content = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    else:
        content = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(content)
    return path


def pair(key: Any, directory: Path, name: str) -> Pair:
    return Pair(pem(key, directory / f"{name}.pem"), pem(key.public_key(), directory / f"{name}.pub"))


def solid(*words: object) -> int:
    """Gives words to the command, and returns how it ended."""
    before, sys.argv = sys.argv, ["solidify", *map(str, words)]
    try:
        __main__.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0


def hashes_of(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
