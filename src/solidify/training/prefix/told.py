"""What is told of frozen layers beside their tensors: attributes of every module, functions, classes and their code.

The words are the same in another process for the same layers; of an object of which nothing can be told, its identity.
"""

from __future__ import annotations

import enum
import functools
import inspect
import random
import re
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from solidify.errors import ObjectiveError
from solidify.training.prefix.code import (
    SKIPPED,
    digest_code,
    is_known,
    is_library,
    look_up,
    module_of,
    plain_function,
    reads_of,
    stands_still,
)
from solidify.training.prefix.state import FUNCTIONS, odd_kind
from solidify.upstream.torch import module_hooks, other_hooks, own_buffers, own_parameters
from solidify.weights import hashing

BEFORE = "before_prefix"  # what a forward that `cached.py` puts before a module's own says of that: none, or which
SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}  # tables of what is told apart, and of hooks
_DEEPEST = 24
_IN_WORDS = (range, slice, type(...), type(NotImplemented), re.Pattern, PurePath, np.dtype)
_OF_EVERY_CLASS = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__slots__"),
    *("__abstractmethods__", "__parameters__", "__orig_bases__", "__match_args__", "__annotate_func__"),
    *("__firstlineno__", "__static_attributes__", "__dataclass_fields__", "__dataclass_params__"),
    "_autograd_function_id",  # a number of PyTorch's for each function, another in another process
}
_OF_EVERY_MEMBER = {"_value_", "_name_", "_sort_order_", "__objclass__"}  # of an enumeration
_DESCRIPTORS = (  # what makes slots and methods of compiled classes, and has no content
    *(types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType),
    *(types.MethodDescriptorType, types.ClassMethodDescriptorType, types.MethodWrapperType),
)
Digest = Callable[[torch.Tensor, str], str]
Classes = dict[type, "ClassContent"]


class Attributes:
    """The modules of some layers; `digest` says what a tensor holds."""

    def __init__(self, layers: Sequence[nn.Module], digest: Digest) -> None:
        self._layers, self._digest = layers, digest
        self._classes: Classes = {}
        self._sources: dict[type, Any] = {}
        self._opaque: dict[int, Any] = {}  # so that no other object has their identity

    def values(self) -> list[Any]:
        """Returns plain values that tell two states of the layers apart.

        Raises:
            ObjectiveError: a loose tensor learns, or code reads, or an attribute is, what cannot be told.
        """
        named = [
            (f"{n}.{name}", module) for n, layer in enumerate(self._layers) for name, module in layer.named_modules()
        ]
        teller = _Teller({id(module): name for name, module in named}, self._digest, self._opaque, self._classes)
        kinds = {type(module) for _, module in named}
        for kind in kinds - {*self._sources}:
            self._sources[kind] = [each for one in kind.__mro__ if (each := _tell_source(one))]
        return [
            [
                [name, teller.tell_class(type(module), name), *teller.tell_module(name, module)]
                for name, module in named
            ],
            sorted(self._sources[kind] for kind in kinds),
        ]


def hook_fault(module: nn.Module) -> str:
    """Returns what is wrong with a module's hooks; empty for those of transformers, or that declare a mask."""
    harmless = all(_is_harmless(hook) for _, hook, _ in module_hooks(module))
    return "" if harmless and not other_hooks(module) else "has a hook that looks inside (of a term, for one)"


def _is_harmless(hook: Any) -> bool:
    """Returns whether a hook is of transformers, which records what is asked for, or declares a mask."""
    return hasattr(hook, "solid_mask") or str(getattr(hook, "__module__", "")).startswith("transformers.")


