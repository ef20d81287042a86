"""What the code of frozen layers reads beside its arguments: global names, closures, attributes of modules of code.

Code of a library is taken as it is: Python's own, and what is installed. Of all other code each name is looked up; and
of modules of a model that are neither PyTorch's nor transformers', wherever they are installed.
"""

from __future__ import annotations

import dis
import functools
import logging
import sys
import sysconfig
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from solidify.weights import hashing

_KNOWN = ("torch", "transformers", "solidify", "peft", "numpy", "builtins")
_ANYTHING = ("eval", "exec", "globals", "locals", "open", "__import__")  # builtins that may read whatever there is
CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
SKIPPED = object()


@dataclass(frozen=True)
class Read:
    """A name that code reads: where it comes from, attributes that follow, and whether it is written to instead."""

    name: str
    source: str  # "global", "free" (a closure), "import"
    attributes: tuple[str, ...] = ()
    written: bool = False

    def __str__(self) -> str:
        return ".".join([self.name, *self.attributes])


@functools.cache
def is_known(name: str) -> bool:
    """Returns whether a module of code is of those whose modules of a model are taken as they are."""
    return name.partition(".")[0] in _KNOWN


@functools.cache
def is_library(name: str) -> bool:
    """Returns whether a module of code is Python's, or was installed; what a model brings along or a user wrote is not.

    A package that is being worked on (installed in place) is not.
    """
    top = name.partition(".")[0]
    if top in _KNOWN:
        return True
    source = getattr(sys.modules.get(name) or sys.modules.get(top), "__file__", None)
    if source is None:
        return top in sys.stdlib_module_names
    return any(Path(sysconfig.get_path(key)) in Path(source).parents for key in ("stdlib", "purelib", "platlib"))


def module_of(function: types.FunctionType) -> str:
    """Returns which module of code a function is written in, whatever it was made to look like."""
    return str(function.__globals__.get("__name__", ""))


def plain_function(value: Any) -> Any:
    """Returns the function in what a class holds for one: of a method, a property, or a cache."""
    if isinstance(value, (staticmethod, classmethod)):
        return plain_function(value.__func__)
    if isinstance(value, property):
        return plain_function(value.fget)
    if isinstance(value, functools.cached_property):
        return plain_function(value.func)
    if type(value).__module__ == "functools" and hasattr(value, "__wrapped__"):  # of `functools.cache`
        return plain_function(value.__wrapped__)
    return value


_digests: dict[int, tuple[types.CodeType, str, tuple[Read, ...]]] = {}  # by identity, with the code


def digest_code(code: types.CodeType) -> str:
    """Returns a digest of what a function does, wherever it stands."""
    return _look_at(code)[1]


def reads_of(code: types.CodeType) -> tuple[Read, ...]:
    """Returns the names that code reads, or writes to, outside of itself."""
    return _look_at(code)[2]


