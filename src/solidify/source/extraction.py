"""Takes out of a file only what some of its names need: for a script, a notebook, or a package's `__init__`.

What a script does beside defining its classes is left behind. A needed statement that could not be repeated where the
artifact is loaded (it reads a file, loads a model, looks at the command line) is refused with its line.
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from solidify.source.syntax import SourceFile, at_import, is_docstring, is_main_guard

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)
_GIVEN = {*dir(builtins), "__file__", "__path__"}  # with `__name__`, `__doc__` and the like

# Calls whose result depends on the machine or the run, by the last part of what is called.
_RUNS = re.compile(
    r"(load($|_|txt)|read($|_)|fetch|download|from_pretrained|parse_(known_)?args|hf_hub_download|snapshot_download"
    r"|urlopen|getenv|check_output|open$|input$|run$|pipeline$|get_ipython$|system$|popen$)",
    re.IGNORECASE,
)
_SHOWN = {"torch", "transformers", *sys.stdlib_module_names}
_RUN_STATE = {"sys.argv", "os.environ"}


@dataclass(frozen=True)
class Extract:
    """The statements that are needed, in the order in which they are written, and the module's names that they use."""

    statements: list[ast.stmt]
    names: dict[str, str]  # each with a name that needs it


def extract(source: SourceFile, wanted: Collection[str]) -> Extract:
    """Finds the top-level statements that `wanted` names need, directly or through others.

    Of a notebook the latest definition counts, and statements are put in an order in which they can run; of a file
    every statement that binds a needed name is taken, in the file's order.
    """
    chosen: dict[ast.stmt, None] = {}
    names = {name: name for name in sorted(wanted)}
    queue = list(names)
    while queue:
        name = queue.pop()
        for statement in _statements_of(source, name):
            if statement in chosen:
                continue
            chosen[statement] = None
            for read in source.reads(statement):
                if read.id not in names:
                    names[read.id] = name
                    queue.append(read.id)
    if any(name not in source.binders and name not in _GIVEN for name in names):
        chosen |= dict.fromkeys(n for n in source.tree.body if isinstance(n, ast.ImportFrom) and n.names[0].name == "*")
    if source.is_init:
        chosen |= dict.fromkeys(n for n in source.tree.body[:1] if is_docstring(n))
    if chosen:
        chosen |= dict.fromkeys(_types_shown(source, chosen, names))
        chosen |= dict.fromkeys(n for n in source.tree.body if isinstance(n, ast.ImportFrom) and _is_future(n))
    order = {statement: index for index, statement in enumerate(source.tree.body)}
    statements = sorted(chosen, key=lambda s: (not _is_future(s), order[s]))
    return Extract(_order_runnable(source, statements) if source.cells else statements, names)


def faults(source: SourceFile, extracted: Extract, live: Mapping[str, Any]) -> Iterator[str]:
    """Yields what of a script or a notebook is needed and cannot be carried; `live` are its names as they are now."""
    carrying = _names_with_file(source, extracted)
    for name, needing in extracted.names.items():
        if name in source.binders or name in _GIVEN or name not in live:
            continue
        if not any(isinstance(s, ast.ImportFrom) and s.names[0].name == "*" for s in extracted.statements):
            line = next((r for s in extracted.statements for r in source.reads(s) if r.id == name), None)
            where = source.name_line(line) if line is not None else source.shown
            yield f"{where}: {needing} needs `{name}`, which no statement of it binds; define it there, or pass it"
    for statement in extracted.statements:
        if isinstance(statement, (*_DEFINITIONS, *_IMPORTS)):
            continue
        bound = [n for n in extracted.names if statement in source.binders.get(n, [])]
        needing = extracted.names[bound[0]] if bound else "the class"
        what = f"{source.name_line(statement)}: {needing} needs `{_first_line(statement)}`, "
        remedy = "write the value down, pass it as an argument, or keep it as a persistent buffer"
        if is_main_guard(statement):
            yield what + "which stands under a test of `__name__`; move what the class needs above it"
        elif (running := _what_runs(statement)) and not carrying & {n.id for n in source.reads(statement)}:
            yield what + f"and `{running}` would run again wherever the artifact is loaded; {remedy}"
        else:
            for name in bound:
                value = live.get(name)
                if isinstance(value, nn.Module) and (any(True for _ in value.parameters()) or any(value.buffers())):
                    yield what + f"a {type(value).__name__} with weights of its own, which would not travel; {remedy}"