class _Teller:
    """Tells of values once; what is met again is a number."""

    def __init__(self, modules: Mapping[int, str], digest: Digest, opaque: dict[int, Any], classes: Classes) -> None:
        self._modules, self._digest, self._opaque, self._classes = modules, digest, opaque, classes
        self._told: dict[type, int] = {}
        self._met: dict[int, tuple[int, Any]] = {}
        self._where = ""

    def tell_module(self, name: str, module: nn.Module, depth: int = 0) -> list[Any]:
        """Returns what is told of a module beside its class: names of its tensors, and its attributes."""
        told = []
        for key, value in vars(module).items():
            if key in _OF_EVERY_MODULE:
                continue
            if hasattr(value, BEFORE):
                value = getattr(value, BEFORE)
                if value is None:
                    continue
            self._where = f"{name.rstrip('.')}.{key}" if not depth else self._where
            told.append([key, self.tell(value, depth + 1)])
        self._where = self._where if depth else name
        return [
            sorted(told, key=lambda each: str(each[0])),
            [[key, self._tell_attributes(each, depth + 1)] for key, each in own_parameters(module).items()],
            [[key, self._tell_attributes(each, depth + 1)] for key, each in own_buffers(module).items()],
            [[key, self.tell(each, depth + 1)] for key, each in own_slots(module)],
        ]

    def tell(self, value: Any, depth: int = 0) -> Any:
        """Returns plain words for a value."""
        if isinstance(value, SCALARS) and not _has_attributes(value):
            return repr(value)
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                raise ObjectiveError(
                    f"cache_prefix: {self._where} of the frozen layers holds a tensor that learns and that is no "
                    "parameter of its module; register it, or leave cache_prefix out"
                )
            if odd := odd_kind(value):
                raise self._refusal(f"holds {odd}")
            return [self._digest(value, self._where), self._tell_attributes(value, depth)]
        if isinstance(value, type):
            return self.tell_class(value, self._where)
        if id(value) in self._modules:
            return ["module", self._modules[id(value)]]
        if id(value) in self._met:
            return ["met", self._met[id(value)][0]]
        self._met[id(value)] = len(self._met), value
        if depth > _DEEPEST:
            raise self._refusal(f"holds objects in objects, more than {_DEEPEST} deep")
        return [self.tell_class(type(value), self._where), self._tell_object(value, depth + 1)]

    def _tell_attributes(self, value: Any, depth: int) -> list[Any]:
        """Returns what is told of attributes that a user put on a tensor, a number, or a container."""
        own = {} if value is None else _own_attributes(value)
        slots = [] if value is None else own_slots(value)
        return [[key, self.tell(each, depth + 1)] for key, each in (*sorted(own.items()), *slots)]

    def _tell_object(self, value: Any, depth: int) -> Any:
        """Returns what is in an object, and, of the classes that are no library's, what stands on it."""
        content = self._tell_content(value, depth)
        if isinstance(value, (nn.Module, *FUNCTIONS)) or is_library(type(value).__module__):
            return content
        return [content, self._tell_attributes(value, depth)]

    def _tell_content(self, value: Any, depth: int) -> Any:
        if isinstance(value, SCALARS):
            return repr(value)
        if isinstance(value, nn.Module):
            inner = [*value.named_children()]
            held = [
                (name, self._digest(each, f"{self._where}.{name}"))
                for name, each in (*value.named_parameters(), *value.named_buffers())
            ]
            return [
                held,
                self.tell_module("", value, depth),
                [(name, self.tell(each, depth)) for name, each in inner],
            ]
        if isinstance(value, Mapping):
            return [[self.tell(key, depth), self.tell(each, depth)] for key, each in value.items()]
        if isinstance(value, (list, tuple, deque)):
            return [self.tell(each, depth) for each in value]
        if isinstance(value, (set, frozenset)):
            return sorted(repr(self.tell(each, depth)) for each in value)
        if isinstance(value, functools.partial):
            return [self.tell(each, depth) for each in (value.func, value.args, value.keywords)]
        if isinstance(value, weakref.ReferenceType):
            return self.tell(value(), depth)
        if isinstance(value, FUNCTIONS):
            return self.tell_function(value, depth)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return [str(value.dtype), value.shape, hashing.digest_bytes(value.tobytes())]
        if (state := _tell_numbers(value)) is not None:
            return state
        if isinstance(value, _IN_WORDS):
            return repr(value)
        if not is_library(type(value).__module__) and (hasattr(value, "__dict__") or own_slots(value)):
            return None  # what stands on it is all
        if hasattr(value, "__dict__"):
            return [(key, self.tell(each, depth)) for key, each in sorted(vars(value).items())]
        return self._tell_opaque(value)

    def tell_class(self, kind: type, where: str) -> Any:
        """Returns the name of a class and, of code that is no library's, all that the class holds."""
        if kind in self._told:
            return _name_of(kind)
        self._told[kind] = len(self._told)
        found = []
        for each in kind.__mro__:
            if is_library(each.__module__) and not issubclass(each, nn.Module):
                continue
            if each not in self._classes:
                self._classes[each] = ClassContent(each)
            for name, value in self._classes[each].entries():
                before, self._where = self._where, f"{where} ({_name_of(each)}.{name})"
                method = isinstance(value, types.FunctionType) and issubclass(each, nn.Module)
                found.append([name, self.tell_function(value, 0, is_known) if method else self.tell(value)])
                self._where = before
        return [_name_of(kind), *found]

    def tell_function(self, value: Any, depth: int, taken: Callable[[str], bool] = is_library) -> Any:
        """Returns the name, code, defaults and closure of a function, and what it reads beside its arguments; of a
        method what it is bound to, too. `taken` says whose code is taken as it is."""
        if isinstance(value, types.MethodType):
            return [self.tell(value.__func__, depth), self.tell(value.__self__, depth)]
        name = f"{value.__module__}.{value.__qualname__}"
        if not isinstance(value, types.FunctionType):
            held = getattr(value, "__self__", None)
            return (
                name if held is None or isinstance(held, (types.ModuleType, type)) else [name, self.tell(held, depth)]
            )
        told: list[Any] = [name, digest_code(value.__code__)]
        if taken(module_of(value)):
            cells = [*(_content_of(cell) for cell in value.__closure__ or ()), getattr(value, "__wrapped__", None)]
            return [*told, [self.tell(each, depth) for each in cells if _is_content(each)]]
        for each in (value.__defaults__, value.__kwdefaults__, {**vars(value), "__wrapped__": None}):
            told.append(self.tell(each, depth))
        if (wrapped := getattr(value, "__wrapped__", None)) is not None:
            told.append(self.tell(wrapped, depth))
        for read in reads_of(value.__code__):
            found, words = look_up(value, read)
            if found is not SKIPPED:
                seen, told_of = self._tell_read(found, depth)
                told.append([words, told_of])
                words = "" if seen else f"reads {words}, which is of the kind {type(found).__name__}"
            if words:
                raise ObjectiveError(
                    f"cache_prefix: {value.__qualname__}, which frozen layers call, {words}, so what it returns may "
                    "change unseen; give it what it needs as attributes of the layer, or leave cache_prefix out"
                )
        return told

    def _tell_read(self, value: Any, depth: int) -> tuple[bool, Any]:
        """Returns whether a value that code reads can be told, and the words: of modules of code, functions, classes,
        and plain constants."""
        if isinstance(value, (*SCALARS, *_IN_WORDS, np.generic)):
            return True, repr(value)
        if isinstance(value, (tuple, frozenset)):
            told = [
                self._tell_read(each, depth)
                for each in (value if isinstance(value, tuple) else sorted(value, key=repr))
            ]
            return all(seen for seen, _ in told), [each for _, each in told]
        if isinstance(value, functools.partial):
            return self._tell_read((value.func, value.args, tuple(sorted(value.keywords.items()))), depth)
        if stands_still(value):
            return True, getattr(value, "__name__", _name_of(type(value)))
        if (function := plain_function(value)) is not value:
            return self._tell_read(function, depth)
        if isinstance(value, types.MethodType):
            held = value.__self__
            return isinstance(held, type) or id(held) in self._modules, self.tell(value.__func__, depth)
        if isinstance(value, (type, types.FunctionType)) or id(value) in self._modules:
            return True, self.tell(value, depth)
        return False, None

    def _tell_opaque(self, value: Any) -> Any:
        """Returns what there is in an object without attributes: its bytes, or words, or that it is still the same."""
        with suppress(TypeError, ValueError, BufferError):
            return hashing.digest_bytes(memoryview(value).tobytes())
        if isinstance(value, Iterator):
            raise self._refusal("holds an iterator, whose place cannot be told")
        if not callable(value) and not is_library(type(value).__module__):
            raise self._refusal(f"holds an object of the class {_name_of(type(value))}, of which nothing can be told")
        self._opaque[id(value)] = value
        return [_name_of(type(value)), id(value)]

    def _refusal(self, what: str) -> ObjectiveError:
        return ObjectiveError(f"cache_prefix: {self._where} of the frozen layers {what}; leave cache_prefix out")


