"""What may be written where, and output directories that appear whole or not at all.

An output is new, or a directory whose whole content a manifest of ours lists, as it was written. It is never an input
of the command, nor above or below one, nor a home directory, a file system's root or the root of a repository.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from solidify.directory import manifest, ours
from solidify.errors import ArtifactError, SolidifyError
from solidify.system import console, disk
from solidify.weights import digest_cache

_REPOSITORY = (".git", ".hg", ".svn", ".jj", ".bzr", "_darcs", ".fslckout", "CVS")
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2
_HERE = -100  # AT_FDCWD


def refuse_foreign(output: Path, inputs: Iterable[str | Path] = (), *, work: str = "command") -> None:
    """Raises ArtifactError unless `output` is new, empty, or wholly ours and unchanged, and apart from all inputs.

    `work` is what the inputs belong to, for the message.
    """
    refuse_unwritable(output, inputs, work=work)
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise ArtifactError(f"the output {output} exists and is not a directory; name another, or remove it first")
    if not (faults := ours.foreign(output)):
        return
    if any((output / name / manifest.NAME).is_file() for name in ours.PARTS) and not (output / manifest.NAME).exists():
        faults = ["it holds the results of a whole run"]
    _refuse_output(output, faults)


def refuse_foreign_run(directory: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Raises ArtifactError unless a directory may hold the results of a run: new, or with what a run of ours wrote.

    Every entry of it is one of the parts that a run writes, whole and unchanged, a checkpoint of a training of ours, or
    the report that lists them.
    """
    refuse_unwritable(directory, inputs)
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir():
        raise ArtifactError(f"the output {directory} exists and is not a directory; name another, or remove it first")
    if (directory / manifest.NAME).exists():
        _refuse_output(directory, ["it holds a single model or adapter, and no run"])
    _refuse_output(directory, ours.in_run(directory))


def refuse_foreign_report(directory: Path) -> None:
    """Raises ArtifactError where a report or a page would be written over another file's."""
    _refuse_output(directory, ours.in_report(directory))


