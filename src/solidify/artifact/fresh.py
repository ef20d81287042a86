"""The fresh process that looks at an artifact: begun, if one knows that it will be asked, before anything is imported.

It takes as long for its imports as this process does for its own, and does them beside these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from solidify.errors import ArtifactError
from solidify.system import files
from solidify.system.alone import Alone

WITNESS = Path(__file__).with_name("witness.py")
# Packages that the process must do without: what they are needed for would not load for everybody.
FORBIDDEN = ("solidify", "peft")
_begun: list[Alone] = []


@contextmanager
def begun(wanted: bool) -> Iterator[None]:
    """Has a process begin now, if it is `wanted`; who starts one while the block lasts has this one."""
    if not wanted:
        yield
        return
    process = Alone(WITNESS, FORBIDDEN)
    process.__enter__()
    _begun.append(process)
    try:
        yield
    finally:
        if process in _begun:  # nobody came
            _begun.remove(process)
            process.__exit__()


@contextmanager
def started() -> Iterator[Alone]:
    """Starts the process of one `certificate.witness`; entered early, it has its imports done when it is asked."""
    if not _begun:
        with Alone(WITNESS, FORBIDDEN) as process:
            yield process
        return
    process = _begun.pop()
    try:
        yield process
    finally:
        process.__exit__()


def is_artifact(directory: Path) -> bool:
    """Returns whether a directory says of itself that it is an artifact; what is wrong with it is told by others."""
    return _read_manifest(directory).get("kind") == "artifact"


def is_on_artifact(adapter: Path, base: str | None) -> bool:
    """Returns whether an adapter's base is an artifact: the one that is given, or the one that its manifest names."""
    return any(is_artifact(each) for each in _list_bases(adapter, base))


def find_weights(directory: Path, base: str | None) -> Path:
    """Returns the directory whose weights a check of another reads: of an adapter, its base's."""
    if _read_manifest(directory).get("kind") != "adapter":
        return directory
    return next((each for each in _list_bases(directory, base) if files.is_file(each / "solidify.json")), directory)


def _list_bases(adapter: Path, base: str | None) -> list[Path]:
    """Lists where an adapter's base may stand: where it is said to, or where its manifest says."""
    named = _read_manifest(adapter).get("base")
    named = named if isinstance(named, dict) else {}
    if base is not None:
        return [Path(base)]
    path, relative = (str(named[key]) if key in named else None for key in ("path", "relative"))
    return [*([Path(path)] if path else []), *([adapter / relative] if relative else [])]


def _read_manifest(directory: Path) -> dict[str, Any]:
    with suppress(ArtifactError):
        return files.document(directory / "solidify.json")
    return {}
