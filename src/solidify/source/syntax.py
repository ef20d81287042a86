"""One Python source file as its author wrote it: its text, its tree, and whose variable each name in it is.

Goes in: text. Comes out: positions, scopes, and which statement binds or reads which name. Nothing is run.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, *_COMPREHENSIONS)


@dataclass(eq=False)
class SourceFile:
    """A source file that may be carried.

    `name` is the dotted name that it is imported under, `package` what its relative imports start from, `path` None
    for the cells of a notebook. `whole` files travel as they stand; of the others only what is `wanted` does (a script
    and a package's `__init__`). `cells` are the first line and the label of each cell.
    """

    name: str
    package: str
    path: Path | None
    text: str
    shown: str
    whole: bool = True
    cells: tuple[tuple[int, str], ...] = ()
    wanted: set[str] = field(default_factory=set)

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return parse(self.text, self.shown)

    @cached_property
    def starts(self) -> list[int]:
        """The offset in bytes at which each line starts, and the end."""
        starts = [0]
        for line in self.text.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The node in which each node stands."""
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    @cached_property
    def owners(self) -> dict[ast.AST, ast.AST]:
        """The scope whose variable each name is (the module, for what no inner scope binds), and each import's."""
        return dict(_resolve_names(self.tree, [_Scope(self.tree, frozenset(), frozenset())]))

    @cached_property
    def binders(self) -> dict[str, list[ast.stmt]]:
        """The top-level statements that bind each name of the module."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            for name in sorted(_collect_bound([statement])):
                found.setdefault(name, []).append(statement)
        return found

    @cached_property
    def annotations(self) -> set[ast.AST]:
        """Every node that stands in an annotation."""
        roots: list[ast.AST | None] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.AnnAssign | ast.arg):
                roots.append(node.annotation)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                roots.append(node.returns)
        return {node for root in roots if root is not None for node in ast.walk(root)}

    @cached_property
    def identifiers(self) -> set[str]:
        """Every word of the text that is or could be a name; new names keep away from them."""
        names = {node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(self.tree) if isinstance(node, ast.arg)}
        scopes: list[ast.AST] = [node for node in ast.walk(self.tree) if isinstance(node, _SCOPES)]
        return names.union(_collect_bound(self.tree.body), *(_collect_bound(_walk_inner(scope)) for scope in scopes))

    def offset(self, line: int, column: int) -> int:
        """Returns the offset in bytes of a node's position."""
        return self.starts[line - 1] + column

    def span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        """Returns where a node begins and ends, in bytes; decorators belong to what they decorate."""
        first = self.offset(node.lineno, node.col_offset)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.decorator_list:
            first = self.offset(node.decorator_list[0].lineno, node.col_offset)
        return first, self.offset(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def name_line(self, node: ast.stmt | ast.expr | int) -> str:
        """Says where a node (or a line) stands, as error messages name it."""
        line = node if isinstance(node, int) else node.lineno
        for first, label in reversed(self.cells):
            if line >= first:
                return f"{label}, line {line - first + 1}"
        return f"{self.shown}, line {line}"

    def reads(self, node: ast.AST) -> list[ast.Name]:
        """Returns the names in `node` that are the module's (or Python's own), those in annotations left out.

        Under `from __future__ import annotations` these are never looked up; else they count as read.
        """
        skipped = self.annotations if "annotations" in self.futures else set()
        return [
            part
            for part in ast.walk(node)
            if isinstance(part, ast.Name) and part not in skipped and self.owners.get(part) is self.tree
        ]

    @cached_property
    def at_once(self) -> set[ast.AST]:
        """Every node that is evaluated while the file is imported."""
        return {node for statement in self.tree.body for node in at_import(statement)}

    @cached_property
    def futures(self) -> set[str]:
        """What the file imports from `__future__`."""
        nodes = [n for n in self.tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
        return {alias.name for node in nodes for alias in node.names}

    @property
    def is_init(self) -> bool:
        """Whether the file is a package's `__init__`."""
        return self.path is not None and self.path.name == "__init__.py"


def parse(text: str, shown: str = "<text>") -> ast.Module:
    """Parses a file or a cell, whatever Python would warn about.

    Raises:
        SyntaxError: it is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree: ast.Module = compile(text, shown, "exec", flags, dont_inherit=True)
    return tree


def statement_of(source: SourceFile, node: ast.AST) -> ast.stmt:
    """Returns the innermost statement in which a node stands (itself, where it is one)."""
    while not isinstance(node, ast.stmt):
        node = source.parents[node]
    return node


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what is evaluated when a statement runs: everything but the bodies of functions."""
    yield node
    if isinstance(node, _FUNCTIONS):
        for part in _walk_outer(node):
            yield from at_import(part)
        return
    for child in ast.iter_child_nodes(node):
        yield from at_import(child)


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is a bare string."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def is_main_guard(node: ast.AST) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def literal_all(tree: ast.Module) -> list[str] | None:
    """Returns `__all__` where it is a literal list of strings, else None."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return [str(name) for name in ast.literal_eval(node.value)]
            except ValueError:
                return None
    return None


@dataclass(frozen=True)
class _Scope:
    node: ast.AST
    bound: frozenset[str]
    outside: frozenset[str]  # declared global


def _resolve_names(node: ast.AST, chain: list[_Scope]) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Yields each name (and import) under `node` with the scope that owns it."""
    if isinstance(node, _SCOPES):
        for part in _walk_outer(node):
            yield from _resolve_names(part, chain)
        inner = list(_walk_inner(node))
        declared = {n: type(d) for d in _walk_local(inner) if isinstance(d, ast.Global | ast.Nonlocal) for n in d.names}
        outside = frozenset(name for name, kind in declared.items() if kind is ast.Global)
        scope = _Scope(node, frozenset(_collect_bound(inner) | _collect_parameters(node)) - declared.keys(), outside)
        for part in inner:
            yield from _resolve_names(part, [*chain, scope])
        return
    if isinstance(node, ast.Name):
        yield node, _find_owner(node.id, chain)
    elif isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.asname or alias.name.split(".")[0] for alias in node.names]
        yield node, _find_owner(names[0], chain)
    for child in ast.iter_child_nodes(node):
        yield from _resolve_names(child, chain)


def _find_owner(name: str, chain: list[_Scope]) -> ast.AST:
    for index, scope in reversed(list(enumerate(chain))):
        if name in scope.outside:
            break
        visible = index == len(chain) - 1 or not isinstance(scope.node, ast.ClassDef)
        if visible and name in scope.bound:
            return scope.node
    return chain[0].node


def _walk_outer(scope: ast.AST) -> Iterator[ast.AST]:
    """Yields what belongs to a scope's node but is evaluated outside it."""
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        arguments = scope.args
        yield from (d for d in (*arguments.defaults, *arguments.kw_defaults) if d is not None)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        yield from (a.annotation for a in every if a is not None and a.annotation is not None)
        if not isinstance(scope, ast.Lambda):
            yield from scope.decorator_list
            yield from [scope.returns] if scope.returns is not None else []
    elif isinstance(scope, ast.ClassDef):
        yield from (*scope.bases, *scope.keywords, *scope.decorator_list)
    elif isinstance(scope, _COMPREHENSIONS):
        yield scope.generators[0].iter


def _walk_inner(scope: ast.AST) -> Iterator[ast.AST]:
    """Yields what is evaluated within a scope."""
    if isinstance(scope, ast.Lambda):
        yield scope.body
    elif isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield from scope.body
    elif isinstance(scope, _COMPREHENSIONS):
        yield from (scope.key, scope.value) if isinstance(scope, ast.DictComp) else (scope.elt,)
        for index, generator in enumerate(scope.generators):
            yield from (generator.target, *generator.ifs)
            if index:
                yield generator.iter


def _collect_parameters(scope: ast.AST) -> set[str]:
    if not isinstance(scope, _FUNCTIONS):
        return set()
    a = scope.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    return {argument.arg for argument in every if argument is not None}


def _walk_local(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yields the nodes of one scope: nested scopes are named, but what is within them is left out."""
    for node in nodes:
        yield node
        if not isinstance(node, _SCOPES):
            yield from _walk_local(ast.iter_child_nodes(node))
        else:
            yield from _walk_local(_walk_outer(node))
            if isinstance(node, _COMPREHENSIONS):  # what `:=` binds within one is the enclosing scope's
                yield from (n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr))


def _collect_bound(nodes: Iterable[ast.AST]) -> set[str]:
    """Returns the names that the nodes of one scope bind."""
    names: set[str] = set()
    for node in _walk_local(nodes):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name != "*"}
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            names.add(node.rest)
    return names
