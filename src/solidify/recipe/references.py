"""User code enters by one door: `file.py:Name` or `package.module:Name` becomes an object.

A file is imported under a name of its own (made of its path and its content), so that two files of equal name
never meet and an edited file is never served stale. Files beside it can be imported relatively.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from solidify.errors import RecipeError
from solidify.system import files, foreign


def resolve(reference: str, directory: Path | None = None) -> Any:
    """Returns the object that `reference` names.

    `directory` is where relative file names start and what imports of the user's own modules see first (the
    recipe's directory; the current one when left out).

    Raises:
        RecipeError: the reference has no `:`, or its file, module or name does not exist, or it fails to import.
    """
    source, separator, name = reference.rpartition(":")
    if not separator or not source or not name:
        raise RecipeError(f"a reference is written `file.py:Name` or `package.module:Name`, but {reference!r} is not")
    directory = (directory or Path.cwd()).resolve()
    module = (
        _import_file(directory / source, reference) if source.endswith(".py") else _import_module(source, directory)
    )
    if name not in vars(module):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        close = get_close_matches(name, names, n=3) or sorted(names)[:8]
        raise RecipeError(f"{source} defines no {name!r} (asked for by {reference!r}); it has: {', '.join(close)}")
    return vars(module)[name]


def _import_file(path: Path, reference: str) -> ModuleType:
    try:
        files.require_regular(path, RecipeError)
    except RecipeError as error:
        raise RecipeError(f"the file {error} (asked for by {reference!r})") from error
    siblings = [p for p in sorted(path.parent.glob("*.py")) if p.is_file()]
    with foreign.calling(f"a file beside {path} cannot be read", RecipeError):
        content = b"".join(p.name.encode() + p.read_bytes() for p in siblings)
    key = hashlib.sha256(str(path.parent).encode() + content).hexdigest()[:12]
    package = f"solidify_user_{key}"
    name = f"{package}.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    if package not in sys.modules:
        holder = ModuleType(package, "Holds the files of one directory, so that they can import each other.")
        holder.__path__ = [str(path.parent)]
        sys.modules[package] = holder
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{path} cannot be imported as Python source (asked for by {reference!r})")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _no_bytecode():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself would end this one, as if all were done
        sys.modules.pop(name, None)
        raise RecipeError(f"importing {path} failed with {foreign.said(error)}") from error
    sys.modules[name] = sys.modules.pop(name)  # modules stand in the order they were finished
    return module


def _import_module(module: str, directory: Path) -> ModuleType:
    with _first_on_path(directory):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            where = "it is neither installed nor beside the recipe"
            if error.name is not None and not module.startswith(error.name):
                where = f"it imports {error.name!r}, which is not installed"
            raise RecipeError(
                f"the module {module!r} cannot be imported: {where} (looked in {directory} and on sys.path)"
            ) from error
        except (Exception, SystemExit) as error:
            raise RecipeError(f"importing {module!r} failed with {foreign.said(error)}") from error


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Writes nothing beside the user's files: old bytecode would pass for that of a file edited within a second."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _first_on_path(directory: Path) -> Iterator[None]:
    entry = str(directory)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
