"""What in a directory is ours: listed by a manifest or a report of ours, and as that was written."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

from blake3 import blake3

from solidify.directory import manifest, signature
from solidify.errors import SolidifyError
from solidify.findings import Report
from solidify.system import files
from solidify.weights.hashing import digest_large

_MODEL = ("artifact", "stock")
PARTS = {"artifact": _MODEL, "adapter": ("adapter",), "merged": _MODEL}  # what a run writes
REPORT, PAGE, CHECKPOINTS = "report.json", "report.html", "checkpoints"
LISTING, OBJECTIVE = "files.json", "objective.pt"  # what solidify adds to transformers' checkpoints
PREFIX, ACTIVATIONS = "prefix", ".activations"  # beside checkpoints, while a training with `cache_prefix` goes on
_KEPT = re.compile(r"[0-9a-f]{64}\.activations|\.[0-9a-f]{64}\.activations\.partial-\d+")
HEAL, PLACEMENT, ALIGNMENT = "heal", "placement.json", "alignment"  # of healing: a run within the run
_OWN = (*PARTS, REPORT, PAGE, CHECKPOINTS, HEAL)
_LEARNED = re.compile(r".+\.(safetensors|json|bin)|\..+\.(bin|safetensors|json)\.partial-\d+")
SHOWN = 6
_LONGEST = 2**26  # bytes of what is read of our file in a checkpoint
_LATER = re.compile(r"rng_state_\d+\.pth|\..+\.partial-\d+|" + re.escape(LISTING))  # after a checkpoint's list
_GENERATED = "generated_from_trainer"  # a tag in those cards
HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|scratch)-(\d+)")
used: set[Path] = set()  # hidden directories of this process


def foreign(directory: Path) -> list[str]:
    """Says what in a directory is not listed by its manifest, or is not as that lists it; nothing of an empty one."""
    entries = [path for path in sorted(directory.iterdir()) if not left(path)]
    if not entries:
        return []
    if not (directory / manifest.NAME).is_file():
        return [f"it has no {manifest.NAME}, but {names(entries)}"]
    try:
        record = manifest.read(directory)
        return [*_find_unlisted(directory, record), *manifest.faults(directory, record)]
    except (SolidifyError, OSError) as error:
        return [str(error)]


def _find_unlisted(directory: Path, record: manifest.Manifest) -> list[str]:
    listed = {manifest.NAME, *record.code, *record.files, *record.headers}
    holding = {parent.as_posix() for name in listed for parent in Path(name).parents}
    faults = []
    for here, directories, names in os.walk(directory):
        for name in sorted([*directories, *names]):
            path = Path(here) / name
            relative = path.relative_to(directory).as_posix()
            if relative == manifest.SIGNATURE and signature.belongs(directory, record):
                continue
            if path.is_symlink() or relative not in (holding if path.is_dir() else listed):
                faults.append(f"{relative} is not listed by its manifest")
        directories[:] = [name for name in directories if not (Path(here) / name).is_symlink()]
    return faults


def in_run(directory: Path) -> list[str]:
    """Says what in a run's directory is no part of a run of ours, or is not as that wrote it."""
    faults = []
    for path in sorted(directory.iterdir()):
        if left(path):
            continue
        if path.is_symlink() or path.name not in _OWN:
            faults.append(f"{path.name} is not part of a run")
        elif (inside := _look_inside(path)) is not None:
            faults += [f"{path.name}: {fault}" for fault in inside]
    return [*faults, *in_report(directory)]


def in_report(directory: Path) -> list[str]:
    """Says what stands where the report of a run stands, and is not what a run wrote."""
    report, page = _read_report(directory), directory / PAGE
    faults = [f"{REPORT} is not the report that a run wrote"] if (directory / REPORT).exists() and not report else []
    if page.exists() and _get_entry(report, "files").get(PAGE) != _digest_file(page):
        faults.append(f"{PAGE} is not the page that a run wrote")
    return faults


def in_healing(directory: Path) -> list[str]:
    """Says what in the directory of a run's healing is no part of it: a run of its own, and what it resumes from."""
    if not directory.is_dir():
        return ["not a directory"]
    faults = []
    for path in sorted(directory.iterdir()):
        if left(path):
            continue
        inside = in_alignment(path) if path.name == ALIGNMENT else _look_inside(path)
        if path.name == PLACEMENT and path.is_file():
            inside = [] if _is_ours(path, "chosen") else ["not what a run wrote"]
        elif path.name in (REPORT, PAGE):
            inside = []
        if path.is_symlink() or inside is None or path.name == HEAL:
            faults.append(f"{path.name} is not part of healing")
        else:
            faults += [f"{path.name}: {fault}" for fault in inside]
    return [*faults, *in_report(directory)]


