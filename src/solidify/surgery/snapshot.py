"""A model as it was before a change: to put it back in place, and to tell what code did outside what it is to change.

Remembered are: of every module its class (with what the class holds), attributes, children, parameters, buffers, hooks
and mode; configurations with all they contain; of every parameter its storage, attributes, hooks, `requires_grad` and
gradient; the values of buffers, and, where the model is small, those of parameters; whether gradients are computed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from solidify.model.extent import Extent
from solidify.system import foreign
from solidify.upstream.torch import CHILDREN, LEFT_BY_HOOKS, TABLES, TENSOR_HOOKS, writes
from solidify.weights.format import has_memory, same_bits

_CONTAINERS = (dict, list, set, OrderedDict)
# What Python makes of a class as it is looked at.
_MADE = {"__annotations__", "__annotate__", "__annotations_cache__", "__annotate_func__", "__doc__"}
_ON_THE_HEAP = 1 << 9  # `Py_TPFLAGS_HEAPTYPE`: made by a class statement
_PLAIN = frozenset({bool, int, float, str, type(None)})


class _Held(NamedTuple):
    """An object or a container: the module that holds it, the names that lead to it there, and what it held."""

    owner: str
    path: tuple[str, ...]
    value: Any
    kind: type
    content: Any


class Snapshot:
    """A model as it was."""

    def __init__(self, model: nn.Module, extent: Extent) -> None:
        self._seen: dict[int, Any] = {}  # what was remembered, kept alive, by identity
        self._steps: list[_Held] = []
        self._gradients = torch.is_grad_enabled()
        kinds = {kind for module in model.modules() for kind in type(module).__mro__ if _can_be_patched(kind)}
        self._classes = {kind: dict(vars(kind)) for kind in kinds}
        for owner, module in model.named_modules():
            self._remember_object(owner, (), module)
        self._parameters = [_Parameter(name, p, extent.whole) for name, p in model.named_parameters()]
        self._buffers = [
            _Buffer(name, b, b.data, b.detach().clone(), b.requires_grad, _count_bytes(b))
            for name, b in model.named_buffers()
        ]

    def _remember_object(self, owner: str, path: tuple[str, ...], value: Any) -> None:
        """Remembers an object's attributes, and the containers and configurations among them."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        self._steps.append(_Held(owner, path, value, type(value), dict(vars(value))))
        self._remember_values(owner, path, vars(value))

    def _remember_values(self, owner: str, path: tuple[str, ...], held: Any) -> None:
        for key, value in _list_entries(held):
            kind = type(value)
            if kind in _CONTAINERS:
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    self._steps.append(_Held(owner, (*path, str(key)), value, kind, value.copy()))
                    if value:  # most tables of hooks are empty
                        self._remember_values(owner, (*path, str(key)), value)
            elif kind not in _PLAIN and isinstance(value, (PreTrainedConfig, GenerationConfig)):
                self._remember_object(owner, (*path, str(key)), value)

    def list_values(self) -> dict[int, torch.Tensor]:
        """Returns the values of parameters and buffers that are kept, by the tensors' identity."""
        found = {id(p.parameter): p.values for p in self._parameters if p.values is not None}
        return found | {id(each.buffer): each.copy for each in self._buffers}

    def list_altered(
        self, changes: Collection[str], built: type, hooks: tuple[type, ...] = (), apart: Collection[str] = ()
    ) -> list[str]:
        """Names what is no longer as it was: attributes, children and hooks of modules, keys of configurations, what
        classes hold, parameters' flags, buffers' values.

        Left out are the modules `changes` with all within, what modules `apart` hold themselves, hooks that are methods
        of the classes `hooks`, the values of parameters, and what the class that was `built` keeps in itself and in
        classes of its author's.
        """
        found: list[str] = []
        for step in filter(_holds_others, self._steps):
            if step.owner not in apart and not is_within(step.owner, changes):
                found += (name for name in _list_differences(step, hooks) if not is_within(name, changes))
        for kind, attributes in self._classes.items():
            now = vars(kind)
            own = issubclass(built, kind) and kind.__module__.partition(".")[0] not in ("torch", "transformers")
            if own or _has_the_same(now, attributes):
                continue
            names = [key for key in {**attributes, **now} if key not in _MADE]
            found += (f"{kind.__name__}.{key} of the class" for key in names if now.get(key) is not attributes.get(key))
        found += (p.name for p in self._parameters if not is_within(p.name, changes) and p.is_altered())
        found += (b.name for b in self._buffers if not is_within(b.name, changes) and b.is_overwritten())
        if torch.is_grad_enabled() is not self._gradients:
            found.append("whether torch records gradients (torch.set_grad_enabled)")
        return list(dict.fromkeys(found))

    def put_back(self) -> list[str]:
        """Puts everything back; returns the names of parameters whose values could not be."""
        for step in self._steps:
            if type(step.value) is not step.kind:  # an object's alone can be another: no container's class can be set
                step.value.__class__ = step.kind
            now = _read_content(step.value)
            now.clear()
            now.extend(step.content) if isinstance(now, list) else now.update(step.content)
        torch.set_grad_enabled(self._gradients)
        for kind, attributes in self._classes.items():
            _put_back_class(kind, attributes)
        for each in self._buffers:
            each.put_back()
        return [parameter.name for parameter in self._parameters if not parameter.put_back()]


