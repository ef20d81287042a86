"""To the hub: exactly the files that a manifest lists, after all of them were compared with it.

Manifests say where bases and data stand on this machine; what is uploaded names them by their last part, and the base
of an adapter by its id of the hub.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

from solidify.artifact import autos, cards
from solidify.directory import manifest
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, refuse
from solidify.system import files, foreign
from solidify.weights import hashing

_KEPT_BY_HUB = (".gitattributes",)
_NAMED = 6


@dataclass(frozen=True)
class Push:
    """What was uploaded, or would be: sizes in bytes by file, and why others stay.

    `paths` are the places in those files that name a path of this machine. `removed` are files of an earlier push that
    go. `url` is empty where nothing was uploaded.
    """

    repo: str
    kind: str
    private: bool
    files: dict[str, int]
    left: dict[str, str]
    removed: list[str]
    paths: list[str]
    url: str = ""

    def document(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return {key: getattr(self, key) for key in self.__dataclass_fields__}


def push(
    directory: str | Path, repo: str, *, private: bool = True, dry_run: bool = False, base: str | None = None
) -> Push:
    """Uploads an artifact, an adapter or a merged model to the hub, as one commit; private unless said otherwise.

    All of it is compared with its manifest first. `base` is the id under which an adapter's base is on the hub. With
    `dry_run` nothing is sent, and nobody is asked.

    Raises:
        ArtifactError: the directory is not what was written, an adapter's base has no id, the repository is not what it
            should be (public, or with files that are not ours), or the hub refuses.
    """
    directory = Path(directory).resolve()
    record = manifest.read(directory)
    faults = manifest.faults(directory, record)
    faults = [f"{each}; if it was edited on purpose: solidify adopt {directory} README.md" if _is_card(each) else each
              for each in faults]  # fmt: skip
    refuse(ArtifactError, f"{directory} is not what was written, and is not uploaded", faults)
    with foreign.calling(f"{repo!r} is no name of a repository", ArtifactError):
        _refuse_name(repo)
    with _prepared(directory, record, base) as sources:
        sizes = {name: path.stat().st_size for name, path in sorted(sources.items())}
        found = Push(repo, record.kind, private, sizes, _list_left(directory, record), [], _find_paths(sources))
        return found if dry_run else _upload(found, sources)


def _is_card(fault: str) -> bool:
    return fault.startswith(manifest.CARD) and "is not the file" in fault


def _refuse_name(repo: str) -> None:
    try_to_load_from_cache(repo, manifest.NAME)  # asks nobody, and judges the name as every call of the hub does
    if "/" not in repo:
        raise ArtifactError(f"{repo!r} does not say whose repository it is; write OWNER/NAME")


def _list_left(directory: Path, record: Manifest) -> dict[str, str]:
    """Says what stands in the directory and is not uploaded: nothing but what tools leave may be there."""
    listed = {manifest.NAME, manifest.SIGNATURE, *record.listed()}
    tops = {name.partition("/")[0] for name in listed}
    return {path.name: "left by tools" for path in sorted(directory.iterdir()) if path.name not in tops}


@contextmanager
def _prepared(directory: Path, record: Manifest, base: str | None) -> Iterator[dict[str, Path]]:
    """Yields the files to upload, by name; those of an adapter that name its base stand in a directory of their own."""
    names = [manifest.NAME, *record.listed()]
    names += [manifest.SIGNATURE] if files.is_file(directory / manifest.SIGNATURE) else []
    sources = {name: directory / name for name in names}
    public = _without_paths(record)
    if record.kind != "adapter":
        if base is not None:
            raise ArtifactError(f"{directory} is {manifest.name_kind(record.kind)}; --base goes with an adapter")
        with tempfile.TemporaryDirectory() as scratch:
            if public != record:
                _refuse_signed(directory, record, public)
                public.write(Path(scratch))
                sources[manifest.NAME] = Path(scratch) / manifest.NAME
            yield sources
        return
    if base is None:
        raise ArtifactError(
            f"the adapter {directory} names its base by where it stands on this machine; say under which id that is on "
            "the hub (--base OWNER/NAME), where it was pushed before"
        )
    if manifest.SIGNATURE in sources:
        raise ArtifactError(
            f"{directory} is signed, and what names its base by a path is written anew for the hub; remove "
            f"{manifest.SIGNATURE}, push it, and sign what is downloaded"
        )
    _refuse_name(base)
    with tempfile.TemporaryDirectory() as scratch:
        yield sources | _name_base(directory, public, base, Path(scratch))


def _without_paths(record: Manifest) -> Manifest:
    """Returns a manifest whose bases, data and code have the names by which others know them, and not where they stand.

    What surgery recorded stays as it is: the configuration holds the same.
    """
    base = record.base if record.kind == "adapter" else _tell(record.base)
    lineage = [{k: v if k == "edits" else _tell(v, k) for k, v in step.items()} for step in record.lineage]
    failed = [{**found, "evidence": _tell_words(found["evidence"])} for found in record.failed]
    return replace(record, base=base, lineage=lineage, recipe=_tell(record.recipe), failed=failed)


def _tell(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _tell(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_tell(inner, key) for inner in value]
    away = isinstance(value, str) and (key == "model" or _is_path(value) or value.startswith(("../", "~/")))
    return manifest.public_name(value) if away else value


def _tell_words(evidence: str) -> str:
    """Names paths within a sentence by their last part."""
    return " ".join(manifest.public_name(word) if _is_path(word) else word for word in evidence.split(" "))


def _refuse_signed(directory: Path, record: Manifest, public: Manifest) -> None:
    """Raises ArtifactError when a signature would not hold of the manifest that is uploaded."""
    if not files.is_file(directory / manifest.SIGNATURE):
        return
    parts = ("base", "lineage", "recipe", "failed")
    here, there = (dict(_walk_values({part: getattr(each, part) for part in parts})) for each in (record, public))
    key, text = next((key, text) for key, text in here.items() if there[key] != text)
    raise ArtifactError(
        f"{directory} is signed, and its manifest names a path of this machine ({key} is {text}), which is not "
        f"uploaded; remove {manifest.SIGNATURE}, push it, and sign what is downloaded"
    )


def _name_base(directory: Path, record: Manifest, base: str, scratch: Path) -> dict[str, Path]:
    """Writes configuration, card and manifest of an adapter with its base's id of the hub, and returns their paths."""
    configuration = files.document(directory / manifest.ADAPTER_CONFIG)
    local = Path(str(record.base.get("path", "")))
    known = files.is_file(local / manifest.NAME)
    artifact = manifest.read(local, manifest.MODELS) if known else Manifest("artifact", {})
    auto = autos.auto_class(local) if files.is_file(local / "config.json") else "AutoModel"
    configuration["base_model_name_or_path"] = base
    (scratch / manifest.ADAPTER_CONFIG).write_text(
        json.dumps(configuration, indent=2, sort_keys=True), encoding="utf-8"
    )
    card = cards.adapter_card(record, configuration, artifact, auto, base)
    (scratch / manifest.CARD).write_text(card, encoding="utf-8")
    written = {name: hashing.digest_file(scratch / name) for name in (manifest.ADAPTER_CONFIG, manifest.CARD)}
    named = {**record.base, "path": base, "relative": ""}
    replace(record, base=named, files={**record.files, **written}).write(scratch)
    return {name: scratch / name for name in (*written, manifest.NAME)}


