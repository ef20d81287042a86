"""The data files that a source file reads beside it, carried inside a Python file, because only those travel.

Goes in: a source file that uses `__file__` or importlib.resources. Comes out: a file that holds the data as text,
unpacks it into a directory of its own at import, and says where the source file would stand in it.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from solidify.source.flatten import Edit, unused
from solidify.source.syntax import SourceFile, is_docstring, is_main_guard, statement_of

LIMIT = 4 * 2**20

_RESOURCES = ("importlib.resources", "importlib_resources")
_RESOURCE_CALLS = {
    "files", "path", "contents", "is_resource", "open_text", "open_binary", "read_text", "read_binary",
}  # fmt: skip
_COMPILED = {".so", ".pyd", ".dll", ".dylib"}
_UNSEEN = {"__pycache__", ".git"}

_CARRIER = '''"""{title}

Only .py files travel with a model, so the data stands here as text. Written by solidify.
"""

import atexit
import base64
import os
import shutil
import tempfile
import zlib
{imports}from pathlib import Path

HELD = []
FILES = {{
{files}}}


def hold(directory):
    """Locks a directory as long as this process lives, so that what a killed one leaves is known as such."""
    try:
        import fcntl

        file = open(directory / ".solidify.lock.new", "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(file.name, directory / ".solidify.lock")
        return file
    except (ImportError, OSError):
        return None


def unpack():
    """Writes the files into a directory that is removed when this process ends."""
    directory = Path(tempfile.mkdtemp(prefix="solidify-"))
    HELD.append(hold(directory))
    process = os.getpid()
    atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == process else None)
    for name, text in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zlib.decompress(base64.b85decode(text.replace("\\n", ""))))
    return directory


{package}DIRECTORY = unpack()
FILE = str(DIRECTORY / {seat})  # stands for __file__
Path(FILE).parent.mkdir(parents=True, exist_ok=True)
{anchors}'''

_PACKAGE = '''def package(folder):
    """Returns a package of that directory; importlib.resources reads from it."""
    directory = DIRECTORY / folder
    directory.mkdir(parents=True, exist_ok=True)
    found = spec_from_file_location(f"{__name__}.files", directory / "__init__.py", submodule_search_locations=[])
    return module_from_spec(found)


'''


@dataclass(frozen=True)
class Payload:
    """What one source file reads: `files` by their path in the unpacked directory, in which it has its own `seat`."""

    source: SourceFile
    files: dict[str, Path]
    seat: str
    anchors: tuple[str, ...]
    edits: tuple[Edit, ...]
    imported: str
    anchor_nodes: frozenset[ast.AST]

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(path.stat().st_size for path in self.files.values())


@dataclass(frozen=True)
class _Anchor:
    call: ast.Call
    argument: ast.expr | None
    directory: Path


def gather(
    source: SourceFile, statements: Sequence[ast.stmt], directory_of: Callable[[ast.expr | None], Path | str | None]
) -> tuple[Payload | None, list[str]]:
    """Finds the data files that `statements` of a source read, by the strings that name what stands beside it.

    `directory_of` says what importlib.resources is asked about: the directory of a package of one's own, None for
    another's, or a fault. Returns None where nothing is read, and the faults.
    """
    faults: list[str] = []
    uses = [n for s in statements for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == "__file__"]
    uses = [use for use in uses if not _only_for_the_path(source, use) and not _never_runs(source, use)]
    anchors = []
    for call in _resource_calls(source, statements):
        argument = call.args[0] if call.args else next((k.value for k in call.keywords), None)
        directory = directory_of(argument)
        if isinstance(directory, str):
            faults.append(f"{source.name_line(call)}: {directory}")
        elif directory is not None:
            anchors.append(_Anchor(call, argument, directory))
    if source.path is None or not (uses or anchors):
        return None, faults
    found = _find_files(source, statements, [*uses, *(a.call for a in anchors)], [a.directory for a in anchors])
    if not found:
        faults += [
            f"{source.name_line(use)}: `{ast.unparse(statement_of(source, use)).splitlines()[0]}` looks beside the "
            "file, but no string in it names a file that is there; name the file, or pass its content as an argument"
            for use in [*uses, *(a.call for a in anchors)]
        ]
        return None, faults
    compiled = [path for path in found if path.suffix in _COMPILED]
    faults += [f"{source.shown}: it loads {path.name}, which is compiled and cannot be carried" for path in compiled]
    root = Path(os.path.commonpath([source.path.parent, *(p.parent for p in found), *(a.directory for a in anchors)]))
    carried_files = {path.relative_to(root).as_posix(): path for path in sorted(found)}
    folders = tuple(dict.fromkeys(a.directory.relative_to(root).as_posix() for a in anchors))
    file = unused("_FILE", source.identifiers)
    packages = {folder: unused(f"_PACKAGE{n or ''}", source.identifiers) for n, folder in enumerate(folders)}
    edits = [(*source.span(use), file) for use in uses]
    edits += [_anchor_edit(source, a, packages[a.directory.relative_to(root).as_posix()]) for a in anchors]
    names = [f"FILE as {file}"] if uses else []
    names += [f"PACKAGE{n or ''} as {name}" for n, name in enumerate(packages.values())]
    for use in uses:
        first, last = source.span(use)
        if source.text.encode()[first:last] != b"__file__":  # Python 3.11 misplaces what stands inside f-strings
            faults.append(
                f"{source.name_line(use)}: `__file__` inside an f-string cannot be replaced; assign it to a name"
            )
    seat = source.path.relative_to(root).as_posix()
    inside = frozenset(n for a in anchors if a.argument is not None for n in ast.walk(a.argument))
    return Payload(source, carried_files, seat, folders, tuple(edits), ", ".join(names), inside), faults


def carrier(payload: Payload, name: str) -> str:
    """Returns the Python file that carries the data of the file that is called `name` in the artifact."""
    blocks = []
    for relative, path in payload.files.items():
        text = base64.b85encode(zlib.compress(path.read_bytes(), 9)).decode()
        lines = "\n".join(text[i : i + 100] for i in range(0, len(text), 100))
        blocks.append(f'    {json.dumps(relative)}: """\n{lines}\n""",\n')
    anchors = (f"PACKAGE{n or ''} = package({json.dumps(folder)})\n" for n, folder in enumerate(payload.anchors))
    return _CARRIER.format(
        title=f"The files that {name} reads: {', '.join(list(payload.files)[:4])}{', ...' * (len(payload.files) > 4)}.",
        imports="from importlib.util import module_from_spec, spec_from_file_location\n" if payload.anchors else "",
        files="".join(blocks),
        package=_PACKAGE if payload.anchors else "",
        seat=json.dumps(payload.seat),
        anchors="".join(anchors),
    )


def changes_the_path(node: ast.AST) -> bool:
    """Whether a statement only adds to `sys.path`; in the artifact, nothing is looked for there."""
    match node:
        case ast.Expr(ast.Call(ast.Attribute(ast.Attribute(ast.Name("sys"), "path"), "append" | "insert" | "extend"))):
            return True
    return False


def _only_for_the_path(source: SourceFile, use: ast.Name) -> bool:
    """Whether a use of `__file__` ends in `sys.path` alone, directly or through names that nothing else reads."""
    statement = statement_of(source, use)
    if changes_the_path(statement):
        return True
    if not isinstance(statement, ast.Assign) or not all(isinstance(t, ast.Name) for t in statement.targets):
        return False
    names = {t.id for t in statement.targets if isinstance(t, ast.Name)}
    readers = [n for n in ast.walk(source.tree) if isinstance(n, ast.Name) and n.id in names]
    readers = [n for n in readers if isinstance(n.ctx, ast.Load)]
    return bool(readers) and all(changes_the_path(statement_of(source, n)) for n in readers)


def _never_runs(source: SourceFile, node: ast.AST) -> bool:
    while node in source.parents and not is_main_guard(node):
        node = source.parents[node]
    return is_main_guard(node)


def _resource_calls(source: SourceFile, statements: Sequence[ast.stmt]) -> Iterator[ast.Call]:
    """Yields the calls of importlib.resources' functions, by whatever name they were imported."""
    modules, functions = set(_RESOURCES), set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname for a in node.names if a.asname and a.name in _RESOURCES}
        elif isinstance(node, ast.ImportFrom) and node.module in _RESOURCES:
            functions |= {a.asname or a.name for a in node.names if a.name in _RESOURCE_CALLS}
        elif isinstance(node, ast.ImportFrom) and node.module == "importlib":
            modules |= {a.asname or a.name for a in node.names if a.name == "resources"}
    for statement in statements:
        for node in ast.walk(statement):
            match node:
                case ast.Call(ast.Name(name)) if name in functions:
                    yield node
                case ast.Call(ast.Attribute(module, name)) if (
                    name in _RESOURCE_CALLS and ast.unparse(module) in modules
                ):
                    yield node


