"""Whose an imported module is: always there, installed, one's own, or nowhere; and where one's own stands.

Nothing is imported to find out: what is in `sys.modules` already is asked first, then the import system's finders.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import json
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

from solidify.source.syntax import SourceFile
from solidify.system import foreign

ALWAYS = ("torch", "transformers")
_CARRIED_OF_OURS = "solidify.modules"

Owner = Literal["always", "installed", "own", "solidify", "compiled", "missing"]


@dataclass(frozen=True)
class Location:
    """Where a module is: `path` is the source of one's own, `search` a package's directories of submodules."""

    name: str
    owner: Owner
    path: Path | None = None
    search: tuple[str, ...] | None = None

    @property
    def is_package(self) -> bool:
        """Whether it is a package of one's own."""
        return self.owner == "own" and self.search is not None


@dataclass(frozen=True)
class Surroundings:
    """What is installed here, and the top-level packages that count as one's own wherever they stand."""

    tops: frozenset[str]

    @cached_property
    def distributions(self) -> Mapping[str, list[Distribution]]:
        """The distributions that provide each top-level name."""
        found: dict[str, list[Distribution]] = {}
        for path in dict.fromkeys(path for path in sys.path if isinstance(path, str)):
            for top, held in _read_distributions(path, _read_time(path)).items():
                found.setdefault(top, []).extend(held)
        return found


@lru_cache(maxsize=64)
def _read_distributions(path: str, _changed: int) -> Mapping[str, list[Distribution]]:
    """Reads what every distribution in a directory provides (half a second); anew when the directory has changed.

    One that is broken, as an installation that was interrupted leaves it, provides nothing.
    """
    found: dict[str, list[Distribution]] = {}
    for each in distributions(path=[path]):
        for top in foreign.attempt(_list_tops, each).value or ():
            found.setdefault(top, []).append(each)
    return found


def _list_tops(found: Distribution) -> set[str]:
    """Returns the top-level names that a distribution provides: those that it declares, or those of its files."""
    if not found.metadata["Name"] or not found.version:
        return set()
    found.read_text("RECORD")  # bytes that are no text, in a broken one
    if declared := (found.read_text("top_level.txt") or "").split():
        return set(declared)
    firsts = (file.parts[0] if len(file.parts) > 1 else inspect.getmodulename(file.name) for file in found.files or ())
    return {name for name in firsts if name and "." not in name and name != "__pycache__"}


def _read_time(path: str) -> int:
    """Returns when a directory got or lost a name; 0 for what is none."""
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def surroundings(tops: Collection[str]) -> Surroundings:
    """Forgets which files the finders know, so that those that were written a moment ago are found, too."""
    importlib.invalidate_caches()
    return Surroundings(frozenset(tops))


def locate(name: str, near: SourceFile, here: Surroundings) -> Location:
    """Finds the module `name` as the file `near` would import it."""
    parent, _, last = name.rpartition(".")
    if not parent:
        if name in ALWAYS:
            return Location(name, "always")
        return judge(name, _top_level(name, near), here)
    home = locate(parent, near, here)
    if home.owner in ("always", "installed"):
        return Location(name, home.owner)
    if home.search is None:
        return Location(name, home.owner if home.owner in ("compiled", "solidify") else "missing")
    # By its last part alone: for a dotted name, a namespace package would ask for its parent in `sys.modules`.
    return judge(name, PathFinder.find_spec(last, list(home.search)), here)


def requirement(name: str, here: Surroundings) -> tuple[str, str]:
    """Returns the distribution (and its version) that an installed module belongs to."""
    candidates = sorted(here.distributions[name.split(".")[0]], key=lambda found: found.name)
    start = name.replace(".", "/")  # in a namespace, that several fill, the one with most files there

    def count(found: Distribution) -> int:
        """Counts the files of a distribution in the module; of one whose list of them is broken, there are none."""
        files = foreign.attempt(lambda: found.files).value or ()
        return sum(str(file).startswith(start) for file in files)

    best = max(candidates, key=count) if len(candidates) > 1 else candidates[0]
    return best.name, best.version