class _Parameter:
    """A parameter as it was; with its values, if they are to be kept."""

    def __init__(self, name: str, parameter: nn.Parameter, with_values: bool) -> None:
        self.name = name
        self.parameter, self._data, self._version = parameter, parameter.data, writes(parameter)
        self._requires_grad, self._gradient = parameter.requires_grad, parameter.grad
        self._gradient_data = None if parameter.grad is None else parameter.grad.data
        self._attributes, self._bytes = dict(vars(parameter)), _count_bytes(parameter)
        self._hooks = {key: _copy_hooks(getattr(parameter, key)) for key in TENSOR_HOOKS}
        self.values = parameter.detach().clone() if with_values and not parameter.is_meta else None

    def is_altered(self) -> bool:
        """Returns whether its flag, its hooks or its attributes are others; not its values, memory or gradient."""
        hooks = {key: _copy_hooks(getattr(self.parameter, key)) or {} for key in TENSOR_HOOKS}
        return (
            self.parameter.requires_grad is not self._requires_grad
            or hooks != {key: before or {} for key, before in self._hooks.items()}
            or bool(_list_other_keys(vars(self.parameter), self._attributes))
        )

    def put_back(self) -> bool:
        """Returns whether all of it is as it was."""
        written = writes(self.parameter) != self._version and not self.parameter.is_meta
        self.parameter.grad = None  # it has the dtype of what stands there now
        freed = not self._data.is_meta and not has_memory(self._data)
        if freed:
            self._data.untyped_storage().resize_(self._bytes)
        self.parameter.data = self._data
        self.parameter.requires_grad_(self._requires_grad)
        if self._gradient is not None and self._gradient_data is not None:
            self._gradient.data = self._gradient_data  # `model.half()` gives it another
        self.parameter.grad = self._gradient
        vars(self.parameter).clear()
        vars(self.parameter).update(self._attributes)
        for key, hooks in self._hooks.items():
            now = getattr(self.parameter, key)
            if now is not None:
                now.clear()
                now.update(hooks or {})
        if self.values is None:
            return not written and not freed
        if not same_bits(self._data, self.values):
            self._data.copy_(self.values)
        return True


class _Buffer(NamedTuple):
    """A buffer as it was: its name, itself, its memory, and a copy of its values."""

    name: str
    buffer: torch.Tensor
    data: torch.Tensor
    copy: torch.Tensor
    requires_grad: bool
    nbytes: int

    def is_overwritten(self) -> bool:
        """Returns whether it has other values."""
        return not self.buffer.is_meta and not same_bits(self.buffer, self.copy)

    def put_back(self) -> None:
        """Gives it its memory and values."""
        if not self.data.is_meta and not has_memory(self.data):
            self.data.untyped_storage().resize_(self.nbytes)
        self.buffer.data = self.data
        if self.buffer.requires_grad is not self.requires_grad:
            self.buffer.requires_grad_(self.requires_grad)
        if self.is_overwritten():
            self.buffer.data.copy_(self.copy)


