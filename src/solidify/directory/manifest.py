"""The manifest: what an artifact or an adapter is made of, and the digests that prove it.

It is closed: what it does not list does not belong to the directory, and refuses it (`strangers`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from solidify.errors import ArtifactError, refuse
from solidify.system import disk, files
from solidify.weights import checkpoint, digest_cache, format
from solidify.weights.hashing import ALGORITHM, digest_file, digest_values

NAME = "solidify.json"
CARD = "README.md"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names
SIGNATURE = "model.sig"  # signs the manifest and all that it lists (`signing.py`), so no manifest lists it
LARGEST_SIGNATURE = 2**24  # bytes; a name and a digest for every file
FORMAT = 1
PARTS = ("artifact", "adapter", "merged")  # of a run, each with a manifest of its own
KINDS = ("artifact", "adapter", "stock")
MODELS = ("artifact", "stock")  # what can be loaded, trained on and merged into
# What version control, the hub's client and file browsers leave. Nothing that loads a model opens any of it by name,
# and none of it can be imported; it is not even listed to them, since they are given a private copy (`private.py`).
LEFT_BY_TOOLS = (".gitattributes", ".gitignore", ".DS_Store")
LEFT_BY_TOOLS_IN = (".git", ".cache/huggingface")
_DRAFT = re.compile(rf"\.({re.escape(NAME)}|{re.escape(SIGNATURE)})\.partial-\d+")  # of an interrupted `disk.write`
_DIGESTS = ("code", "files", "tensors", "headers")
_NAMED = 6  # names in one sentence


@dataclass(frozen=True)
class Manifest:
    """Lineage and digests of a directory. `kind` is `artifact`, `adapter` or `stock` (a plain model, merged or not).

    For an artifact, `code` and `files` map file names to digests, `tensors` tensor names, and `headers` the names of
    weight files to the digests of what stands before their tensors. For an adapter, `base` holds the three digests of
    the artifact it belongs to and where that stood, and `trained` what it trains. `lineage` lists, oldest first, what
    was done to get here, and `failed` what was found wrong on the way: findings that no later command may forget.
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
    failed: list[dict[str, Any]] = field(default_factory=list)
    algorithm: str = ALGORITHM
    format: int = FORMAT
    sha256 = ""  # of the file that this was read from; no field, since it is not written

    def digest(self) -> dict[str, str]:
        """Returns one digest each for configuration, code and weights: the fingerprint that an adapter records."""
        return {
            "configuration": self.files.get("config.json", ""),
            "code": digest_values(self.code),
            "weights": digest_values(self.tensors),
        }

    def listed(self) -> dict[str, str]:
        """Returns the digest of every file but the manifest and a signature; that of a weight file is its header's."""
        return {**self.code, **self.files, **self.headers}

    def write(self, directory: Path) -> None:
        """Writes the manifest into `directory`, at once: who reads it finds the old one or this one.

        Raises:
            ArtifactError: a file has a name that no manifest may hold.
        """
        refuse(ArtifactError, f"{directory} cannot be listed", name_faults(self))
        document = asdict(self)
        disk.write(directory / NAME, _format_text(document, digest_values(document)))


def _format_text(document: dict[str, Any], digest: str) -> str:
    return json.dumps({**document, "digest": digest}, indent=1, ensure_ascii=False) + "\n"


