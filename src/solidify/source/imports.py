"""What an import statement of a user's file stands for: a file of theirs, a name in it, or something outside.

A name that a package's `__init__` only passes on is followed to where it is defined. Nothing is imported to find out.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType

from transformers.utils import import_utils

from solidify.source.flatten import Target
from solidify.source.ownership import Location, Surroundings, import_root, locate
from solidify.source.syntax import SourceFile, is_main_guard, literal_all

_REMEDY = "install it, or import it in a `try` for ImportError"
_IMPORT_ERRORS = {"ImportError", "ModuleNotFoundError", "Exception", "BaseException"}


@dataclass(frozen=True)
class Package:
    """A package of the user's as an object: what is used of it is looked up one by one."""

    location: Location


@dataclass(frozen=True)
class Fault:
    """Why an import cannot be carried; `absent` where nothing is found (which an optional import may bear)."""

    reason: str
    absent: bool = False


Resolved = Target | Package | Fault


@dataclass
class Library:
    """The source files that were looked at so far, by path, and how names resolve between them."""

    here: Surroundings
    files: dict[Path, SourceFile | Fault] = field(default_factory=dict)

    def source(self, location: Location) -> SourceFile | Fault:
        """Returns the source file of a module of the user's."""
        assert location.path is not None
        if location.path not in self.files:
            twin = next((path for path in self.files if _is_copy(path, location.path)), None)
            if twin is not None:
                return self.files[twin]
            package = location.name if location.search is not None else location.name.rpartition(".")[0]
            self.files[location.path] = read(location.name, package, location.path, whole=location.search is None)
        return self.files[location.path]

    def module(self, name: str, near: SourceFile) -> Resolved:
        """Resolves `import name`, written in the file `near`."""
        location = locate(name, near, self.here)
        if location.owner in ("always", "installed"):
            return Target(None, name, None)
        if location.owner == "solidify":
            return Fault("it imports solidify, without which the artifact must load; copy what it needs")
        if location.owner == "compiled":
            return Fault(f"`{name}` is compiled ({location.path}), and only Python source can be carried")
        if location.owner == "missing":
            top = name.split(".")[0]
            has_package = "." in name and locate(top, near, self.here).owner != "missing"
            return Fault(
                f"there is no module `{name}`" if has_package else f"`{top}` is not installed ({_REMEDY})", absent=True
            )
        if location.is_package:
            return Package(location)
        source = self.source(location)
        return source if isinstance(source, Fault) else Target(source, "", None)

    def member(
        self, module: str, name: str, near: SourceFile, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Resolved:
        """Resolves `from module import name`, written in the file `near`."""
        found = self.module(module, near)
        if isinstance(found, Fault):
            return found
        if isinstance(found, Package):
            return self.attribute(found.location, name, near, seen)
        if found.source is None:
            return Target(None, module, name)
        passed_on = self._passed_on(found.source, name, seen)
        return passed_on if isinstance(passed_on, Package) else Target(found.source, "", name)

    def attribute(
        self, location: Location, name: str, near: SourceFile, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Resolved:
        """Resolves `name` in a package of the user's, through its `__init__` to where it is defined."""
        init = self.source(location) if location.path is not None else None
        if isinstance(init, Fault):
            return init
        # Asked for a name by itself, a package does not have it yet: then it is the submodule.
        if init is not None and (location.name, name) not in seen:
            seen |= {(location.name, name)}
            passed_on = self._passed_on(init, name, seen)
            if passed_on is not None:
                return passed_on
            if name in init.binders:
                return Target(init, "", name)
            for star in reversed(_find_stars(init)):
                module = self.absolute(init, star)
                if isinstance(module, str) and name in self.public(module, init):
                    return self.member(module, name, init, seen)
        found = self.module(f"{location.name}.{name}", near)
        if not (isinstance(found, Fault) and found.absent):
            return found
        lazy = self._made_on_demand(location, init, name) if init is not None else None
        return lazy or Fault(f"the package `{location.name}` has no `{name}`", absent=True)

    def alias(
        self, source: SourceFile, node: ast.Import | ast.ImportFrom, alias: ast.alias,
        seen: frozenset[tuple[str, str]] = frozenset(),
    ) -> Resolved:  # fmt: skip
        """Resolves one name of an import statement to what it binds."""
        if isinstance(node, ast.Import):
            bound = alias.name if alias.asname else alias.name.split(".")[0]
            whole = self.module(alias.name, source)
            return whole if bound == alias.name or isinstance(whole, Fault) else self.module(bound, source)
        module = self.absolute(source, node)
        return module if isinstance(module, Fault) else self.member(module, alias.name, source, seen)

    def absolute(self, source: SourceFile, node: ast.ImportFrom) -> str | Fault:
        """Returns the dotted name of the module that an import statement names."""
        parts = source.package.split(".") if source.package else []
        if node.level > len(parts):
            return (node.module or "") if not node.level else Fault("it goes beyond the top of the project")
        base = parts[: len(parts) - node.level + 1] if node.level else []
        return ".".join([*base, *([node.module] if node.module else [])])

    def public(self, module: str, near: SourceFile, seen: frozenset[str] = frozenset()) -> list[str]:
        """Returns the names that `from module import *` binds."""
        found = self.module(module, near)
        if isinstance(found, Fault) or module in seen:
            return []
        if isinstance(found, Package):
            source = self.source(found.location) if found.location.path is not None else None
        else:
            source = found.source
        if source is None and isinstance(found, Target):  # what is outside was imported, or the class would not exist
            names = list(vars(sys.modules[module])) if module in sys.modules else []
            declared = vars(sys.modules[module]).get("__all__") if module in sys.modules else None
            return list(declared) if declared is not None else [n for n in names if not n.startswith("_")]
        if not isinstance(source, SourceFile):
            return []
        declared = literal_all(source.tree)
        if declared is not None:
            return declared
        names = [name for name in source.binders if not name.startswith("_")]
        for star in _find_stars(source):
            inner = self.absolute(source, star)
            names += self.public(inner, source, seen | {module}) if isinstance(inner, str) else []
        return list(dict.fromkeys(names))

    def defined(self, target: Target) -> Target:
        """Follows a name through files that only import it to the one that defines it."""
        seen: set[SourceFile] = set()
        while target.source is not None and target.name is not None and target.source not in seen:
            seen.add(target.source)
            passed_on = self._passed_on(target.source, target.name, frozenset())
            if not isinstance(passed_on, Target) or passed_on.source is None:
                break
            target = passed_on
        return target

    def _passed_on(self, source: SourceFile, name: str, seen: frozenset[tuple[str, str]]) -> Resolved | None:
        """Returns what a name stands for that a file only imports, in one plain statement; else None.

        An import for type checkers counts in a package that otherwise provides the name on demand.
        """
        binding = list(source.binders.get(name, []))
        if len(binding) == 1 and isinstance(binding[0], ast.If) and _is_type_checking(binding[0]):
            binding = binding[0].body
        found = [
            (node, alias)
            for node in binding
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (alias.asname or alias.name.split(".")[0]) == name
        ]
        others = len(source.binders.get(name, [])) != 1
        return None if others or not found else self.alias(source, *found[-1], seen)

    def _made_on_demand(self, location: Location, init: SourceFile, name: str) -> Resolved | None:
        """Asks a package that imports lazily (by a `__getattr__` of its own) where one of its names comes from."""
        module = sys.modules.get(location.name)
        if module is None or "__getattr__" not in init.binders:
            return None
        value = getattr(module, name, None)
        if not isinstance(value, type | FunctionType) or value.__module__ == location.name:
            return None
        defined = vars(sys.modules[value.__module__]).get(name)
        return self.member(value.__module__, name, init) if defined is value else None


def read(name: str, package: str, path: Path, *, whole: bool) -> SourceFile | Fault:
    """Reads a source file; one that is no UTF-8 or no Python is a fault with its line."""
    root = import_root(path, package)
    shown = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    content = path.read_bytes()
    try:
        # A byte order mark is dropped: transformers parses the text without expecting one.
        source = SourceFile(name, package, path, content.decode("utf-8-sig"), shown, whole)
        assert source.tree
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Fault(f"{shown}, line {line}, is not UTF-8; transformers could not read it")
    except SyntaxError as error:
        return Fault(f"{shown}, line {error.lineno}, is not Python: {error.msg}")
    return source


def _is_copy(one: Path, other: Path) -> bool:
    """Whether two files are one file of a model's remote code: transformers copies it once for each Auto class."""
    if one.name != other.name or one.parent.parent != other.parent.parent or "transformers_modules" not in one.parts:
        return False
    names = [path.name for path in one.parent.glob("*.py") if (other.parent / path.name).is_file()]
    return all((one.parent / name).read_bytes() == (other.parent / name).read_bytes() for name in names)


def circumstances(source: SourceFile, node: ast.AST) -> tuple[bool, str]:
    """Says whether an import may fail, and why it never runs, or nothing.

    It may where it stands in a `try` for ImportError, or under a test of transformers' for what is available.
    """
    optional, never = False, ""
    while node in source.parents:
        child, node = node, source.parents[node]
        if isinstance(node, ast.Try):
            optional |= any(_catches_import_error(handler.type) for handler in node.handlers)
        elif isinstance(node, ast.With):
            optional |= any("suppress" in ast.unparse(item) and "Import" in ast.unparse(item) for item in node.items)
        elif isinstance(node, ast.If) and child in node.body:
            if _is_type_checking(node) or is_main_guard(node):
                never = "for type checkers" if _is_type_checking(node) else "not run when it is imported"
            checks = re.findall(r"\b(is_\w+_available)\(", ast.unparse(node.test))
            optional |= any(name.startswith("is_flash_attn") or name in vars(import_utils) for name in checks)
    return optional, never


def _is_type_checking(node: ast.If) -> bool:
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _catches_import_error(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in _IMPORT_ERRORS) for k in kinds)


def _find_stars(source: SourceFile) -> list[ast.ImportFrom]:
    return [n for n in source.tree.body if isinstance(n, ast.ImportFrom) and n.names[0].name == "*"]
