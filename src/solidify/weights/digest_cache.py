"""Digests of the tensors in a file, kept as long as the file is unchanged, so that they are computed once.

A file is known by device, inode, size and both of its times. A program can set the time of modification back, but not
the time of change, which the system sets by itself; it also does so when a hard link is made or removed. Where that is
done here, what was known stays known (`kept`); where others do it, the file is read once more. Files that were touched
a moment before they were read are not noted, because two changes within a tick of the clock cannot be told apart.
What a program that has a file mapped writes shows in its times when the system writes it to the disk, and not before.
`solidify check` reads everything, whatever is noted.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from solidify.errors import ArtifactError
from solidify.system import console, disk, files
from solidify.weights import ahead, format, hashing
from solidify.weights.ahead import TICK

_KEPT, _MOST = 1000, 1200  # files whose digests are kept: so many are left where there were more than `_MOST`


def digests(files: Sequence[Path], *, fresh: bool = False, title: str = "Digesting tensors") -> dict[str, str]:
    """Returns the digest of every tensor in some safetensors files; `fresh` reads them all, known or not.

    Long reading shows a bar with a title. A model whose digests are looked up is loaded next, as a rule, and stays in
    the page cache; what is read afresh passes it, and may have been begun with before (`ahead.py`).

    Raises:
        ArtifactError: a file is truncated or not safetensors, or two files hold the same name.
    """
    at_first = {path: _find_state(path) for path in files}  # before its header, by which the rest is read
    headers = {path: format.read_header(path) for path in files}
    recalled = {} if fresh else {p: found for p, header in headers.items() if (found := _recall_all(p, header))}
    settled = {path for path, state in at_first.items() if is_settled(state)}
    entries = [entry for path in files if path not in recalled for entry in headers[path].values()]

    # The largest first, so that no worker is left alone with one at the end.
    entries.sort(key=lambda entry: -entry.shape.nbytes)
    with console.bytes_progress(title, sum(entry.shape.nbytes for entry in entries)) as advance:

        def compute(entry: format.Entry) -> str:
            """Reads one tensor, and moves the bar."""
            early = ahead.find(entry.part(ahead.state_of(at_first[entry.file]))) if fresh else None
            digest = (early and early.result()) or entry.digest(keep=not fresh)
            advance(entry.shape.nbytes)
            return digest

        found_now = format.in_parallel(compute, entries)
        computed = dict(zip(((e.file, e.name) for e in entries), found_now, strict=True))
    result: dict[str, str] = {}
    for path, header in headers.items():
        found = recalled.get(path) or {name: computed[path, name] for name in header}
        if path in settled - recalled.keys():
            remember(path, found, at_first[path])
        twice = next((name for name in found if name in result), None)
        if twice is not None:
            raise ArtifactError(f"{path} holds {twice!r}, which another file holds too")
        result |= found
    return result


def _find_state(path: Path) -> os.stat_result:
    files.require_regular(path)
    return path.stat()


def recall(path: Path) -> dict[str, str] | None:
    """Returns the digests of a file's tensors if they are known and the file is unchanged since."""
    try:
        return _recall(path.stat())
    except OSError:
        return None


def _recall(now: os.stat_result) -> dict[str, str] | None:
    try:
        note = files.document(_get_note_path(now))
        found: dict[str, str] = note["digests"]
        words = all(isinstance(digest, str) for digest in found.values())
        return found if words and note["changed"] == now.st_ctime_ns else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _recall_all(path: Path, header: Mapping[str, format.Entry]) -> dict[str, str] | None:
    """Returns the known digests of a file; None where they are not of the tensors that its header has."""
    found = recall(path)
    return found if found is not None and found.keys() == header.keys() else None


def is_settled(found: os.stat_result) -> bool:
    """Returns whether a file was last touched so long ago that its next change will have another time."""
    return time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) >= TICK


@contextmanager
def kept(paths: Iterable[Path]) -> Iterator[None]:
    """Keeps what is known of some files while the block makes or removes links to them, and does nothing else."""
    with ExitStack() as opened:
        held = []
        for path in paths:
            with suppress(OSError):
                file = opened.enter_context(path.open("rb"))
                state = os.fstat(file.fileno())
                if (found := _recall(state)) is not None:
                    held.append((file, state, found))
        yield
        for file, before, found in held:
            now = os.fstat(file.fileno())
            if now.st_nlink and (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
                _write_note(now, found)


def remove(directory: Path) -> None:
    """Removes a directory as far as that can be done; files with links elsewhere stay known."""
    for path in directory.rglob("*.safetensors"):
        with suppress(OSError):
            if not path.is_symlink() and path.is_file() and path.stat().st_nlink > 1:
                with kept([path]):
                    path.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def recall_entries(entries: Iterable[format.Entry]) -> dict[format.Place, str]:
    """Returns the known digests of tensors in files, by their places; of the files, headers alone are read."""
    wanted = {entry.place for entry in entries}
    found: dict[format.Place, str] = {}
    for path in dict.fromkeys(path for path, _, _ in wanted):
        if recall(path) is None:
            continue  # its header, which it may not have (weights of pickles are mapped, too), is not needed
        header = format.read_header(path)
        if known := _recall_all(path, header):
            found |= {entry.place: known[name] for name, entry in header.items() if entry.place in wanted}
    return found


def remember(path: Path, found: dict[str, str], at_first: os.stat_result | None = None) -> None:
    """Notes the digests of a file's tensors.

    `at_first` is the file's state before it was read, when it was settled: nothing is noted if it has changed since.
    Without it the caller vouches that the file holds what was digested.
    """
    now = path.stat()
    if at_first is not None and ahead.state_of(at_first) != ahead.state_of(now):
        return
    age = time.time_ns() - max(now.st_mtime_ns, now.st_ctime_ns)
    if at_first is None and 0 <= age < TICK:
        time.sleep((TICK - age) / 1e9)
        now = path.stat()
    _write_note(now, found)


def _write_note(now: os.stat_result, found: Mapping[str, str]) -> None:
    try:
        note = _get_note_path(now)
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        draft.write_text(json.dumps({"changed": now.st_ctime_ns, "digests": found}), encoding="utf-8")
        draft.replace(note)
        if len(os.listdir(note.parent)) > _MOST:
            for file in sorted(note.parent.iterdir(), key=lambda file: file.stat().st_mtime)[:-_KEPT]:
                file.unlink(missing_ok=True)
    except (OSError, ArtifactError):
        return  # a cache that cannot be written (or was swept by another process) costs time, not truth


def touched(path: Path, at_first: os.stat_result) -> bool:
    """Returns whether anything was done to a file since it had a state, if only that a link to it was made."""
    return ahead.state_of(path.stat()) != ahead.state_of(at_first)


def _get_note_path(found: os.stat_result) -> Path:
    identity = f"{hashing.ALGORITHM} {found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"
    return disk.cache() / "digests" / f"{hashing.digest_bytes(identity.encode())}.json"
