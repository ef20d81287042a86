"""What is told of frozen layers beside their tensors: attributes of every module, functions, classes and their code.

The words are the same in another process for the same layers; of an object of which nothing can be told, its identity.
"""

from __future__ import annotations

import enum
import functools
import inspect
import random
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from solidify.errors import ObjectiveError
from solidify.training.prefix_state import FUNCTIONS
from solidify.upstream.torch import module_hooks, other_hooks, own_buffers, own_parameters
from solidify.weights import hashing

BEFORE = "before_prefix"  # what a forward that `prefix.py` puts before a module's own says of that: none, or which
SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}  # tables of what is told apart, and of hooks
_DEEPEST = 12


class Attributes:
    """The modules of some layers; `digest` says what a tensor holds."""

    def __init__(self, layers: Sequence[nn.Module], digest: Callable[[torch.Tensor], str]) -> None:
        self._layers, self._digest = layers, digest
        modules = [module for layer in layers for module in layer.modules()]
        self._forwards = {type(module): type(module).forward for module in modules}
        self._sources: dict[type, Any] = {}
        self._opaque: dict[int, Any] = {}  # so that no other object has their identity

    def values(self) -> list[Any]:
        """Returns plain values that tell two states of the layers apart.

        Raises:
            ObjectiveError: a loose tensor learns.
        """
        named = [
            (f"{n}.{name}", module) for n, layer in enumerate(self._layers) for name, module in layer.named_modules()
        ]
        teller = _Teller({id(module): name for name, module in named}, self._digest, self._opaque)
        return [
            [
                [name, self._tell_class(type(module), teller), *teller.tell_module(name, module)]
                for name, module in named
            ],
            sorted(self._sources[each] for each in {type(module) for _, module in named}),
        ]

    def _tell_class(self, kind: type[nn.Module], teller: _Teller) -> Any:
        """Returns the name of a class, and its `forward` where that was exchanged since the beginning."""
        if kind not in self._sources:
            self._sources[kind] = [each for one in kind.__mro__ if (each := _tell_source(one))]
        first = self._forwards.setdefault(kind, kind.forward)
        exchanged = [] if first is kind.forward else [teller.tell(kind.forward)]
        return [_name_of(kind), _tell_globals(inspect.unwrap(kind.forward)), *exchanged]


def hook_fault(module: nn.Module) -> str:
    """Returns what is wrong with a module's hooks; empty for those of transformers, or that declare a mask."""
    harmless = all(_is_harmless(hook) for _, hook, _ in module_hooks(module))
    return "" if harmless and not other_hooks(module) else "has a hook that looks inside (of a term, for one)"


def _is_harmless(hook: Any) -> bool:
    """Returns whether a hook is of transformers, which records what is asked for, or declares a mask."""
    return hasattr(hook, "solid_mask") or str(getattr(hook, "__module__", "")).startswith("transformers.")


class _Teller:
    """Tells of values once; what is met again is a number."""

    def __init__(
        self, modules: Mapping[int, str], digest: Callable[[torch.Tensor], str], opaque: dict[int, Any]
    ) -> None:
        self._modules, self._digest, self._opaque = modules, digest, opaque
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
            self._where = f"{name}.{key}" if not depth else self._where
            told.append([key, self.tell(value, depth + 1)])
        return [sorted(told, key=lambda each: str(each[0])), [*own_parameters(module)], [*own_buffers(module)]]

    def tell(self, value: Any, depth: int = 0) -> Any:
        """Returns plain words for a value."""
        if isinstance(value, SCALARS):
            return repr(value)
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                raise ObjectiveError(
                    f"cache_prefix: {self._where} of the frozen layers holds a tensor that learns and that is no "
                    "parameter of its module; register it, or leave cache_prefix out"
                )
            return self._digest(value)
        if isinstance(value, type):
            return _name_of(value)
        if id(value) in self._modules:
            return ["module", self._modules[id(value)]]
        if id(value) in self._met:
            return ["met", self._met[id(value)][0]]
        self._met[id(value)] = len(self._met), value
        if depth > _DEEPEST:
            return self._tell_identity(value)
        return [_name_of(type(value)), self._tell_object(value, depth + 1)]

    def _tell_object(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            inner = [*value.named_children()]
            held = [(name, self._digest(each)) for name, each in (*value.named_parameters(), *value.named_buffers())]
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
        if isinstance(value, FUNCTIONS):
            return self._tell_function(value, depth)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return [str(value.dtype), value.shape, hashing.digest_bytes(value.tobytes())]
        if (state := _tell_numbers(value)) is not None:
            return state
        if hasattr(value, "__dict__"):
            return [(key, self.tell(each, depth)) for key, each in sorted(vars(value).items())]
        return self._tell_identity(value)

    def _tell_function(self, value: Any, depth: int) -> Any:
        """Returns the name, code, defaults and closure of a function; of a method what it is bound to, too."""
        if isinstance(value, types.MethodType):
            return [self.tell(value.__func__, depth), self.tell(value.__self__, depth)]
        name = f"{value.__module__}.{value.__qualname__}"
        if not isinstance(value, types.FunctionType):
            return name
        cells = [_content_of(cell) for cell in value.__closure__ or ()]
        held = [self.tell(each, depth) for each in (value.__defaults__, value.__kwdefaults__, cells)]
        return [name, _tell_code(value.__code__), _tell_globals(value), held]

    def _tell_identity(self, value: Any) -> Any:
        self._opaque[id(value)] = value
        return [_name_of(type(value)), id(value)]


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


def _tell_code(code: types.CodeType) -> str:
    """Returns a digest of what a function does, wherever it stands."""
    constants = [_tell_code(each) if isinstance(each, types.CodeType) else repr(each) for each in code.co_consts]
    return hashing.digest_values([code.co_code.hex(), code.co_names, code.co_varnames, constants])


def _tell_globals(function: Any) -> list[str]:
    """Returns the plain values of its file that a function names."""
    code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if code is None:
        return []
    return [f"{name}={names[name]!r}" for name in code.co_names if name in names and isinstance(names[name], SCALARS)]


def _tell_source(kind: type) -> Any:
    """Returns a class's name and a digest of the file it is written in; of its functions where there is none."""
    if kind is object or kind is nn.Module:
        return None
    try:
        content = Path(inspect.getsourcefile(kind) or "").read_bytes()
    except (TypeError, OSError):
        functions = {key: each for key, each in vars(kind).items() if isinstance(each, types.FunctionType)}
        return [_name_of(kind), hashing.digest_values({key: _tell_code(f.__code__) for key, f in functions.items()})]
    return [_name_of(kind), hashing.digest_bytes(content)]


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
