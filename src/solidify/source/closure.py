"""Everything that classes need to be imported elsewhere: their files and those they import, flat in one directory.

Goes in: classes, wherever their source is kept. Comes out: files that need nothing but torch, transformers, what is
installed, and each other. What cannot be carried is refused with the file and the line.
"""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solidify.errors import ArtifactError, refuse
from solidify.source import cycles, extraction, flatten, payload
from solidify.source.cycles import Circles
from solidify.source.flatten import Binding, Import, Target
from solidify.source.imports import Fault, Library, circumstances
from solidify.source.origin import MAIN, Origins
from solidify.source.ownership import ALWAYS, import_root, is_published, outside, surroundings
from solidify.source.syntax import SourceFile
from solidify.source.traversal import Walk

# What transformers' cache of remote code puts around a file.
_NOISE = re.compile(r"transformers_modules|_?[0-9a-f]{16}|_?[0-9a-f]{40}")


_ENTRY = '''"""Imports files that import each other from where that works. Written by solidify."""

from .{first} import __name__ as first
from .{module} import {name}
'''


@dataclass(frozen=True)
class Closure:
    """Flat files by name, the module that each class is imported from, and the third-party packages that are needed."""

    files: dict[str, str]
    modules: dict[Any, str]
    requirements: dict[str, str]


def collect(
    classes: Sequence[type], *, functions: Sequence[Callable[..., Any]] = (), reserved: Collection[str] = ()
) -> Closure:
    """Collects the source of `classes` and `functions` and, recursively, of all that they import of the user's own.

    File names in `reserved` are not used. A class of torch or transformers is imported from where it is; all others
    are carried, also from packages that are installed. Where such a package cannot be carried, and comes from an index,
    whoever loads the artifact needs it installed, as they need what the files import.

    Raises:
        ArtifactError: a class has no source that could be carried, or a file imports or reads what would not travel;
            every fault is listed with its file and line.
    """
    asked: list[Any] = [*(c for c in classes if isinstance(c, type)), *functions]
    tops = {(each.__module__ or "torch").split(".")[0] for each in asked}
    try:
        return _collect(classes, functions, reserved, tops)
    except ArtifactError:
        published = {top for top in tops if top not in ALWAYS and is_published(top, surroundings(()))}
        if not published:
            raise
    return _collect(classes, functions, reserved, tops - published)


def _collect(
    classes: Sequence[type], functions: Sequence[Callable[..., Any]], reserved: Collection[str], tops: set[str]
) -> Closure:
    """Collects as `collect` does, with the top-level packages `tops` as one's own."""
    library = Library(surroundings(tops))
    origins, walk = Origins(library), Walk(library)
    homes = {cls: origins.of(cls) for cls in classes} | {each: origins.of_function(each) for each in functions}
    for found in homes.values():
        if isinstance(found, Fault):
            walk.faults[found.reason] = None
        elif found.source is not None:
            walk.roots.add(found.source)
            walk.demand(found)
        elif (owner := outside(found.module, library.here)) is not None:
            walk.requirements.update([owner])
    walk.run()
    for main in origins.mains.values():
        if isinstance(main, SourceFile) and main in walk.extracts:
            live = vars(sys.modules["__main__"])
            walk.faults |= dict.fromkeys(extraction.faults(main, walk.extracts[main], live))
    walk.finish()
    title = "the modules' source cannot travel with the artifact"
    refuse(ArtifactError, title, walk.faults)
    targets = {cls: found for cls, found in homes.items() if isinstance(found, Target)}
    flat = _flat_names(walk, reserved, {t.source: c.__name__ for c, t in reversed(targets.items()) if t.source})
    circles = cycles.circles(walk.bindings)
    taken = {name.removesuffix(".py") for name in reserved}
    files = _write_files(walk, flat, circles, taken)
    refuse(ArtifactError, title, walk.faults)
    modules = {cls: t.module if t.source is None else f".{flat[t.source]}" for cls, t in targets.items()}
    for cls, target in targets.items():
        first = cycles.first(circles[target.source]) if target.source in circles else target.source
        if target.source is not None and first is not None and first is not target.source:
            stems = {*taken, *(name.removesuffix(".py") for name in files)}
            modules[cls] = f".{flatten.unused(f'{flat[target.source]}_entry', stems)}"
            text = _ENTRY.format(first=flat[first], module=flat[target.source], name=cls.__name__)
            files[f"{modules[cls][1:]}.py"] = text
    return Closure(dict(sorted(files.items())), modules, dict(sorted(walk.requirements.items())))


