"""Where a class is defined: the source file, script or notebook whose text makes it, or why there is none."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from solidify.source import notebook
from solidify.source.flatten import Target
from solidify.source.imports import Fault, Library, read
from solidify.source.ownership import ALWAYS, Location, judge
from solidify.source.syntax import SourceFile

MAIN = ("__main__", "__mp_main__")


@dataclass
class Origins:
    """Finds classes' sources; keeps those of `__main__`, which no import statement leads to."""

    index: Library
    mains: dict[Path | None, SourceFile | Fault] = field(default_factory=dict)

    def of(self, cls: Any) -> Target | Fault:
        """Returns the name that a class has in a source file, or in a module that is always there."""
        if not isinstance(cls, type):
            return Fault(_not_a_class(cls))
        return self._find_home(cls)

    def of_function(self, function: Callable[..., Any]) -> Target | Fault:
        """Returns the same of a function that a file defines at its top level, or that torch has."""
        if not isinstance(function, FunctionType):
            return self._find_home(function)
        if function.__name__ == "<lambda>":
            code = function.__code__
            where = f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
            return Fault(f"{where}: a lambda has no name to import it by; write a function (`def`) at module level")
        return self._find_home(function)

    def _find_home(self, cls: Any) -> Target | Fault:
        name = cls.__module__ or "torch"  # which its own functions do not say
        module = sys.modules.get(name)
        if module is None:
            return Fault(f"{cls.__name__} has no source file (module {name}); define it in a .py file")
        if name in MAIN:
            found = self._in_main(cls, module)
        elif self._stays_outside(module, name):
            found = Target(None, name, cls.__name__)
        else:
            found = self._in_module(cls, module)
        if isinstance(found, Fault):
            return found
        return _find_fault(cls, module, found) or Target(found.source, found.module, cls.__name__)

    def _stays_outside(self, module: ModuleType, name: str) -> bool:
        owner = judge(name, module.__spec__, self.index.here).owner
        return name.split(".")[0] in ALWAYS or owner in ("always", "installed")

    def _in_module(self, cls: Any, module: ModuleType) -> Target | Fault:
        names = vars(module)
        file = module.__spec__.origin if module.__spec__ is not None else names.get("__file__")
        if file is None or not Path(file).is_file():
            return Fault(f"{cls.__name__} has no source file (module {cls.__module__}); define it in a .py file")
        if Path(file).suffix != ".py":
            return Fault(f"{cls.__name__} is compiled ({file}), and only Python source can be carried")
        if cls.__module__.startswith("solidify.") and not cls.__module__.startswith("solidify.modules."):
            return Fault(
                f"{cls.__name__} belongs to solidify, without which the artifact must load; copy what it needs"
            )
        path = Path(file).absolute()
        search = tuple(names["__path__"]) if "__path__" in names else None
        location = Location(cls.__module__, "own", path.parent.resolve() / path.name, search)
        source = self.index.source(location)
        if isinstance(source, Fault):
            return source
        if search is None:
            return self.index.defined(Target(source, "", cls.__name__))
        found = self.index.attribute(location, cls.__name__, source)
        if isinstance(found, Target) and found.source is not None:
            return self.index.defined(found)
        return Target(source, "", cls.__name__)

    def _in_main(self, cls: Any, main: ModuleType) -> Target | Fault:
        path = notebook.script_of(cls, main)
        if path not in self.mains:
            if path is not None:
                package = main.__spec__.parent if main.__spec__ is not None else None
                self.mains[path] = read("__main__", package or "", path, whole=False)
            else:
                nothing = Fault(
                    f"{cls.__name__} is defined in __main__, and its source is not kept; move it to a .py file"
                )
                self.mains[path] = notebook.notebook(main) or nothing
        source = self.mains[path]
        return source if isinstance(source, Fault) else Target(source, "", cls.__name__)


def _find_fault(cls: Any, module: ModuleType, found: Target) -> Fault | None:
    """Says why importing the name of a class, or a function, from its source would not give it."""
    name, source = cls.__name__, found.source
    if source is None:
        same = vars(module).get(name) is cls
        return None if same else Fault(f"{name} was made at run time ({cls.__module__} does not define it)")
    if "<locals>" in cls.__qualname__:
        return Fault(
            f"{source.name_line(_find_line(source, name))}: {name} is defined inside a function ({cls.__qualname__}); "
            "move it to module level"
        )
    if "." in cls.__qualname__:
        where = source.name_line(_find_line(source, name))
        return Fault(f"{where}: {name} is defined inside a class ({cls.__qualname__}); move it to module level")
    kinds = (ast.ClassDef,) if isinstance(cls, type) else (ast.FunctionDef,)
    if not any(isinstance(n, kinds) and n.name == name for s in source.binders.get(name, []) for n in ast.walk(s)):
        main = " in __main__" if cls.__module__ in MAIN else ""
        return Fault(
            f"{source.name_line(_find_line(source, name))}: {name} was made at run time{main}: "
            f"the file has no `{'class' if isinstance(cls, type) else 'def'} {name}`; write one"
        )
    if vars(module).get(name) is not cls:
        return Fault(
            f"{source.name_line(_find_line(source, name))}: the name {name} stands for something else now, so "
            "importing it would not give this class (was it defined again? then repeat the surgery)"
        )
    bases = cls.__mro__[1:] if isinstance(cls, type) else ()
    stale = [b for b in bases if b.__module__ == cls.__module__ and vars(module).get(b.__name__) is not b]
    if stale and source.cells:
        where = source.name_line(_find_line(source, name))
        return Fault(f"{where}: {name} was built on an earlier {stale[0].__name__}; run its cell and the surgery again")
    return None


def _find_line(source: SourceFile, name: str) -> int:
    """Returns the line where a class comes from, as well as that can be said."""
    nodes = list(ast.walk(source.tree))
    lines = [n.lineno for n in nodes if isinstance(n, ast.ClassDef) and n.name == name]
    lines += [s.lineno for s in source.binders.get(name, [])]
    for node in nodes:
        match node:
            case ast.Constant(str(text)) if text == name or f"class {name}" in text:
                lines.append(node.lineno)
    return lines[0] if lines else 1


def _not_a_class(thing: Any) -> str:
    if isinstance(thing, FunctionType):
        code = thing.__code__
        what = "a lambda" if thing.__name__ == "<lambda>" else f"the function {thing.__name__}"
        where = f"{Path(code.co_filename).name}, line {code.co_firstlineno}"
        return f"{where}: {what} is not a class; write it as an nn.Module"
    return f"{thing!r} is not a class; write one, at the top level of a .py file"