class ClassContent:
    """What a class holds that may decide what its instances return: of a library's class what was exchanged since it
    was first seen, or is a function of other code; of any other class all."""

    def __init__(self, kind: type) -> None:
        self._taken = is_known if issubclass(kind, nn.Module) else is_library
        self._kind, self._library = kind, self._taken(kind.__module__)
        self._first: dict[str, Any] = dict(vars(kind))
        self._held: list[Any] = []
        self._identities: list[int] = []
        self._entries: list[tuple[str, Any]] = []

    def entries(self) -> list[tuple[str, Any]]:
        """Returns names and values, in their order."""
        identities = [*map(id, vars(self._kind).values())]
        if identities != self._identities:
            self._identities, self._held = identities, [*vars(self._kind).values()]
            chosen = self._exchanged() if self._library else self._all()
            self._entries = [(name, plain_function(value)) for name, value in chosen]
        return self._entries

    def _exchanged(self) -> list[tuple[str, Any]]:
        found = [(name, None) for name in self._first if name not in vars(self._kind)]
        for name, value in vars(self._kind).items():
            function = plain_function(value)
            foreign = isinstance(function, types.FunctionType) and not self._taken(module_of(function))
            if foreign or self._first.get(name, self) is not value:
                found.append((name, value))
        return found

    def _all(self) -> list[tuple[str, Any]]:
        found = []
        for name, value in vars(self._kind).items():
            made = name == "__init__" and issubclass(self._kind, nn.Module)  # construction is over
            function = plain_function(value)
            descriptor = isinstance(function, _DESCRIPTORS)
            told = name not in _OF_EVERY_CLASS and type(value).__module__ != "_abc"  # tables of abstract classes
            if told and not made and not descriptor:
                found.append((name, value))
        return found