def _anchor_edit(source: SourceFile, anchor: _Anchor, name: str) -> Edit:
    if anchor.argument is not None:
        return (*source.span(anchor.argument), name)
    end = source.span(anchor.call)[1] - 1
    return end, end, name


def _find_files(
    source: SourceFile, statements: Sequence[ast.stmt], uses: Sequence[ast.expr], directories: Sequence[Path]
) -> list[Path]:
    """Returns the files that strings of the source name, and directories that strings beside a use name."""
    assert source.path is not None
    touched = _find_touched(source, uses)
    strings: dict[str, bool] = {}
    for statement in statements:
        for node in ast.walk(statement):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            holder = source.parents[node]
            if is_docstring(holder) or isinstance(holder, ast.JoinedStr) or not node.value.isprintable():
                continue
            text = os.path.normpath(node.value)
            if text != "." and len(text.encode()) < 200 and not os.path.isabs(text):
                strings[text] = strings.get(text, False) or statement_of(source, node) in touched
    bases = [*directories]
    here = source.path.parent
    for _ in range(_count_ups(touched)):
        bases.append(here)
        here = here.parent
    found: list[Path] = []
    for base in dict.fromkeys(bases):
        found += _find_named(base, [s for s in strings if strings[s] or (base / s).is_file()], sorted(strings))
    return list(dict.fromkeys(path for path in found if path != source.path))


