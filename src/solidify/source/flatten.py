"""Writes a source file as it stands in a flat directory: import statements are rewritten, all else stays as it was.

What transformers copies along with a model it finds by text: lines that start with `from .name import` (or
`import .name`), wherever they stand. So every file that is needed must be named by such a line, and no string may
contain one that names a file that is not there.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from solidify.source.syntax import SourceFile, is_docstring, parse

Import = ast.Import | ast.ImportFrom
Edit = tuple[int, int, str]  # from byte, to byte, new text

# The two patterns of transformers 5.23, dynamic_module_utils.get_relative_imports.
_FOLLOWED = (r"^\s*import\s+\.(\S+)\s*$", r"^\s*from\s+\.(\S+)\s+import")
_WIDTH = 110


@dataclass(frozen=True)
class Target:
    """What an imported name stands for: a carried file or a name in it, or (without a `source`) something outside.

    `module` is the absolute name of what is outside; `name` is None for the module itself.
    """

    source: SourceFile | None
    module: str
    name: str | None


@dataclass(frozen=True)
class Binding:
    """One name that an import statement binds (`*` for all that the target has)."""

    local: str
    target: Target


def import_text(
    source: SourceFile,
    node: Import,
    bindings: Sequence[Binding],
    flat: Mapping[SourceFile, str],
    first: Sequence[SourceFile],
) -> str:
    """Returns an import statement as it must read in the flat directory (unchanged, where that is as it was).

    The files in `first` are imported before it.
    """
    start, end = source.span(node)
    original = source.text.encode()[start:end].decode()
    outside = [b.target.module for b in bindings if b.target.source is None]
    as_it_was = isinstance(node, ast.Import) or (not node.level and set(outside) == {node.module})
    if as_it_was and len(bindings) == len(node.names) == len(outside):
        return original
    lines = [(_write_import(source, flat[other]), "first of files that import each other") for other in first]
    lines += _import_lines(source, bindings, flat) or [("pass", "")]
    if ast.dump(parse("\n".join(line for line, _ in lines))) == ast.dump(parse(ast.unparse(node))):
        return original
    return _in_place(source, node, lines)


def commented(source: SourceFile, node: ast.stmt, reason: str) -> str:
    """Returns the text that stands for a statement that has nothing to do in the artifact."""
    _, end = source.span(node)
    rest = source.text.encode()[end : source.starts[node.end_lineno or node.lineno]].decode().strip()
    shown = " ".join(ast.unparse(node).split())
    return "pass" if rest else f"pass  # {reason}: {shown}"


def write(
    source: SourceFile, edits: Sequence[Edit], statements: Sequence[ast.stmt] | None, preamble: Sequence[str]
) -> str:
    """Returns the file with `edits` made: whole, or only the given `statements`; `preamble` comes after its head."""
    body = source.tree.body
    head = [n for n in body[:1] if is_docstring(n)]
    head += [n for n in body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    if statements is None or [n for n in body if n not in head] == [n for n in statements if n not in head]:
        if preamble:
            edits = [*edits, _make_insertion(source, head, preamble)]
        return _apply_edits(source, 0, source.starts[-1], edits)
    pieces: list[str] = []
    last: ast.stmt | None = None
    for statement in [*[n for n in statements if n in head], *[n for n in statements if n not in head]]:
        start, end = _find_segment(source, statement)
        blank = _blank_lines_before(source, start)
        if preamble and statement not in head:
            pieces.append(("\n\n" if pieces else "") + "\n".join(preamble))
            preamble, last = (), None
        if last is not None and body.index(statement) == body.index(last) + 1:
            start = _find_segment(source, last)[1]
        elif pieces:
            defined = _is_definition(statement) or (last is not None and _is_definition(last))
            pieces.append("\n" * (3 if defined else 1 + min(blank, 2)))
        pieces.append(_apply_edits(source, start, end, edits))
        last = statement
    return "".join(pieces).rstrip() + "\n"


def followed(text: str) -> set[str]:
    """Returns the names that transformers takes for files beside this one."""
    return {name for pattern in _FOLLOWED for name in re.findall(pattern, text, flags=re.MULTILINE)}


def show_to_transformers(text: str, needed: Iterable[str]) -> str:
    """Adds a string that names the files which the text needs and transformers would not see."""
    unseen = sorted(set(needed) - followed(text))
    if not unseen:
        return text
    lines = "\n".join(f"from .{name} import" for name in unseen)
    return f'{text.rstrip()}\n\n"""transformers copies only what such lines name:\n{lines}\n"""\n'


def hide_from_transformers(text: str, names: Iterable[str]) -> tuple[str, list[int]]:
    """Spells what looks like an import of `names` inside strings so that they stay equal and no pattern matches.

    Returns the text, and the lines where that is impossible (a raw string, or part of an f-string).
    """
    unwanted, failed = set(names), []
    for pattern in _FOLLOWED:
        for match in reversed(list(re.finditer(pattern, text, flags=re.MULTILINE))):
            if match.group(1) not in unwanted:
                continue
            offset = match.start() + len(match.group()) - len(match.group().lstrip())
            if not _in_plain_string(text, offset):
                failed.append(text.count("\n", 0, offset) + 1)
                continue
            text = f"{text[:offset]}\\x{ord(text[offset]):02x}{text[offset + 1 :]}"
    return text, sorted(failed)


def unused(word: str, taken: Iterable[str]) -> str:
    """Returns `word`, lengthened until nothing in `taken` is called so."""
    words = set(taken)
    while word in words:
        word += "_"
    return word


def _import_lines(
    source: SourceFile, bindings: Sequence[Binding], flat: Mapping[SourceFile, str]
) -> list[tuple[str, str]]:
    """Returns import statements with comments: one per file or module, in the order of their first names."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for binding in bindings:
        target = binding.target
        module = f".{flat[target.source]}" if target.source is not None else target.module
        if target.name is None:
            groups.setdefault((module, True), []).append(binding.local)
        else:
            alias = "" if binding.local in (target.name, "*") else f" as {binding.local}"
            groups.setdefault((module, False), []).append(target.name + alias)
    lines = []
    for (module, is_module), names in groups.items():
        if not is_module:
            lines.append((f"from {module} import {', '.join(names)}", ""))
            continue
        stem = module.removeprefix(".")
        for local in names:
            if stem == module:
                lines.append((f"import {module}" + ("" if module == local or "." in local else f" as {local}"), ""))
                continue
            lines.append((_write_import(source, stem), "transformers follows this line, not the next"))
            lines.append((f"from . import {stem}" + ("" if stem == local else f" as {local}"), ""))
    return lines