def _can_be_patched(kind: type) -> bool:
    """Returns whether a class can be given attributes: those that Python or C make cannot."""
    return kind.__module__ not in ("builtins", "abc", "typing") and bool(kind.__flags__ & _ON_THE_HEAP)


def _count_bytes(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_meta or tensor.layout != torch.strided else tensor.untyped_storage().nbytes()


def is_within(name: str, changes: Collection[str]) -> bool:
    """Returns whether a dotted name is one of `changes`, or within one."""
    while name:
        if name in changes:
            return True
        name = name.rpartition(".")[0]
    return False


def _list_entries(held: Any) -> Iterable[tuple[Any, Any]]:
    return held.items() if isinstance(held, Mapping) else enumerate(held)


def _has_the_same(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Returns whether two mappings hold the same objects, in one order."""
    same = len(now) == len(before) and all(map(is_, now.keys(), before.keys()))
    return same and all(map(is_, now.values(), before.values()))


def _holds_others(step: _Held) -> bool:
    """Returns whether an object or a container holds other objects than it did; those may be equal."""
    if type(step.value) is not step.kind:
        return True
    now: Any = _read_content(step.value)
    if isinstance(now, Mapping):
        return not _has_the_same(now, step.content)
    return len(now) != len(step.content) or not all(map(is_, now, step.content))


def _read_content(value: Any) -> Any:
    """Returns a container itself, and the attributes of what is none."""
    return value if isinstance(value, _CONTAINERS) else vars(value)


def _holds_hooks(step: _Held) -> bool:
    return bool(step.path) and step.path[-1].startswith("_") and "hooks" in step.path[-1]


def _list_differences(step: _Held, hooks: tuple[type, ...]) -> Iterator[str]:
    """Names what an object or a container holds otherwise; the tables of a module are containers of their own."""
    path = tuple(part for part in step.path if part not in TABLES)
    if type(step.value) is not step.kind:
        yield _join(step.owner, *path, "__class__")
        return
    now = _read_content(step.value)
    if isinstance(now, Mapping):
        keys = [key for key in _list_other_keys(now, step.content) if key != LEFT_BY_HOOKS]
        if _holds_hooks(step):
            ours = {key for key, hook in now.items() if hooks and isinstance(getattr(hook, "__self__", None), hooks)}
            yield from [_join(step.owner, *path)] if {*keys} - ours else []
        elif not keys and step.path[-1:] == (CHILDREN,) and list(now) != list(step.content):
            yield f"{_join(step.owner, *path)} (the order of its modules)"
        else:
            yield from (_join(step.owner, *path, str(key)) for key in keys)
    elif not _is_same(now, step.content):
        yield _join(step.owner, *path)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _list_other_keys(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> list[Any]:
    """Returns the keys whose values are gone, new, or others."""
    missing = object()
    return [key for key in {**before, **now} if not _is_same(now.get(key, missing), before.get(key, missing))]


def _is_same(now: Any, before: Any) -> bool:
    """Returns whether a value is the one that it was, or is equal to it; tensors and modules are the same alone."""
    if now is before:
        return True
    if type(now) is not type(before) or isinstance(now, (torch.Tensor, nn.Module)):
        return False
    if isinstance(now, Sequence) and not isinstance(now, str):
        return len(now) == len(before) and all(map(_is_same, now, before))
    return foreign.attempt(lambda: bool(now == before)).value is True


def _copy_hooks(hooks: Any) -> Any:
    return None if hooks is None else dict(hooks)


def _put_back_class(kind: type, attributes: dict[str, Any]) -> None:
    """Gives a class the attributes that it had: a patched forward is one of all models of the class."""
    for key in [key for key in vars(kind) if key not in attributes]:
        delattr(kind, key)
    for key, value in attributes.items():
        if vars(kind).get(key) is not value:
            setattr(kind, key, value)