def _flat_names(walk: Walk, reserved: Collection[str], classes: Mapping[Any, str]) -> dict[SourceFile, str]:
    """Gives each file a name of its own, made of as much of its path as it takes to be the only one."""
    parts = {source: _find_parts(source, classes.get(source)) for source in walk.bindings}
    taken = {name.removesuffix(".py").casefold() for name in reserved}
    length, number = dict.fromkeys(parts, 1), dict.fromkeys(parts, 1)
    while True:
        names = {
            s: _make_identifier("_".join(p[0][-length[s] :])) + (f"_{number[s]}" if number[s] > 1 else "")
            for s, p in parts.items()
        }
        groups: dict[str, list[SourceFile]] = {}
        for source in sorted(parts, key=lambda s: (str(s.path), s.name)):
            groups.setdefault(names[source].casefold(), []).append(source)
        clashes = [group for name, group in groups.items() if len(group) > 1 or name in taken]
        if not clashes:
            return names
        for group in clashes:
            inside = [s for s in group if length[s] < parts[s][1]]
            above = [s for s in group if length[s] < len(parts[s][0])]
            for source in inside or above:
                length[source] += 1
            if not above:
                for index, source in enumerate(group):
                    number[source] += index if len(group) > 1 else 1


def _find_parts(source: SourceFile, cls: str | None) -> tuple[list[str], int]:
    """Returns the parts of a file's path that its name is made of, and how many of them lie inside its project."""
    if source.name in MAIN:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls or "main").lower()
        return [source.path.stem if source.path is not None else "notebook", name], 2
    assert source.path is not None
    path = source.path.parent if source.is_init else source.path.with_suffix("")
    within = path.relative_to(import_root(source.path, source.package)).parts
    parts = [part for part in path.parts[1:] if not _NOISE.fullmatch(part)]
    return parts, max(1, sum(not _NOISE.fullmatch(part) for part in within))


def _make_identifier(name: str) -> str:
    word = re.sub(r"\W", "_", name)
    word = f"_{word}" if not word or word[0].isdigit() else word
    return f"{word}_" if keyword.iskeyword(word) else word


def _write_files(
    walk: Walk, flat: Mapping[SourceFile, str], circles: Circles, reserved: Collection[str]
) -> dict[str, str]:
    """Writes every file that travels, and those that carry data."""
    files: dict[str, str] = {}
    carriers: dict[SourceFile, str] = {}
    for source in walk.payloads:
        carriers[source] = flatten.unused(f"{flat[source]}_data", [*flat.values(), *carriers.values(), *reserved])
        files[f"{carriers[source]}.py"] = payload.carrier(walk.payloads[source], f"{flat[source]}.py")
    stems = {*flat.values(), *carriers.values()}
    for source, name in flat.items():
        edits = list(walk.edits[source])
        needed = {carriers[source]} if source in carriers else set()
        for node, bindings in _import_statements(walk, source, flat):
            if bindings is None:
                text = flatten.commented(source, node, circumstances(source, node)[1])
            else:
                used = [binding.target.source for binding in bindings if binding.target.source is not None]
                entered = [circles[s] for s in used if s in circles and source not in circles[s]]
                first = list(dict.fromkeys(cycles.first(circle) for circle in entered))
                first = [] if first == used[:1] else first
                text = flatten.import_text(source, node, bindings, flat, first)
                needed |= {flat[target] for target in (*used, *first)}
            edits.append((*source.span(node), text))
        preamble = [f"from .{carriers[source]} import {walk.payloads[source].imported}"] if source in carriers else []
        text = flatten.write(source, edits, None if source.whole else walk.statements(source), preamble)
        if source.name in MAIN:
            names = ", ".join(sorted(source.wanted))
            text = f"# Taken from {source.shown} by solidify: {names}, and what is needed.\n\n{text}"
        text, stuck = flatten.hide_from_transformers(text, flatten.followed(text) - stems)
        shown = [text.split("\n")[line - 1].strip() for line in stuck]
        walk.faults |= dict.fromkeys(
            f"{source.shown}: the string with `{line}` reads like an import, which transformers would follow; "
            "put something before it on its line"
            for line in shown
        )
        files[f"{name}.py"] = flatten.show_to_transformers(text, needed)
    return files


def _import_statements(
    walk: Walk, source: SourceFile, flat: Mapping[SourceFile, str]
) -> Iterator[tuple[Import, list[Binding] | None]]:
    """Yields the import statements of a file with what they bind; None where it never runs."""
    yield from walk.bindings[source].items()
    for node, bindings in walk.unseen[source].items():
        there = bindings is not None
        for target in (b.target for b in bindings or []):
            if target.source is None:
                there &= walk.is_always(source, target)
            else:
                whole = target.source.whole or target.name in target.source.wanted
                there &= target.source in flat and whole
        yield node, bindings if there else None