def outside(name: str, here: Surroundings) -> tuple[str, str] | None:
    """Returns the distribution (and its version) of a module that was imported; None for what is always there."""
    judged = judge(name, sys.modules[name].__spec__, here)
    return requirement(name, here) if name.split(".")[0] not in ALWAYS and judged.owner == "installed" else None


def is_published(top: str, here: Surroundings) -> bool:
    """Returns whether a top-level package was installed from an index or an archive, as others can by its name.

    What was installed from a directory or a repository says where from (PEP 610); conda, which builds its packages in a
    directory, does so of all.
    """
    found = here.distributions.get(top, [])
    return bool(found) and all(foreign.attempt(_is_of_an_index, each).value for each in found)


def _is_of_an_index(found: Distribution) -> bool:
    text = found.read_text("direct_url.json")
    elsewhere = text is not None and bool({"dir_info", "vcs_info"} & json.loads(text).keys())
    return found.read_text("RECORD") is not None and (
        not elsewhere or (found.read_text("INSTALLER") or "").strip() == "conda"
    )


def import_root(path: Path, package: str) -> Path:
    """Returns the directory from which a file's package is imported."""
    root = path.parent
    for part in reversed(package.split(".") if package else []):
        if root.name != part:  # a package made at run time, as for a file that was named by its path
            break
        root = root.parent
    return root


def _top_level(name: str, near: SourceFile) -> ModuleSpec | None:
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__spec__ is None:
        search = vars(loaded).get("__path__")
        file = vars(loaded).get("__file__")
        if search is None and file is None:
            return None
        found = ModuleSpec(name, None, origin=file, is_package=search is not None)
        found.submodule_search_locations = list(search) if search is not None else None
        return found
    found_here = importlib.util.find_spec(name)
    if found_here is not None:
        return found_here
    root = import_root(near.path, near.package) if near.path is not None else Path.cwd()
    return PathFinder.find_spec(name, [str(root)])


def judge(name: str, spec: ModuleSpec | None, here: Surroundings) -> Location:
    """Says whose the module is that the import system found."""
    top = name.split(".")[0]
    standard = top in sys.stdlib_module_names
    if spec is None:
        return Location(name, "always" if standard else "missing")
    search = tuple(spec.submodule_search_locations) if spec.submodule_search_locations is not None else None
    origin = spec.origin if spec.origin not in (None, "namespace") else None
    location = Path(origin) if origin is not None else Path(search[0]) if search else None
    if standard and (
        location is None or not location.is_absolute() or _is_within(location, [sysconfig.get_path("stdlib")])
    ):
        return Location(name, "always")
    if top == "solidify" and not f"{name}.".startswith(f"{_CARRIED_OF_OURS}."):
        return Location(name, "solidify", search=search)
    if location is not None and top not in here.tops and top != "solidify" and _is_installed(top, location, here):
        return Location(name, "installed")
    if origin is None:
        return Location(name, "own" if search else "missing", None, search)
    if Path(origin).suffix == ".py" and Path(origin).is_file():
        path = Path(origin).absolute()
        return Location(name, "own", path.parent.resolve() / path.name, search)
    return Location(name, "compiled", Path(origin), search)


def _is_installed(top: str, path: Path, here: Surroundings) -> bool:
    """Whether a distribution that was installed (not one that points to a project elsewhere) holds the file."""
    found = here.distributions.get(top, [])
    paths = sysconfig.get_paths()
    directories = [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]
    directories += [str(each.locate_file("")) for each in found if each.read_text("RECORD")]
    return bool(found) and _is_within(path, directories)


def _is_within(path: Path, directories: list[str]) -> bool:
    return any(path.is_relative_to(d) or path.resolve().is_relative_to(Path(d).resolve()) for d in directories)