def _look_inside(path: Path) -> list[str] | None:
    """Says what in a directory of a run is not of the run; None for what is no directory that a run has."""
    if path.name in PARTS:
        return _in_part(path)
    known = {CHECKPOINTS: in_checkpoints, HEAL: in_healing}
    return known[path.name](path) if path.name in known else None


def in_alignment(directory: Path) -> list[str]:
    """Says what in a directory of an alignment is no tensor file, entry or activation file of one."""
    if not directory.is_dir():
        return ["not a directory"]
    found = [path for path in sorted(directory.iterdir()) if path.is_symlink() or not path.is_file()]
    strange = [path for path in sorted(directory.iterdir()) if not _LEARNED.fullmatch(path.name)]
    entries = [path for path in directory.glob("*.json") if path.is_file() and not _is_ours(path, "aligned")]
    return [f"{path.name} is no part of an alignment" for path in dict.fromkeys([*found, *strange, *entries])]


def _is_ours(path: Path, key: str) -> bool:
    """Returns whether a JSON file is one of healing's: it has a digest of what it belongs to, and an entry."""
    try:
        found = files.document(path)
    except (OSError, SolidifyError, ValueError):
        return False
    return {"key", key} <= set(found)


def unlike_a_run(directory: Path) -> list[str]:
    """Says what in a run's directory no part of it accounts for, or is not as the run wrote it; parts are not opened.

    Other than `in_run` it is for who reads a run: what tools leave may stand there, as in a part, and so may what a run
    that was stopped left of its own; a page that the report lists must be there.
    """
    report = _read_report(directory)
    pages = _get_entry(report, "files")
    faults = [f"{PAGE} is missing, which {REPORT} lists"] if PAGE in pages and not (directory / PAGE).exists() else []
    for path in sorted(directory.iterdir()):
        hidden = HIDDEN.fullmatch(path.name)
        what = "is a link" if path.is_symlink() else None
        if what is None and path.name in PARTS:
            what = _unlike_a_part(path)
        elif what is None and path.name == CHECKPOINTS:
            what = "; ".join(in_checkpoints(path, whole=True)) or None
        elif what is None and path.name == PLACEMENT and directory.name == HEAL and _is_ours(path, "chosen"):
            continue
        elif what is None and path.name == HEAL:
            what = "; ".join(in_healing(path)) or None
        elif what is None and path.name == REPORT:
            what = "is not the report that a run wrote" if report is None else None
        elif what is None and path.name == PAGE:
            is_recorded = report is not None or not (directory / REPORT).exists()  # else nothing says how the page was
            what = "is not the page that a run wrote" if is_recorded and pages.get(PAGE) != _digest_file(path) else None
        elif what is None and not manifest.left_by_tools(path) and (hidden is None or hidden[1] not in _OWN):
            what = f"is not part of a run; remove it, or check the parts ({', '.join(PARTS)}) one by one"
        if what is not None:
            faults.append(f"{manifest.shown(path.name)} {what}")
    return faults


def _get_entry(document: Any, key: str) -> dict[str, Any]:
    """Returns an entry that is a mapping; an empty one for any other."""
    found = document.get(key) if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def _unlike_a_part(path: Path) -> str | None:
    """Says what is wrong with a part of a run as a whole; None of one that is there, or was not written yet."""
    if not path.is_dir():
        return "is not a directory"
    if not os.path.lexists(path / manifest.NAME):
        entries = sorted(path.iterdir())
        return f"has no {manifest.NAME}, but {names(entries)}" if entries else None
    try:
        kind = manifest.read(path, closed=False).kind
    except SolidifyError as error:
        return f"is not what was written: {error}"
    return None if kind in PARTS[path.name] else f"holds {manifest.name_kind(kind)}"


def _in_part(path: Path) -> list[str]:
    if not path.is_dir():
        return ["not a directory"]
    if (faults := foreign(path)) or not (path / manifest.NAME).is_file():
        return faults
    kind = manifest.read(path).kind
    return [] if kind in PARTS[path.name] else [f"it holds {manifest.name_kind(kind)}"]


def _read_report(directory: Path) -> dict[str, Any] | None:
    """Returns a run's report as it was written; None if there is none, or somebody changed it."""
    try:
        return Report.read(directory / REPORT)
    except (OSError, ValueError):
        return None


