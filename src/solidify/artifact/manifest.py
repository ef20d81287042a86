"""The manifest: what an artifact or an adapter is made of, and the digests that prove it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from solidify import disk
from solidify.errors import ArtifactError
from solidify.weights import checkpoint, format, known
from solidify.weights.hashing import ALGORITHM, digest_bytes, digest_values

NAME = "solidify.json"
CARD = "README.md"
FORMAT = 1
PACKAGES = ("solidify", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Manifest:
    """Lineage and digests of a directory. `kind` is `artifact`, `adapter` or `stock` (a merged model of stock layout).

    For an artifact, `code` and `files` map file names to digests, `tensors` tensor names, and `headers` the names of
    weight files to the digests of what stands before their tensors. For an adapter, `base` holds the three digests of
    the artifact it belongs to and where that stood, and `trained` what it trains. `lineage` lists, oldest first, what
    was done to get here.
    """

    kind: str
    base: dict[str, Any]
    lineage: list[dict[str, Any]] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    trained: dict[str, list[str]] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    requirements: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    algorithm: str = ALGORITHM
    format: int = FORMAT

    def digest(self) -> dict[str, str]:
        """Returns one digest each for configuration, code and weights: the fingerprint that an adapter records."""
        return {
            "configuration": self.files.get("config.json", ""),
            "code": digest_values(self.code),
            "weights": digest_values(self.tensors),
        }

    def write(self, directory: Path) -> None:
        """Writes the manifest into `directory`."""
        document = asdict(self)
        (directory / NAME).write_text(_text(document, digest_values(document)), encoding="utf-8")


def _text(document: dict[str, Any], digest: str) -> str:
    return json.dumps({**document, "digest": digest}, indent=1, ensure_ascii=False) + "\n"


def read(directory: Path, kind: str | None = None) -> Manifest:
    """Reads the manifest of `directory`.

    Raises:
        ArtifactError: there is none, it is not readable, was changed, is of a newer format, or of another kind than
            `kind`.
    """
    path = directory / NAME
    if not directory.is_dir():
        raise ArtifactError(f"the directory {directory} does not exist")
    if not path.is_file():
        raise ArtifactError(f"{directory} has no {NAME}: it was not made by solidify")
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text)
        known = {f.name for f in fields(Manifest)}
        if document["format"] > FORMAT:
            raise ArtifactError(
                f"{path} has format {document['format']}, but this solidify reads up to {FORMAT}; upgrade it"
            )
        if document["algorithm"] != ALGORITHM:
            raise ArtifactError(f"{path} holds {document['algorithm']} digests, and not {ALGORITHM}; build it anew")
        digest = document.pop("digest", None)
        if digest != digest_values(document) or text != _text(document, digest):
            raise ArtifactError(f"{path} is not the manifest that was written (its digest differs); build it anew")
        manifest = Manifest(**{key: value for key, value in document.items() if key in known})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is not a manifest: {type(error).__name__}: {error}") from error
    disk.refuse_names(path, [*manifest.code, *manifest.files, *manifest.headers])
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{directory} is an {manifest.kind}, but an {kind} was expected")
    return manifest


def kind(directory: Path) -> str | None:
    """Returns what a directory is by its manifest; None where there is none.

    Raises:
        ArtifactError: the manifest is not readable, or was changed.
    """
    return read(directory).kind if (directory / NAME).is_file() else None


def current_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that an artifact depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def faults(directory: Path, manifest: Manifest, *, card: bool = True, fresh: bool = False) -> list[str]:
    """Compares a directory with its manifest, without running any of its code; on demand without its model card, which
    people may edit.

    Tensors in files that are unchanged since their digests were computed are not read again, unless `fresh`.

    Returns one sentence for every file or tensor that is missing, additional or changed.
    """
    result = []
    for name, expected in {**manifest.code, **manifest.files}.items():
        path = directory / name
        if name == CARD and not card:
            continue
        if not path.is_file():
            result.append(f"{name} is missing")
        elif digest_bytes(path.read_bytes()) != expected:
            result.append(f"{name} is not the file that was written (its digest differs)")
    extra = sorted(p.name for p in directory.glob("*.py") if p.name not in manifest.code)
    result += [f"{name} is code that the manifest does not know" for name in extra]
    if manifest.tensors:
        result += _tensor_faults(directory, manifest, fresh)
    return result


def _tensor_faults(directory: Path, manifest: Manifest, fresh: bool) -> list[str]:
    adapter = directory / "adapter_model.safetensors"
    try:
        paths = [adapter] if manifest.kind == "adapter" else checkpoint.read(directory).files
        found = known.digests(paths, fresh=fresh)
    except (ArtifactError, OSError) as error:
        return [str(error)]
    expected = manifest.tensors
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    heads = {path.name: format.header_digest(path) for path in paths}
    return [
        *(
            f"the header of {name} is not the one that was written"
            for name, d in manifest.headers.items()
            if heads.get(name) != d
        ),
        *(f"the tensor {name} is missing" for name in expected if name not in found),
        *(f"the tensor {name} is not in the manifest" for name in found if name not in expected),
        *(f"the tensor {name} is not the one that was written (its digest differs)" for name in changed),
    ]