def _look_at(code: types.CodeType) -> tuple[types.CodeType, str, tuple[Read, ...]]:
    found = _digests.get(id(code))
    if found is None:
        constants = [digest_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
        digest = hashing.digest_values([code.co_code.hex(), code.co_names, code.co_varnames, constants])
        found = _digests[id(code)] = code, digest, tuple(dict.fromkeys(_find_reads(code, frozenset(code.co_freevars))))
    return found


def _find_reads(code: types.CodeType, free: frozenset[str]) -> Iterator[Read]:
    steps = [each for each in dis.get_instructions(code) if each.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    for number, step in enumerate(steps):
        source = _source_of(step, free)
        if step.opname == "IMPORT_NAME":
            yield from _find_imports(steps, number)
        elif source and step.opname.startswith(("STORE", "DELETE")):
            yield Read(str(step.argval), source, written=True)
        elif source:
            end = number + 1
            while end < len(steps) and steps[end].opname in ("LOAD_ATTR", "LOAD_METHOD"):
                end += 1
            attributes = tuple(str(each.argval) for each in steps[number + 1 : end])
            stored = end < len(steps) and steps[end].opname in ("STORE_ATTR", "DELETE_ATTR")
            yield Read(str(step.argval), source, attributes, stored)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _find_reads(inner, free & frozenset(inner.co_freevars))


def _source_of(step: dis.Instruction, free: frozenset[str]) -> str:
    if step.opname.endswith(("_GLOBAL", "_NAME", "_GLOBALS")) and step.opname.startswith(("LOAD", "STORE", "DELETE")):
        return "global"
    if step.opname.endswith(("DEREF", "CLASSDEREF")) and step.argval in free:
        return "free"
    return ""


def _find_imports(steps: list[dis.Instruction], number: int) -> Iterator[Read]:
    """Yields what an import within a function takes: the names that follow, or else the whole module of code."""
    module, level = str(steps[number].argval), steps[number - 2].argval if number > 1 else 0
    name = "." * int(level or 0) + module
    taken = []
    for each in steps[number + 1 :]:
        if each.opname == "IMPORT_FROM":
            taken.append(str(each.argval))
        elif not each.opname.startswith("STORE_"):
            break
    yield from (Read(name, "import", (each,)) for each in taken) if taken else [Read(name, "import")]


def look_up(function: types.FunctionType, read: Read) -> tuple[Any, str]:
    """Returns what a function finds under a name, and its whole name; or `SKIPPED`, and what forbids it, if anything.

    Attributes are followed from one module of code to the next, and on in what a library holds.
    """
    if read.written:
        return SKIPPED, f"writes to {read}"
    if read.source == "free":
        value = _content_of(function, read.name)
    elif read.source == "import":
        value = sys.modules.get(read.name)
        if not is_library(read.name) and (value is None or not read.attributes):
            return SKIPPED, f"imports {read} when it is called"
    else:
        value = function.__globals__.get(read.name, SKIPPED)
        if value is SKIPPED:
            return SKIPPED, f"calls {read.name}" if read.name in _ANYTHING else ""
    return _follow(value, read.name, read.attributes)


def _follow(value: Any, name: str, attributes: tuple[str, ...]) -> tuple[Any, str]:
    library = False
    for attribute in attributes:
        whole = isinstance(value, types.ModuleType)
        if whole:
            library = is_library(value.__name__)
        elif not library or isinstance(value, (type, *CODE)):
            break
        value = getattr(value, attribute, None)
        name = f"{name}.{attribute}"
        if whole and library and callable(value) and not isinstance(value, (type, nn.Module, types.FunctionType)):
            return SKIPPED, ""  # of a library, and compiled
    if isinstance(value, types.ModuleType) and not is_library(value.__name__):
        return SKIPPED, f"reads the module {name} as a whole"
    return value, name


def _content_of(function: types.FunctionType, name: str) -> Any:
    try:
        return dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))[name].cell_contents
    except ValueError:  # not filled yet
        return None


def stands_still(value: Any) -> bool:
    """Returns whether a value that code reads is a library's, and has no content that a user changes by intent: a
    module of code, a builtin, a logger, a mark, an operation of PyTorch, a table of transformers' own."""
    if isinstance(value, (types.ModuleType, logging.Logger, types.UnionType, types.GenericAlias)):
        return True
    if type(value) is object or type(value).__module__ in ("dataclasses", "typing"):  # marks, and words for types
        return True
    if isinstance(value, types.BuiltinFunctionType):
        held = value.__self__
        return held is None or isinstance(held, (types.ModuleType, type))
    if isinstance(value, (nn.Module, torch.Tensor, type, types.FunctionType, types.MethodType, functools.partial)):
        return False
    name = type(value).__module__
    if name.partition(".")[0] in ("torch", "triton"):
        return callable(value)
    tables = vars(sys.modules[name]).values() if name.startswith("transformers.") and name in sys.modules else ()
    return any(each is value for each in tables)