def _digest_file(path: Path) -> str:
    return blake3(files.content(path)).hexdigest() if path.is_file() else ""


def page_digests(directory: Path) -> dict[str, str]:
    """Returns what a report lists of the files beside it."""
    return {PAGE: _digest_file(directory / PAGE)} if (directory / PAGE).is_file() else {}


def is_activations(path: Path) -> bool:
    """Returns whether a file is named as those in which a training with `cache_prefix` keeps activations, or drafts."""
    return _KEPT.fullmatch(path.name) is not None and path.is_file() and not path.is_symlink()


def in_checkpoints(directory: Path, *, whole: bool = False) -> list[str]:
    """Says what in a directory of checkpoints is not one that a trainer of solidify wrote or was about to write.

    With `whole`, also what in those that were written to their end is not what was written; all of it is read.
    """
    if not directory.is_dir():
        return ["not a directory"]
    faults = []
    for path in sorted(directory.iterdir()):
        if path.name == "runs" and path.is_dir() and not path.is_symlink():
            continue  # what trackers write; nothing there is ever removed
        if path.name == "README.md" and _by_a_trainer(path):
            continue
        if path.name == PREFIX and path.is_dir() and not path.is_symlink():
            strange = [each for each in sorted(path.iterdir()) if not is_activations(each)]
            faults += [f"{PREFIX}/{each.name} is no activations that a trainer keeps" for each in strange]
            continue
        if path.is_symlink() or not path.is_dir() or not re.fullmatch(r"checkpoint-\d+", path.name):
            faults.append(f"{path.name} is not a checkpoint")
        else:
            complete = whole and os.path.lexists(path / LISTING)
            faults += [f"{path.name} {fault}" for fault in checkpoint_faults(path, whole=complete)]
    return faults


def _by_a_trainer(card: Path) -> bool:
    """Returns whether a model card is the one that transformers' and TRL's trainers put beside their checkpoints."""
    return not card.is_symlink() and card.is_file() and _GENERATED in files.content(card).decode(errors="replace")


def checkpoint_faults(directory: Path, *, whole: bool = False) -> list[str]:
    """Says what in a checkpoint its list does not name; with `whole`, also what has not the digest that it lists.

    One that was not finished has no list, but our own file.
    """
    names = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_symlink() or not p.is_dir()}
    try:
        listed = files.document(directory / LISTING)["files"]
        own = {name for name in names if _LATER.fullmatch(name)}
        strange = sorted(name for name in names - own if name not in listed)
        torn = sorted(n for n, d in listed.items() if whole and (n not in names or digest_large(directory / n) != d))
    except (SolidifyError, OSError, ValueError, KeyError, TypeError, AttributeError):
        begun = not whole and _is_begun(directory, names)
        return [] if begun else ["was not completely written by a trainer of solidify"]
    return [
        *(f"holds {name}, which the trainer did not write" for name in strange),
        *(f"lacks {name} as the trainer wrote it" for name in torn),
    ]


def _is_begun(directory: Path, names: set[str]) -> bool:
    """Returns whether a trainer of ours began to write a checkpoint: nothing stands there before our own file does."""
    if OBJECTIVE not in names:
        return names <= {f".{OBJECTIVE}"}
    try:
        with zipfile.ZipFile(directory / OBJECTIVE) as archive:
            inside = [each for each in archive.infolist() if each.filename.endswith("/data.pkl")]
            return any(each.file_size <= _LONGEST and b"fingerprint" in archive.read(each) for each in inside[:1])
    except (OSError, zipfile.BadZipFile):
        return False


def anything(directory: Path) -> bool:
    """Returns whether there is a manifest or a report of ours in a directory, or in a part of a run there."""
    manifests = [directory / manifest.NAME, *(directory / name / manifest.NAME for name in PARTS)]
    checkpoints = directory.glob(f"checkpoint-*/{OBJECTIVE}")
    return any(path.is_file() for path in (*manifests, *checkpoints)) or _read_report(directory) is not None


def names(paths: list[Path]) -> str:
    """Lists the names of the first of some paths, and how many more there are."""
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(path.name for path in paths[:SHOWN]) + more


def left(path: Path) -> bool:
    """Returns whether a path is a hidden directory that a run has left which is over."""
    found = HIDDEN.fullmatch(path.name)
    return found is not None and path not in used and not _is_alive(int(found[3]))


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
