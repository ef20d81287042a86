"""Whose code may run: an artifact built on this machine is known by its code's digest, any other must be allowed."""

from __future__ import annotations

from pathlib import Path

from solidify import places
from solidify.artifact.manifest import Manifest
from solidify.errors import ArtifactError


def remember(manifest: Manifest) -> None:
    """Notes that the code of this artifact was written here."""
    directory = places.cache() / "trusted"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / manifest.digest()["code"]).touch()


def require(manifest: Manifest, directory: Path, trust_remote_code: bool) -> None:
    """Raises ArtifactError unless the code was written here or the caller allows it."""
    if trust_remote_code or (places.cache() / "trusted" / manifest.digest()["code"]).is_file():
        return
    raise ArtifactError(
        f"{directory} carries code that was not built on this machine: {', '.join(sorted(manifest.code))}. "
        "Read it; to run it, pass trust_remote_code=True (--trust-remote-code)"
    )