def read(directory: Path, kind: str | tuple[str, ...] | None = None, *, closed: bool = True) -> Manifest:
    """Reads the manifest of `directory`, and looks whether the directory holds what it lists and nothing else.

    Of the files, names and kinds are looked at and no content (`faults` does). Who looks for strangers in another way
    asks for one that is not `closed`.

    Raises:
        ArtifactError: there is none, it is not readable, was changed, is of a newer format, or of another kind than
            `kind` (all of them); a name in it leads elsewhere; something stands in the directory that it does not list,
            or lacks.
    """
    path = directory / NAME
    if not files.is_directory(directory):
        raise ArtifactError(f"the directory {directory} does not exist")
    if not files.is_file(path):
        refuse_run(directory)
        plain = files.is_file(directory / "config.json")
        remedy = f"; `solidify init {directory} --replace none` writes a recipe that takes it as its base"
        remedy = remedy if plain else ""
        if files.is_file(directory / ADAPTER_CONFIG):
            remedy = ", or it is an adapter that was exported for another program; merge or load it as a plain adapter"
        raise ArtifactError(f"{directory} has no {NAME}: it was not made by solidify{remedy}")
    manifest = _parse_manifest(path)
    wanted = (kind,) if isinstance(kind, str) else kind
    if wanted is not None and manifest.kind not in wanted:
        found, asked = name_kind(manifest.kind), " or ".join(map(name_kind, wanted))
        raise ArtifactError(f"{directory} is {found}, but {asked} was expected: name the directory of one")
    if closed:
        refuse(ArtifactError, f"{directory} is not what was written", strangers(directory, manifest))
    return manifest


def name_kind(kind: str) -> str:
    """Writes what a directory is, by the `kind` of its manifest, with its article."""
    return "a model of stock layout" if kind == "stock" else f"an {kind}"


def refuse_run(directory: Path) -> None:
    """Refuses the output of a run in the place of one of its parts, which are named.

    Raises:
        ArtifactError: it is one.
    """
    parts = [part for part in PARTS if files.is_file(directory / part / NAME)]
    own = any(files.is_file(directory / name) for name in (NAME, "config.json"))
    if parts and not own:
        each = " or ".join(str(directory / part) for part in parts)
        raise ArtifactError(f"{directory} is the output of a run, which has no {NAME} of its own: name {each}")


def _parse_manifest(path: Path) -> Manifest:
    try:
        text = files.text(path)
        document = json.loads(text)
        field_names = {f.name for f in fields(Manifest)}
        if document["format"] > FORMAT:
            raise ArtifactError(
                f"{path} has format {document['format']}, but this solidify reads up to {FORMAT}; upgrade solidify"
            )
        if document["algorithm"] != ALGORITHM:
            raise ArtifactError(f"{path} holds {document['algorithm']} digests, and not {ALGORITHM}; build it again")
        digest = document.pop("digest", None)
        if digest != digest_values(document) or text != _format_text(document, digest):
            raise ArtifactError(f"{path} is not the manifest that was written (its digest differs); build it again")
        manifest = Manifest(**{key: value for key, value in document.items() if key in field_names})
        object.__setattr__(manifest, "sha256", hashlib.sha256(text.encode()).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is not a manifest: {type(error).__name__}: {error}") from error
    refuse(
        ArtifactError, f"{path} is not a manifest that solidify writes", _form_faults(manifest) or name_faults(manifest)
    )
    return manifest


def _form_faults(manifest: Manifest) -> list[str]:
    """Says which fields are not of the form that they are written in."""
    faults = [] if manifest.kind in KINDS else [f"`kind` is {manifest.kind!r}, which is none of {', '.join(KINDS)}"]
    for key in (*_DIGESTS, "requirements", "versions"):
        value = getattr(manifest, key)
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            faults.append(f"`{key}` does not map names to strings")
    for key in ("lineage", "edits", "failed"):
        value = getattr(manifest, key)
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            faults.append(f"`{key}` is not a list of records")
    faults += [
        f"`{key}` is not a record" for key in ("base", "trained") if not isinstance(getattr(manifest, key), dict)
    ]
    return faults or [
        *_edit_faults(manifest),
        *_failed_faults(manifest),
        *(_adapter_faults(manifest) if manifest.kind == "adapter" else []),
    ]


def _edit_faults(manifest: Manifest) -> list[str]:
    """Says which edits lack what every reader of them takes for granted."""
    texts = ("name", "operation", "new_class")
    wrong = [n for n, edit in enumerate(manifest.edits) if not all(isinstance(edit.get(key), str) for key in texts)]
    return [
        f"the edit {n} does not say in strings what was done to which module (`{'`, `'.join(texts)}`)" for n in wrong
    ]


def _failed_faults(manifest: Manifest) -> list[str]:
    """Says which findings are not findings that failed."""
    texts = ("name", "evidence")
    return [
        f"the entry {number} of `failed` is no finding that failed"
        for number, found in enumerate(manifest.failed)
        if found.get("passed") is not False or not all(isinstance(found.get(key), str) for key in texts)
    ]


def _adapter_faults(manifest: Manifest) -> list[str]:
    """Says what an adapter's manifest leaves open of what it trains, and on which base."""
    names = {key: manifest.trained.get(key) for key in ("lora", "full", "parameters")}
    names |= {key: value for key, value in manifest.trained.items() if key not in names}
    return [
        *(
            f"`trained.{key}` is not a list of names"
            for key, value in names.items()
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value)
        ),
        *(
            f"`base.{key}` is not a string"
            for key, value in {"path": None, **manifest.base}.items()
            if not isinstance(value, str)
        ),
    ]