def _statements_of(source: SourceFile, name: str) -> list[ast.stmt]:
    """Returns the statements that make a name what it is: those that bind it, and those that change what it holds."""
    binding = source.binders.get(name, [])
    if source.cells and binding:
        fresh = [index for index, s in enumerate(binding) if not isinstance(s, ast.AugAssign)]
        binding = binding[fresh[-1] if fresh else 0 :]
    if not binding or all(isinstance(s, _IMPORTS) for s in binding):
        return binding
    first = source.tree.body.index(binding[0])
    changers = {
        statement.name
        for statement in source.tree.body
        if isinstance(statement, ast.FunctionDef)
        and any(isinstance(inner, ast.stmt) and _is_change(inner, name) for inner in ast.walk(statement))
    }
    later = [s for s in source.tree.body[first + 1 :] if _is_change(s, name) or _is_call(source, s, changers)]
    return binding + [s for s in later if s not in binding]


def _is_change(statement: ast.stmt, name: str) -> bool:
    """Whether a statement stores into an object (`name[...] = `, `name.x = `) or calls a method of it."""
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AugAssign | ast.AnnAssign):
        targets = [statement.target]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        targets = [statement.value.func]
    return any(target is not _find_root(target) and _is_name(_find_root(target), {name}) for target in targets)


def _is_call(source: SourceFile, statement: ast.stmt, functions: Collection[str]) -> bool:
    """Whether a statement calls or is decorated with one of the functions, as registries are filled."""
    called: list[ast.expr] = []
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        called = [statement.value.func]
    elif isinstance(statement, _DEFINITIONS) and not (
        source.cells and statement is not source.binders[statement.name][-1]
    ):
        called = statement.decorator_list
    return any(_is_name(_find_root(part.func if isinstance(part, ast.Call) else part), functions) for part in called)


def _find_root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node


def _is_name(node: ast.expr, names: Collection[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _types_shown(source: SourceFile, chosen: Collection[ast.stmt], names: dict[str, str]) -> list[ast.stmt]:
    """Returns the imports (of what is always there) that only annotations of the chosen statements mention."""
    found = []
    for statement in chosen:
        for node in ast.walk(statement):
            if not isinstance(node, ast.Name) or node not in source.annotations:
                continue
            for binding in source.binders.get(node.id, [])[-1:]:
                modules = (
                    [binding.module or "." if not binding.level else "."] if isinstance(binding, ast.ImportFrom) else []
                )
                modules += [alias.name for alias in binding.names] if isinstance(binding, ast.Import) else []
                if modules and all(m.split(".")[0] in _SHOWN for m in modules):
                    names.setdefault(node.id, node.id)
                    found.append(binding)
    return found


def _order_runnable(source: SourceFile, statements: list[ast.stmt]) -> list[ast.stmt]:
    """Puts what a statement needs when it runs before it, and leaves the order as it is otherwise."""
    binding: dict[str, list[ast.stmt]] = {}
    for statement in statements:
        for name in [n for n, binders in source.binders.items() if statement in binders]:
            binding.setdefault(name, []).append(statement)
    ordered: dict[ast.stmt, None] = {}
    visited: set[ast.stmt] = set()

    def visit(statement: ast.stmt) -> None:
        """Puts a statement behind those that it needs."""
        if statement in visited:
            return
        visited.add(statement)
        for name in _needed_at_import(source, statement, binding):
            for other in binding.get(name, []):
                if not isinstance(other, ast.AugAssign):
                    visit(other)
        ordered[statement] = None

    for statement in statements:
        visit(statement)
    return list(ordered)


def _needed_at_import(source: SourceFile, statement: ast.stmt, binding: Mapping[str, list[ast.stmt]]) -> list[str]:
    """Returns the names that must be there when a statement runs; what it calls is looked into."""
    nodes = list(at_import(statement))
    names = [n.id for n in nodes if isinstance(n, ast.Name) and source.owners.get(n) is source.tree]
    decorated = isinstance(statement, _DEFINITIONS) and statement.decorator_list
    if decorated or any(isinstance(node, ast.Call) for node in nodes):
        seen = set(names)
        for name in names:  # grows while it is read
            for other in binding.get(name, []):
                if isinstance(other, _DEFINITIONS):
                    names += [r.id for r in source.reads(other) if r.id not in seen]
                    seen.update(names)
    return names


def _what_runs(statement: ast.stmt) -> str | None:
    for node in at_import(statement):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _RUN_STATE:
            return ast.unparse(node)
        if isinstance(node, ast.Call):
            called = node.func
            last = (
                called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
            )
            if _RUNS.match(last):
                return last
    return None


def _names_with_file(source: SourceFile, extracted: Extract) -> set[str]:
    """Returns the names whose value comes from `__file__`: what is read through them is carried."""
    names = {"__file__"}
    grown = True
    while grown:
        found = {
            name
            for name in extracted.names
            for s in source.binders.get(name, [])
            if not isinstance(s, ast.ClassDef) and names & {n.id for n in source.reads(s)}
        }
        grown = not found <= names
        names |= found
    return names


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def _first_line(statement: ast.stmt) -> str:
    return ast.unparse(statement).split("\n")[0]
