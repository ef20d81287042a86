"""Whose code may run: what was built on this machine, what was trusted by name, else what one command is allowed to.

What is trusted is no code alone, but everything that decides what runs: one digest of every listed file but the model
card and the weights. Permission (`trust_remote_code`) is for the command that it was given to; nothing notes it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from solidify.directory import manifest
from solidify.directory.manifest import CARD, NAME, Manifest, shown
from solidify.errors import ArtifactError, refuse
from solidify.system import disk, files
from solidify.upstream.transformers import set_time_to_answer, time_to_answer
from solidify.weights.hashing import digest_file, digest_values

_CLASS = re.compile(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
_DYNAMIC = "transformers_modules"  # the package that transformers imports the code of models into
_LEADING = ("auto_map", "custom_pipelines")
_NAMED = 6  # names in one sentence
_lock, _silenced = threading.Lock(), list[int]()
_permitted: ContextVar[frozenset[str]] = ContextVar("_permitted", default=frozenset())


def fingerprint(record: Manifest) -> str:
    """Returns the digest of all that decides what runs: code, configurations, tokenizer, templates, certificate."""
    return digest_values({name: d for name, d in {**record.code, **record.files}.items() if name != CARD})


def remember(record: Manifest) -> None:
    """Notes that what this manifest lists may run here: it was built here, or is trusted by name."""
    (disk.cache_for("trusted") / fingerprint(record)).touch()


def known(record: Manifest) -> bool:
    """Returns whether what this manifest lists may run here without being asked for."""
    return (disk.cache() / "trusted" / fingerprint(record)).is_file()


@contextmanager
def permitting(digest: str) -> Iterator[None]:
    """Lets what has this fingerprint run inside of the block, and nothing else that stands in its place by now."""
    token = _permitted.set(_permitted.get() | {digest})
    try:
        yield
    finally:
        _permitted.reset(token)


@contextmanager
def never_asking() -> Iterator[None]:
    """Keeps transformers from asking at the terminal, inside of the block, whether code may run: it is refused.

    A model of several parts builds them by Auto classes to which nobody can pass what is permitted. The time that
    transformers gives for an answer is one for the whole process; 0 means that nobody answers.
    """
    with _lock:
        _silenced.append(time_to_answer())
        set_time_to_answer(0)
    try:
        yield
    finally:
        with _lock:  # of blocks that overlap in several threads, the last one to end gives it back
            before = _silenced[0]
            _silenced.pop()
            if not _silenced:
                set_time_to_answer(before)


def require(record: Manifest, directory: Path, trust_remote_code: bool) -> None:
    """Raises ArtifactError unless the code was built or trusted here, or the caller allows it for this once."""
    if trust_remote_code or fingerprint(record) in _permitted.get() or known(record):
        return
    if record.kind == "stock" and not record.code:  # transformers' own classes, and nothing else
        return
    raise ArtifactError(
        f"{directory} carries code that is not trusted on this machine: {', '.join(sorted(record.code)[:_NAMED])}. "
        "Read it; to run it this once, pass trust_remote_code=True (--trust-remote-code), and to run it from now on, "
        f"say so: solidify trust {directory}"
    )


def trust(directory: str | Path, *, forget: bool = False) -> Manifest:
    """Lets code, of an artifact or a form of it, exactly as it stands, run here from now on; `forget` ends that.

    Returns its manifest, which names what was trusted.

    Raises:
        ArtifactError: it is not an artifact, something in it is not what was written, or it leads to other code.
    """
    directory = Path(directory).resolve()
    record = manifest.read(directory, manifest.MODELS)
    if forget:
        (disk.cache_for("trusted") / fingerprint(record)).unlink(missing_ok=True)
        return record
    faults = manifest.faults(directory, record, card=False, weights=False)
    refuse(ArtifactError, f"{directory} is not what was written", faults)
    if not record.code:
        raise ArtifactError(f"{directory} carries no code that could be trusted: it loads as it is")
    title = f"{directory} would run code that is not its own"
    refuse(ArtifactError, title, leads(directory, record, every_kind=True))
    remember(record)
    return record


def refuse_leading(directory: Path, record: Manifest, where: Path | None = None) -> None:
    """Raises ArtifactError when something in a directory (or in a copy of it) leads to code that is not its own."""
    refuse(ArtifactError, f"{directory} would run code that is not its own", leads(where or directory, record))


def leads(directory: Path, record: Manifest, *, every_kind: bool = False) -> list[str]:
    """Says what in the JSON files of a model's directory leads to code or weights that are not its own listed files.

    `auto_map` and `custom_pipelines` name classes, `..._implementation` may name a repository of kernels, and
    `adapter_config.json` has transformers load another model. With `every_kind` plain models are asked, too.
    """
    if (
        record.kind != "artifact" and not every_kind
    ):  # the others have no code of ours; a merged plain model is loaded as any plain one
        return []
    faults = []
    for name in sorted(record.files):
        if name.rpartition("/")[2] == manifest.ADAPTER_CONFIG:
            faults.append(f"{shown(name)} puts an adapter on it, and may name another base")
        if not name.endswith(".json"):
            continue
        for key, value in _read_settings(directory / name):
            if key == "auto_map":
                own = all(_leads_home(reference, record) for reference in texts(value))
            elif key == "custom_pipelines":
                impl = [task.get("impl", "") if isinstance(task, dict) else task for task in _list_values(value)]
                own = all(_leads_home(reference, record) for reference in texts(impl))
            else:
                own = not any("/" in word for word in texts(value))
            if not own:
                faults.append(f"{key} in {shown(name)} leads to {value!a}")
    return faults


def _leads_home(reference: str, record: Manifest) -> bool:
    found = _CLASS.fullmatch(reference)
    return found is not None and f"{found[1]}.py" in record.code


def _read_settings(path: Path) -> list[tuple[str, Any]]:
    """Returns what a JSON file says, at any depth, of where code is; what is no JSON is none to transformers either."""
    found: list[tuple[str, Any]] = []

    def look(mapping: dict[str, Any]) -> dict[str, Any]:
        found.extend((k, v) for k, v in mapping.items() if k in _LEADING or k.endswith("_implementation"))
        return mapping

    if not manifest.is_plain(path):
        return []
    content = files.content(path, largest=files.LARGEST)
    try:
        json.loads(content.decode("utf-8"), object_hook=look)
    except ValueError:
        return []
    except RecursionError as error:
        raise ArtifactError(f"{path} is nested too deeply to be a configuration") from error
    return found


def _list_values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else [value]


def texts(value: Any) -> Iterator[str]:
    """Yields every text in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def strange_classes(model: Any, preparing: Any = None) -> list[str]:
    """Names the classes of a model, and of what prepares its inputs, whose code came with a model from elsewhere.

    The code of an artifact that is known here did not.
    """
    things = [model.config, *model.modules(), preparing, *getattr(preparing, "__dict__", {}).values()]
    classes = {type(thing) for thing in things}
    carried = [cls for cls in classes if cls.__module__.partition(".")[0] == _DYNAMIC]
    where = Path(str(model.config.name_or_path or "nowhere"))
    record = manifest.read(where, "artifact") if carried and (where / NAME).is_file() else None
    own = set(record.code.values()) if record is not None and known(record) else set()
    return sorted(cls.__name__ for cls in carried if _source_digest(cls) not in own)


def _source_digest(cls: type) -> str:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return digest_file(Path(file)) if file and Path(file).is_file() else ""