def name_faults(manifest: Manifest) -> list[str]:
    """Says which names of files lead out of the directory, cannot be read by people, or are not one file's alone."""
    names = [NAME, *manifest.code, *manifest.files, *manifest.headers]
    faults = [f"{shown(name)} is not the name of a file inside the directory" for name in names if not is_inside(name)]
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        other = names[first.setdefault(_fold_name(name), index)]
        if first[_fold_name(name)] != index:
            how = "is listed twice" if other == name else f"differs from {shown(other)} only in upper and lower case"
            faults.append(f"{shown(name)} {how}")
    faults += [
        f"{shown(name)} is the name of a signature, which no manifest lists"
        for name in names
        if _fold_name(name) == SIGNATURE
    ]
    faults += [f"{shown(name)} is listed among code" for name in manifest.code if not name.endswith(".py")]
    faults += [f"{shown(name)} is code, and not listed as such" for name in manifest.files if name.endswith(".py")]
    return faults


def is_inside(name: str) -> bool:
    """Returns whether a name from a file is a relative path that stays where it starts, on every system."""
    parts = name.split("/")
    plain = name.isprintable() and "\\" not in name and not PureWindowsPath(name).drive
    return plain and not any(part in ("", ".", "..") for part in parts)


def shown(name: str) -> str:
    """Returns a name from a file or a directory in printable letters."""
    return name if name.isprintable() else ascii(name)