def _find_named(base: Path, tops: Sequence[str], strings: Sequence[str]) -> Iterator[Path]:
    """Yields the files under `base` that the strings name, alone or joined; of a directory with none, all its files."""
    for text in tops:
        path = Path(os.path.normpath(base / text))
        if path.is_file():
            yield path
        elif path.is_dir() and text.strip("./"):
            inner = list(_find_named(path, strings, strings))
            every = (p for p in sorted(path.rglob("*")) if p.is_file() and not _UNSEEN & set(p.parts))
            yield from inner or every
        elif any(mark in text for mark in "*?[") and "**" not in text:
            yield from (p for p in sorted(base.glob(text)) if p.is_file())


def _find_touched(source: SourceFile, uses: Sequence[ast.expr]) -> set[ast.stmt]:
    """Returns the statements that a use of the file's path reaches through what is assigned and returned."""
    readers: dict[object, set[ast.stmt]] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            readers.setdefault((source.owners[node], node.id), set()).add(statement_of(source, node))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            readers.setdefault(node.attr, set()).add(statement_of(source, node))
    touched: set[ast.stmt] = set()
    queue = [statement_of(source, use) for use in uses]
    while queue:
        statement = queue.pop()
        touched.add(statement)
        found: set[ast.stmt] = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found |= readers.get((source.owners[node], node.id), set())
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= readers.get(node.attr, set())
        if isinstance(statement, ast.Return):
            holder: ast.AST = statement
            while not isinstance(holder, ast.FunctionDef | ast.AsyncFunctionDef):
                holder = source.parents[holder]
            found |= readers.get(holder.name, set()) | readers.get((source.tree, holder.name), set())
        queue += found - touched
    return touched


def _count_ups(touched: set[ast.stmt]) -> int:
    """Returns how many directories, counted from the source's own, the statements can reach at most."""
    ups = 0
    for statement in touched:
        for node in ast.walk(statement):
            match node:
                case ast.Attribute(attr="parent" | "pardir") | ast.Constant(".."):
                    ups += 1
                case ast.Call(ast.Attribute(attr="dirname") | ast.Name("dirname")):
                    ups += 1
                case ast.Subscript(ast.Attribute(attr="parents"), ast.Constant(int(number))):
                    ups += number + 1
    return max(1, min(ups, 8))