def own_slots(value: Any) -> list[tuple[str, Any]]:
    """Returns names and values of the slots of an object whose class is no library's, under their private names."""
    found = []
    for kind in type(value).__mro__ if not is_library(type(value).__module__) else ():
        for name, member in vars(kind).items() if "__slots__" in vars(kind) else ():
            with suppress(AttributeError):  # it has no value
                if isinstance(member, types.MemberDescriptorType):
                    found.append((f"{kind.__qualname__}.{name}", member.__get__(value, kind)))
    return found


def _own_attributes(value: Any) -> dict[str, Any]:
    own = getattr(value, "__dict__", {})
    return {key: each for key, each in own.items() if not (isinstance(value, enum.Enum) and key in _OF_EVERY_MEMBER)}


def _has_attributes(value: Any) -> bool:
    """Returns whether a number, a string or a member of an enumeration has attributes beside what it is."""
    return bool(_own_attributes(value) or own_slots(value))


def _is_content(value: Any) -> bool:
    """Returns whether what a library's function holds may be a user's: functions of other code, numbers, modules."""
    if isinstance(value, types.FunctionType):
        return not is_library(module_of(value))
    return isinstance(value, (*SCALARS, torch.Tensor, nn.Module, list, dict, np.ndarray))


def _tell_numbers(value: Any) -> str | None:
    """Returns the state of what makes random numbers; None for what does not."""
    if isinstance(value, torch.Generator):
        return hashing.digest_bytes(value.get_state().numpy().tobytes())
    if isinstance(value, random.Random):
        return repr(value.getstate())
    return repr(value.bit_generator.state) if isinstance(value, np.random.Generator) else None


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _tell_source(kind: type) -> Any:
    """Returns a class's name and a digest of the file it is written in; of its functions where there is none."""
    if kind is object or kind is nn.Module:
        return None
    try:
        content = Path(inspect.getsourcefile(kind) or "").read_bytes()
    except (TypeError, OSError):
        functions = {key: each for key, each in vars(kind).items() if isinstance(each, types.FunctionType)}
        return [_name_of(kind), hashing.digest_values({key: digest_code(f.__code__) for key, f in functions.items()})]
    return [_name_of(kind), hashing.digest_bytes(content)]


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
