"""Files that people put into a directory of ours on purpose: shown, then listed in its manifest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from solidify.directory import manifest, trust
from solidify.directory.manifest import NAME, SIGNATURE, Manifest, shown
from solidify.errors import ArtifactError, refuse
from solidify.system import files as reading
from solidify.weights.hashing import digest_bytes

_WEIGHTS = re.compile(r"(?i)[^/]+\.safetensors|(pytorch|adapter)_model[^/]*\.bin")  # where loaders look for weights
SHOWN = 2**16  # bytes of a text that are shown; code is shown to its end


@dataclass(frozen=True)
class Adopted:
    """A file that is now listed. `text` is what it says, None where it is no text; `before` its digest until now."""

    name: str
    size: int
    digest: str
    text: str | None
    before: str | None = None


def read(directory: str | Path, files: Sequence[str | Path]) -> list[Adopted]:
    """Reads the files that are to be listed, and changes nothing: to be shown first.

    Raises:
        ArtifactError: solidify did not write the directory; a name leads out of it, or there is no plain file of that
            name; it is the manifest, or weights, which are listed tensor by tensor when they are written.
    """
    directory = Path(directory).resolve()
    record = manifest.read(directory, closed=False)
    names = list(dict.fromkeys(_find_name(directory, file) for file in files))
    refuse(
        ArtifactError,
        f"{directory} is not changed",
        [f for name in names if (f := _find_fault(directory, record, name))],
    )
    found = []
    for name in names:
        content = reading.content(directory / name)
        shown_at_most = len(content) if name.endswith(".py") else SHOWN
        text = _decode_text(content[:shown_at_most])
        found.append(Adopted(name, len(content), digest_bytes(content), text, record.listed().get(name)))
    return found


def adopt(directory: str | Path, files: Sequence[str | Path]) -> list[Adopted]:
    """Lists files in the manifest of an artifact, an adapter or a merged model, as they stand in it now.

    A file that is listed already is listed again, with what it holds now. Code that was trusted on this machine stays
    trusted, because its owner adds the files; an adapter does not fit a base whose code or configuration this changes.

    Raises:
        ArtifactError: as `read`; or a configuration leads to code that is not among the directory's own files.
    """
    directory = Path(directory).resolve()
    return keep(directory, read(directory, files))


def keep(directory: Path, adopted: Sequence[Adopted]) -> list[Adopted]:
    """Lists files exactly as they were read, whatever stands there by now; otherwise as `adopt`."""
    record = manifest.read(directory, closed=False)
    code = {file.name: file.digest for file in adopted if file.name.endswith(".py")}
    others = {file.name: file.digest for file in adopted if not file.name.endswith(".py")}
    step = {"step": "adopt", "files": {**code, **others}}
    made = replace(
        record,
        code={**record.code, **code},
        files={**record.files, **others},
        lineage=[*record.lineage, step],
    )
    trust.refuse_leading(directory, made)
    trusted = record.kind == "artifact" and trust.known(record)
    made.write(directory)
    if trusted:
        trust.remember(made)
    return list(adopted)


def _find_name(directory: Path, file: str | Path) -> str:
    """Returns a file's name in the directory, for a path to it or for that name itself."""
    path = Path(file)
    if path.is_absolute() or not (directory / path).exists():
        path = path.absolute()
        path = path.parent.resolve() / path.name  # the file itself may be a link, which is then refused
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else path.as_posix()


def _find_fault(directory: Path, record: Manifest, name: str) -> str | None:
    if not manifest.is_inside(name):
        return f"{shown(name)} is not a file inside it"
    if name == NAME:
        return f"{NAME} is the manifest itself"
    if name == SIGNATURE:
        return f"{SIGNATURE} is the name of a signature, which no manifest lists"
    if name in record.headers:
        return (
            f"{shown(name)} holds weights, which are listed tensor by tensor when they are written; build the "
            "artifact again"
        )
    if _WEIGHTS.fullmatch(name):
        return (
            f"{shown(name)} has the name of a weight file, which no other file may have; remove it, or build the "
            "artifact again"
        )
    parts = [directory.joinpath(*Path(name).parts[:count]) for count in range(1, len(Path(name).parts))]
    if any(part.is_symlink() for part in parts) or not manifest.is_plain(directory / name):
        return f"{shown(name)} is not a plain file inside it"
    return None


def _decode_text(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        return content[: error.start].decode("utf-8") if error.reason == "unexpected end of data" else None
