"""What stands on the disk and stays there: files that appear whole, renames that a power cut cannot undo, temporary
directories that outlive no process, and names that lead nowhere else."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from solidify.errors import ArtifactError

try:
    import fcntl
except ImportError:  # a system without them has no other process's locks to look at
    fcntl = None  # type: ignore[assignment]

PREFIX = "solidify-"  # of temporary directories
LOCK = ".solidify.lock"  # in each, held as long as its process lives
_ELSEWHERE = "say with SOLIDIFY_HOME where solidify may keep its cache"
_WITHOUT = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # file systems that have no such thing as syncing
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def cache() -> Path:
    """Returns the user's cache directory for solidify (`SOLIDIFY_HOME`, else under `XDG_CACHE_HOME` or ~/.cache).

    Raises:
        ArtifactError: none of these is set, and the user has no home.
    """
    home = os.environ.get("SOLIDIFY_HOME")
    try:
        if home:
            return Path(home).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solidify"
    except RuntimeError as error:
        raise ArtifactError(f"no home directory is known; {_ELSEWHERE}") from error


def cache_for(part: str) -> Path:
    """Returns a directory of the cache, and makes it if it is not there.

    Raises:
        ArtifactError: it cannot be made, or not be written to.
    """
    directory = cache() / part
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be made: {error.strerror}; {_ELSEWHERE}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ArtifactError(f"{directory} cannot be written to; {_ELSEWHERE}")
    return directory


def sync(path: Path) -> None:
    """Waits until a file's content, or a directory's list of names, would outlive a power cut.

    Raises:
        OSError: the disk became full, or failed, when what was written reached it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _WITHOUT:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _WITHOUT:
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Waits until a directory and all that is in it would outlive a power cut: files first, then names.

    Raises:
        OSError: as `sync`.
    """
    for here, _, files in os.walk(directory, topdown=False):
        for file in files:
            path = Path(here) / file
            if path.is_file() and not path.is_symlink():
                sync(path)
        sync(Path(here))


def write(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all, also after a power cut; what stood there stays until it does.

    Raises:
        OSError: it cannot be written; nothing is then left of it.
    """
    draft = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(draft)
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def name_fault(name: object) -> str | None:
    """Returns why a name that was read from a file is no name of a file inside a directory; None if it is one."""
    if not isinstance(name, str) or not name or _CONTROL.search(name) or len(name) > 1024:
        return f"{str(name)[:80]!r} is not the name of a file"
    if name.startswith(("/", "~")) or "\\" in name or PurePosixPath(name).as_posix() != name or ":" in name[:2]:
        return f"{name!r} is not a relative path in its plain form"
    if ".." in PurePosixPath(name).parts or name == ".":
        return f"{name!r} leads out of the directory"
    return None


def refuse_names(source: Path, names: Iterable[str]) -> None:
    """Raises ArtifactError when a name that `source` holds leads out of its directory, by itself or through a link.

    In a snapshot of the hub's cache, links may lead to the files of its repository.
    """
    faults = []
    for name in names:
        if (fault := name_fault(name)) is None and leads_out(source.parent, name):
            fault = f"{name!r} is a link that leads out of the directory (name that one, or put the file itself here)"
        faults += [fault] if fault else []
    if faults:
        raise ArtifactError(f"{source} names what is not in its directory: {'; '.join(faults[:6])}")


def leads_out(base: Path, name: str | PurePosixPath) -> bool:
    """Returns whether a link on the way to a file of a directory leads out of that."""
    found = (base / name).resolve()
    return root(base) not in (found, *found.parents)


def root(base: Path) -> Path:
    """Returns what links may lead to: the base, or for a snapshot in the hub's cache the repository it belongs to."""
    base = base.resolve()
    snapshot = base.parent.name == "snapshots" and (base.parent.parent / "blobs").is_dir()
    return base.parent.parent if snapshot else base


@contextmanager
def temporary() -> Iterator[Path]:
    """Yields a directory for temporary files that is gone when the block ends, or, after a kill, when the next begins.

    A lock in it says that its process lives, whatever number that has in whichever container.
    """
    sweep()
    directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
    held = _hold_lock(directory)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if held is not None:
            os.close(held)


def _hold_lock(directory: Path) -> int | None:
    """Puts a lock and this process's number in a directory; the lock has its name when it is held."""
    if fcntl is None:
        return None
    draft = directory / f"{LOCK}.new"
    descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: nobody will sweep it
        os.close(descriptor)
        return None
    os.write(descriptor, f"{os.getpid()}\n".encode())
    draft.rename(directory / LOCK)
    return descriptor


def share(directory: Path) -> int | None:
    """Holds a directory together with others, until the descriptor that is returned is closed; makes it if it is gone.

    None where there are no locks. Others that hold it are seen by `held_alone`.

    Raises:
        OSError: it cannot be made or opened.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            return None
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                    return descriptor
            except OSError as error:
                if not isinstance(error, FileNotFoundError):  # a file system without locks
                    os.close(descriptor)
                    return None
            os.close(descriptor)  # whoever held it alone has removed it in between
        except FileNotFoundError:
            continue


def held_alone(descriptor: int | None) -> bool:
    """Returns whether nobody else holds what `share` does, and keeps others from it until it is closed; True where
    there are no locks."""
    if descriptor is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def sweep() -> None:
    """Removes the temporary directories of processes that were killed; those of living ones are not touched."""
    if fcntl is None:
        return
    with suppress(OSError):
        for path in Path(tempfile.gettempdir()).iterdir():
            if path.name.startswith(PREFIX) and abandoned(path):
                shutil.rmtree(path, ignore_errors=True)


def abandoned(directory: Path) -> bool:
    """Returns whether a directory of this user's has a lock that nobody holds."""
    try:
        if directory.is_symlink() or directory.stat().st_uid != os.getuid():
            return False
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