def refuse_foreign_checkpoints(directory: Path, run: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Refuses a directory of checkpoints, where old ones are removed, that is not for the training of a `run` alone.

    Raises:
        ArtifactError: others stand there, or it lies in the run's directory and is not the one that a run has there,
            or the run lies in it.
    """
    here, around = directory.resolve(), run.resolve()
    if here != around / ours.CHECKPOINTS and (here.is_relative_to(around) or around.is_relative_to(here)):
        raise ArtifactError(
            f"training.output_dir is {directory}, and the run's own directory is {run}: neither may lie in the other; "
            f"leave out training.output_dir (checkpoints go to {run / ours.CHECKPOINTS}), or name a directory "
            "elsewhere"
        )
    refuse_unwritable(directory, inputs)
    if directory.exists() or directory.is_symlink():
        _refuse_output(directory, ours.in_checkpoints(directory) if directory.is_dir() else ["it is not a directory"])


def _refuse_output(output: Path, faults: list[str]) -> None:
    if not faults:
        return
    if output.is_dir() and not ours.anything(output):
        entries = ours.names([path for path in sorted(output.iterdir()) if not ours.left(path)])
        raise ArtifactError(
            f"the output {output} exists and is a directory that solidify did not make (it holds {entries}); "
            "name another, or remove it first"
        )
    shown = faults[: ours.SHOWN]
    more = f" and {len(faults) - ours.SHOWN} more" if len(faults) > ours.SHOWN else ""
    raise ArtifactError(
        f"the output {output} exists and holds what solidify did not write there: {'; '.join(shown)}{more}; "
        "name another, or remove it first"
    )


def refuse_unwritable(output: Path, inputs: Iterable[str | Path] = (), *, work: str = "command") -> None:
    """Raises ArtifactError for an output that is not for results, or that an input is, holds or lies in.

    Outputs are known by the names that they resolve to, and by what the system calls them (device and inode).
    """
    try:
        os.fspath(output).encode()
        resolved = output.resolve()
        _check_path(output)
    except UnicodeEncodeError as error:
        words = "its name is not text in UTF-8, as names in the files of a model are; name another"
        raise ArtifactError(f"the output {str(output)[:200]!a} cannot be written to: {words}") from error
    except (OSError, RuntimeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ArtifactError(f"the output {str(output)[:200]} cannot be written to: {why}; name another") from error
    homes: list[Path] = []
    with suppress(OSError, RuntimeError):  # there need not be one
        homes.append(Path.home().resolve())
    if resolved.parent == resolved:
        raise ArtifactError(f"the output {output} is the root of the file system; name a directory for the results")
    if any(resolved in (home, *home.parents) for home in homes):
        raise ArtifactError(f"the output {output} is a home directory, or holds it; name a directory for the results")
    if (found := next((name for name in _REPOSITORY if os.path.lexists(resolved / name)), None)) is not None:
        raise ArtifactError(f"the output {output} is the root of a repository (it holds {found}); name another")
    own = {_find_identity(resolved)} - {None}
    above = {_find_identity(parent) for parent in resolved.parents} - {None}
    for given in inputs:
        for path in _walk_reached(Path(given)):
            parents = {_find_identity(parent) for parent in path.parents} - {None}
            if path == resolved or _find_identity(path) in own:
                raise ArtifactError(f"the output {output} is an input of the {work}; name another")
            if resolved in path.parents or own & parents:
                raise ArtifactError(f"the output {output} holds an input of the {work}, {path}; name another")
            if path in resolved.parents or _find_identity(path) in above:
                raise ArtifactError(f"the output {output} lies in an input of the {work}, {path}; name another")


def _check_path(output: Path) -> None:
    """Raises OSError when the system could not say what stands at a path: its name is too long, for one."""
    with suppress(FileNotFoundError, NotADirectoryError):
        output.lstat()


def _walk_reached(path: Path) -> Iterator[Path]:
    """Yields an input and, of a directory, also what links in it lead to; nothing for what is not there."""
    try:
        if not path.exists():
            return
        yield path.resolve()
        if path.is_dir():
            for here, directories, files in os.walk(path):
                links = [Path(here) / name for name in (*directories, *files) if (Path(here) / name).is_symlink()]
                yield from (link.resolve() for link in links if link.exists())
    except (OSError, RuntimeError, ValueError):
        return


def _find_identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _announce_replacing(output: Path) -> None:
    """Says what is about to be replaced, if something is."""
    if (output / manifest.NAME).is_file():
        record = manifest.read(output)
        made = record.versions.get("solidify", "?")
        console.words.print(
            f"{output} holds an earlier {record.kind} (of solidify {made}); it is replaced when the new one is whole",
        )


@contextmanager
def staged(output: Path, inputs: Iterable[str | Path] = (), *, work: str = "command") -> Iterator[Path]:
    """Yields a directory beside `output` that takes its name when the block ends without an error.

    What stood at `output` before (an earlier result of ours) is replaced in the same moment, which is said before.
    What was written is on the disk before it has its name.

    Raises:
        ArtifactError: `output` exists and is not ours, is (or holds, or lies in) one of the command's `inputs`, another
            process writes it now, or its parent directory cannot be written.
    """
    inputs = list(inputs)
    refuse_foreign(output, inputs, work=work)
    _announce_replacing(output)
    with _make_hidden_directory(output, "partial") as staging:
        yield staging
        disk.sync_tree(staging)
        refuse_foreign(output, inputs, work=work)  # much may have happened there meanwhile
        output = output.resolve()
        try:
            _put_staging(staging, output)
        except OSError as error:
            raise ArtifactError(f"the finished results cannot be moved to {output}: {error.strerror}") from error


@contextmanager
def scratch(output: Path, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Yields a directory beside `output`, on its file system, that is gone when the block ends.

    Raises:
        ArtifactError: `output` exists and is not ours, another process writes it now, or its parent directory cannot
            be written.
    """
    refuse_foreign(output, inputs)
    with _make_hidden_directory(output, "scratch") as directory:
        yield directory


@contextmanager
def _make_hidden_directory(output: Path, kind: str) -> Iterator[Path]:
    """Yields a hidden directory beside `output` while no other process writes there; it does not outlive the block."""
    output = output.resolve()  # one directory has one name, whatever links lead to it
    directory = output.parent / f".{output.name}.{kind}-{os.getpid()}"
    with _lock_output(output):
        made: list[Path] = []
        try:
            made = [parent for parent in output.parents if not parent.exists()]
            output.parent.mkdir(parents=True, exist_ok=True)
            sweep(output)
            directory.mkdir()
            for parent in made:
                disk.sync(parent.parent)
        except OSError as error:
            _remove_empty(made)
            raise ArtifactError(f"{output.parent} cannot be written to: {error.strerror}") from error
        ours.used.add(directory)
        try:
            yield directory
        except Exception as error:
            words = None if isinstance(error, SolidifyError) else _describe_error(error, directory)
            if words is None:
                raise
            raise ArtifactError(words) from error
        finally:
            digest_cache.remove(directory)
            ours.used.discard(directory)
            _remove_empty(made)


def _describe_error(error: Exception, directory: Path) -> str | None:
    """Says what hinders the writing into a hidden directory; None if that is not what went wrong."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    number = error.errno if isinstance(error, OSError) else None
    # safetensors and tokenizers say it in words alone.
    if number in numbers or (number is None and any(f"(os error {full})" in str(error) for full in numbers)):
        files = [path for path in directory.rglob("*") if path.is_file()]
        written = sum(path.stat().st_size for path in files if path.stat().st_nlink == 1)
        return (
            f"{directory.parent} became full: {console.size(written)} were written, and "
            f"{console.size(shutil.disk_usage(directory).free)} are free; make room, or choose another output"
        )
    if isinstance(error, OSError) and directory in Path(os.fsdecode(error.filename or "")).parents:
        return f"{error.filename} cannot be written: {error.strerror}; choose another output"
    return None


def _put_staging(staging: Path, output: Path) -> None:
    """Gives a finished directory its name; where the system can, what stood there is exchanged with it at once."""
    if not output.exists():
        staging.rename(output)
        disk.sync(output.parent)
    elif _exchange_names(staging, output):
        disk.sync(output.parent)
    else:
        old = output.parent / f".{output.name}.replaced-{os.getpid()}"
        output.rename(old)
        staging.rename(output)
        disk.sync(output.parent)
        digest_cache.remove(old)


def _exchange_names(a: Path, b: Path) -> bool:
    """Exchanges two names in one step; returns whether the system did so."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # not Linux
        return False
    return bool(exchange(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0)


def _remove_empty(made: list[Path]) -> None:
    """Removes directories that were made, as far as they are empty."""
    with suppress(OSError):
        for directory in made:
            directory.rmdir()


@contextmanager
def _lock_output(output: Path) -> Iterator[None]:
    """Keeps other processes from writing an output; the system ends that with the process, however it dies."""
    name = hashlib.sha256(os.fsencode(output)).hexdigest()[:16]
    locks = disk.cache_for("locks")
    try:
        held = FileLock(locks / name, is_singleton=True).acquire(timeout=0)
    except Timeout as error:
        raise ArtifactError(f"another process is writing {output} now; wait for it, or name another output") from error
    except OSError as error:
        raise ArtifactError(
            f"{locks} cannot be written to: {error.strerror}; say with SOLIDIFY_HOME where solidify may keep its cache"
        ) from error
    with held:
        yield


def sweep(output: Path) -> None:
    """Removes what runs that were killed left beside `output`; a result that was about to be replaced goes back."""
    siblings = output.parent.iterdir() if output.parent.is_dir() else ()
    for left in [path for path in siblings if ours.left(path)]:
        found = ours.HIDDEN.fullmatch(left.name)
        assert found is not None
        if found[1] != output.name:
            continue
        if found[2] == "replaced" and not output.exists():
            left.rename(output)
        elif not left.is_dir():
            left.unlink(missing_ok=True)
        else:
            shutil.rmtree(left, ignore_errors=True)