def _fold_name(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def kind(directory: Path) -> str | None:
    """Returns what a directory is by its manifest; None where there is none.

    Raises:
        ArtifactError: as `read`.
    """
    return read(directory).kind if files.is_file(directory / NAME) else None


def strangers(directory: Path, manifest: Manifest) -> list[str]:
    """Compares the names in a directory with those that its manifest lists; opens none of the files.

    Returns one sentence for everything that is missing or not listed, that is a link, or no plain file. What tools
    leave that no loader reads (`LEFT_BY_TOOLS`, `LEFT_BY_TOOLS_IN`) may stand there, and so may a signature.
    """
    listed = {NAME, *manifest.listed()}
    folders = {str(parent) for name in (*listed, *LEFT_BY_TOOLS_IN) for parent in PurePosixPath(name).parents}
    by_case = {_fold_name(name): name for name in listed}
    seen, faults = set(), []
    for name, what in _walk_entries(directory, folders):
        if what == "file" and name in listed:
            seen.add(name)
        elif _is_left_by_tools(name, what):
            continue
        elif name == SIGNATURE and what == "file":
            if (size := (directory / name).lstat().st_size) > LARGEST_SIGNATURE:
                faults.append(f"{name} holds {size} bytes; no signature holds more than {LARGEST_SIGNATURE}")
        elif what == "file" and _fold_name(name) in by_case:
            faults.append(f"{shown(name)} is not {shown(by_case[_fold_name(name)])}, which is listed: the case differs")
        elif what == "a link" and directory.parent.name == "snapshots":
            faults.append(f"{shown(name)} is a link, as in the hub's cache; download it with local_dir=...")
            seen.add(name)
        elif what in ("file", "directory"):
            faults.append(
                f"{shown(name)} is a {what} that the manifest does not list; {_describe_remedy(directory, what)}"
            )
        else:
            faults.append(f"{shown(name)} is {what}; a model is made of plain files")
            seen.add(name)  # it is there, as what it should not be
    return [*faults, *(f"{shown(name)} is missing" for name in sorted(listed - seen))]


def _is_left_by_tools(name: str, what: str) -> bool:
    if what == "directory":
        return name in LEFT_BY_TOOLS_IN
    return what == "file" and (name in LEFT_BY_TOOLS or _DRAFT.fullmatch(name) is not None)


def left_by_tools(path: Path) -> bool:
    """Returns whether a path is what tools leave at the top of a directory of ours, and not what a loader reads."""
    if is_plain(path):
        return path.name in LEFT_BY_TOOLS
    found = [path.name] if path.is_dir() and not path.is_symlink() else []
    if found == [".cache"]:
        found = [f".cache/{each.name}" for each in path.iterdir()]
    return bool(found) and all(name in LEFT_BY_TOOLS_IN for name in found)


def _describe_remedy(directory: Path, what: str) -> str:
    return "remove it" if what == "directory" else f"remove it, or list it on purpose (solidify adopt {directory} FILE)"


def _walk_entries(directory: Path, folders: set[str], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields everything in a directory with what it is; goes into the folders alone, and follows no link."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be read: {error.strerror}") from error
    for entry in entries:
        name = prefix + entry.name
        if entry.is_symlink():
            yield name, "a link"
        elif entry.is_dir(follow_symlinks=False):
            if name in folders:
                yield from _walk_entries(Path(entry.path), folders, f"{name}/")
            else:
                yield name, "directory"
        else:
            yield name, "file" if entry.is_file(follow_symlinks=False) else "a pipe, a socket or a device"


def public_name(reference: str) -> str:
    """Returns how a base is named to others: by its id of the hub; a directory by its last part, not by where it is."""
    path = Path(reference)
    local = path.is_absolute() or PureWindowsPath(reference).is_absolute() or path.parts[:1] in (("..",), ("~",))
    return PureWindowsPath(reference).name if local or files.is_directory(path) else reference


def is_plain(path: Path) -> bool:
    """Returns whether a path is a file that can be read to its end: no link, pipe or device."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def faults(
    directory: Path, manifest: Manifest, *, card: bool = True, fresh: bool = False, weights: bool = True
) -> list[str]:
    """Compares a directory with its manifest, without running any of its code; on demand without its model card, which
    people may edit, and without its weights.

    Tensors in files that are unchanged since their digests were computed are not read again, unless `fresh`.

    Returns one sentence for every file or tensor that is missing, additional or changed.
    """
    result = strangers(directory, manifest)
    for name, expected in {**manifest.code, **manifest.files}.items():
        if (name == CARD and not card) or not is_plain(directory / name):
            continue
        try:
            found = digest_file(directory / name)
        except ArtifactError as error:
            result.append(str(error))
            continue
        if found != expected:
            result.append(f"{shown(name)} is not the file that was written (its digest differs)")
    if weights and all(is_plain(directory / name) for name in manifest.headers):
        result += _tensor_faults(directory, manifest, fresh)
    return result


def _tensor_faults(directory: Path, manifest: Manifest, fresh: bool) -> list[str]:
    if not manifest.tensors and not manifest.headers:
        return []
    adapter = directory / ADAPTER_WEIGHTS
    try:
        paths = [adapter] if manifest.kind == "adapter" else checkpoint.weight_files(directory)
        names = {path.relative_to(directory).as_posix(): path for path in paths}
        if names.keys() != manifest.headers.keys():
            differing = ", ".join(map(shown, sorted(names.keys() ^ manifest.headers.keys())[:_NAMED]))
            return [f"its weights are other files than the manifest says: {differing}"]
        if manifest.kind != "adapter":
            checkpoint.read(directory)
        found = digest_cache.digests(paths, fresh=fresh)
    except (ArtifactError, OSError, ValueError) as error:
        return [str(error)]
    expected = manifest.tensors
    changed = [name for name in expected if name in found and found[name] != expected[name]]
    heads = {name: format.header_digest(path) for name, path in names.items()}
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
