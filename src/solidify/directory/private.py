"""A private copy of an artifact, for transformers to read and to import from.

Its files were digested on their way into the copy, and nobody else may write there: what is imported is what was
digested, whatever happens to the directory meanwhile. It holds what the manifest lists and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from solidify.directory import manifest, trust
from solidify.directory.manifest import CARD, Manifest
from solidify.errors import ArtifactError, refuse
from solidify.system import disk, files
from solidify.weights.hashing import digest_bytes


@contextmanager
def copy(directory: Path, record: Manifest) -> Iterator[Path]:
    """Yields a directory of the same name that holds the files of an artifact; weights are links to where they stand.

    It is gone when the block ends; what still names it is pointed back by `point_back`.

    Raises:
        ArtifactError: a file is not, or not any more, the one that the manifest lists, or it leads to other code.
    """
    with disk.temporary() as root:  # of mode 0700
        private = root.resolve() / directory.name
        private.mkdir()
        faults = [fault for name in record.listed() if (fault := _copy_file(directory, private, name, record))]
        refuse(ArtifactError, f"{directory} is not what was written", faults)
        trust.refuse_leading(directory, record, private)
        record.write(private)
        yield private


def _copy_file(directory: Path, private: Path, name: str, record: Manifest) -> str | None:
    """Puts one file into the copy; returns what is wrong with it."""
    source, target = directory / name, private / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if name in record.headers:
        target.symlink_to(source)
        return None
    if not manifest.is_plain(source):
        return f"{manifest.shown(name)} is missing"
    content = files.content(source)
    if name != CARD and digest_bytes(content) != record.listed()[name]:
        return f"{manifest.shown(name)} is not the file that was written (its digest differs)"
    target.write_bytes(content)
    return None


def point_back(thing: Any, private: Path, directory: Path) -> None:
    """Lets a model, tokenizer or processor name the directory wherever it names the copy that it was read from."""
    seen: set[int] = set()
    things = [thing]
    if isinstance(thing, PreTrainedModel):
        held = (value for module in thing.modules() for value in vars(module).values())
        things = [value for value in held if isinstance(value, (PreTrainedConfig, GenerationConfig))]
        vars(thing)["name_or_path"] = str(directory)
    for each in things:
        _replace_paths(each, str(private), str(directory), seen)


def _replace_paths(thing: Any, old: str, new: str, seen: set[int]) -> Any:
    """Returns a value with every path changed; things are changed in place, and so is what they hold."""
    if isinstance(thing, str):
        return new + thing[len(old) :] if thing == old or thing.startswith(f"{old}/") else thing
    if isinstance(thing, tuple) and type(thing) is tuple:
        return tuple(_replace_paths(each, old, new, seen) for each in thing)
    if id(thing) in seen:
        return thing
    seen.add(id(thing))
    if isinstance(thing, dict):
        for key, value in thing.items():
            thing[key] = _replace_paths(value, old, new, seen)
    elif isinstance(thing, list):
        thing[:] = [_replace_paths(each, old, new, seen) for each in thing]
    elif type(thing).__module__.partition(".")[0] in ("transformers", "transformers_modules") and hasattr(
        thing, "__dict__"
    ):
        _replace_paths(vars(thing), old, new, seen)
    return thing