def _write_import(source: SourceFile, stem: str) -> str:
    """Returns a statement that imports a file and that transformers recognises; it works in a circular import, too."""
    return f"from .{stem} import __name__ as {unused(f'_{stem}', source.identifiers)}"


def _in_place(source: SourceFile, node: ast.stmt, lines: Sequence[tuple[str, str]]) -> str:
    """Sets lines where a statement stands: one under the other, or on one line where it does not have its own."""
    before = source.text.encode()[source.starts[node.lineno - 1] : source.span(node)[0]].decode()
    if before.strip():
        return "; ".join(line for line, _ in lines)
    shown = []
    for line, comment in lines:
        head, _, names = line.partition(" import ")
        if len(line) + len(before) > _WIDTH and head.startswith("from "):
            line = f"{head} import (\n    " + names.replace(", ", ",\n    ") + ",\n)"
        shown.append(line.replace("\n", "\n" + before) + (f"  # {comment}" if comment else ""))
    return ("\n" + before).join(shown)


def _apply_edits(source: SourceFile, start: int, end: int, edits: Sequence[Edit]) -> str:
    data, pieces, here = source.text.encode(), [], start
    for first, last, text in sorted(e for e in edits if start <= e[0] and e[1] <= end):
        pieces += [data[here:first], text.encode()]
        here = last
    return b"".join([*pieces, data[here:end]]).decode()


def _make_insertion(source: SourceFile, head: Sequence[ast.stmt], preamble: Sequence[str]) -> Edit:
    text = "\n".join(preamble) + "\n"
    if head:
        line = max(node.end_lineno or node.lineno for node in head)
        ends = source.text.encode()[: source.starts[line]].endswith((b"\n", b"\r"))
        return source.starts[line], source.starts[line], text if ends else "\n" + text
    offset = source.starts[source.text.encode()[: source.span(source.tree.body[0])[0]].count(b"\n")]
    return offset, offset, text


def _find_segment(source: SourceFile, node: ast.stmt) -> tuple[int, int]:
    """Returns the span of a statement with the comments directly above it and behind it."""
    data = source.text.encode()
    start, end = source.span(node)
    line = next(i for i, offset in enumerate(source.starts) if offset > start) - 1
    if not data[source.starts[line] : start].strip():
        start = source.starts[line]
        while line and data[source.starts[line - 1] : source.starts[line]].lstrip().startswith(b"#"):
            line -= 1
            start = source.starts[line]
    rest = data[end : source.starts[node.end_lineno or node.lineno]]
    if rest.strip().startswith(b"#"):
        end += len(rest.rstrip())
    return start, end


def _blank_lines_before(source: SourceFile, offset: int) -> int:
    lines = source.text.encode()[:offset].splitlines()
    return next((n for n, line in enumerate(reversed(lines)) if line.strip()), len(lines))


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _in_plain_string(text: str, offset: int) -> bool:
    """Whether the character at `offset` stands in a string literal in which `\\x66` means `f`."""
    starts = [0]
    for line in io.StringIO(text, newline=""):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        first, last = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
        if token.type == tokenize.STRING and first <= offset < last:
            prefix = token.string[: re.search("['\"]", token.string).start()]  # type: ignore[union-attr]
            return not set(prefix.lower()) & {"r", "f"}
    return False