def _find_paths(sources: Mapping[str, Path]) -> list[str]:
    """Names the entries of JSON files at the top that are paths of a file system, which tell where somebody works."""
    found = []
    for name, path in sources.items():
        if not name.endswith(".json") or "/" in name or name.startswith("tokenizer") or name.endswith(".index.json"):
            continue
        read = foreign.attempt(files.document, path)
        found += [f"{name}: {key} is {text}" for key, text in _walk_values(read.value or {}) if _is_path(text)]
    return found


def _is_path(text: str) -> bool:
    return (Path(text).is_absolute() and len(Path(text).parts) > 2) or PureWindowsPath(text).drive != ""


def _walk_values(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk_values(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _walk_values(inner, f"{key}.{number}")


def _upload(found: Push, sources: Mapping[str, Path]) -> Push:
    """Sends everything as one commit to the repository, which is made if it is not there."""
    api = HfApi()
    remedy = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"
    with foreign.calling(f"{found.repo} cannot be written to", ArtifactError, remedy=remedy):
        removed = _look_before(api, found)
        api.create_repo(found.repo, private=found.private, exist_ok=True)
        operations: list[Any] = [CommitOperationDelete(path_in_repo=name) for name in removed]
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(p)) for name, p in sources.items()]
        message = f"Upload {manifest.name_kind(found.kind)} with solidify"
        commit = api.create_commit(found.repo, operations, commit_message=message)
    return replace(found, removed=removed, url=str(commit.commit_url))


def _look_before(api: HfApi, found: Push) -> list[str]:
    """Returns which files of an earlier push go; a reader refuses a directory that holds more than is listed.

    Raises:
        ArtifactError: the repository is public and was to be private, or holds files that no push of ours left there.
    """
    try:
        there = api.repo_info(found.repo)
    except RepositoryNotFoundError:
        return []
    if found.private and there.private is False:
        raise ArtifactError(f"{found.repo} is public; say so (--public), or name another repository")
    names = set(api.list_repo_files(found.repo)) - set(_KEPT_BY_HUB)
    others = sorted(names - set(found.files))
    strange = [name for name in others if name not in _listed_there(api, found.repo)]
    refuse(
        ArtifactError,
        f"{found.repo} holds files that are not of an earlier push, and readers would refuse them beside these; name "
        "another repository, or remove them there",
        strange[:_NAMED],
    )
    return others


def _listed_there(api: HfApi, repo: str) -> set[str]:
    """Returns the names of what an earlier push left in a repository, as its manifest says."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = Path(api.hf_hub_download(repo, manifest.NAME, local_dir=scratch))
        except RemoteEntryNotFoundError:
            return set()
        record = manifest.read(path.parent, closed=False)
        return {manifest.NAME, manifest.SIGNATURE, *record.listed()}
