"""Two modules, compared: their parts, and what they hold beside tensors and modules, however it is nested.

Nothing that cannot be compared is taken to be the same.
"""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from solidify.model.operations import list_marks, shared_keys
from solidify.surgery.registered import table_faults
from solidify.system import foreign
from solidify.upstream.torch import every_hook, module_hooks, own_buffers, own_parameters
from solidify.upstream.transformers import LOADED
from solidify.weights.format import same_bits

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MISSING = object()
_SHOWN = 60  # letters of a value in a sentence


def part_faults(module: nn.Module, again: nn.Module, within: str) -> Iterator[str]:
    """Compares the modules inside, how they write themselves, and the tensors by name and shape.

    What they hold beside these is compared by `held_faults`.
    """
    mine, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (module, again))
    for name, part in mine.items():
        where = f"{within}.{name}" if name and within else name or within
        other = theirs.get(name)
        if other is None or type(other) is not type(part):
            yield f"{where} is {type(part).__name__}, and {type(other).__name__ if other is not None else 'nothing'}"
            continue
        if part.extra_repr() != other.extra_repr():
            yield f"{where} is {part.extra_repr()}, and {other.extra_repr()}"
        if "forward" in vars(part) and "forward" not in vars(other):
            yield f"{where} has a forward of its own, set on the instance"
        if len(module_hooks(part)) != len(module_hooks(other)):
            yield f"{where} has hooks, which its class does not register"
    for name in theirs.keys() - mine.keys():
        yield f"{within}.{name} is nothing, and {type(theirs[name]).__name__}"
    shapes = [
        {
            key: None if is_lazy(tensor) else tuple(tensor.shape)
            for table in (each.named_parameters, each.named_buffers)  # those too that no state holds
            for key, tensor in table(remove_duplicate=False)
        }
        for each in (module, again)
    ]
    for key in sorted({**shapes[0], **shapes[1]}):
        if shapes[0].get(key) != shapes[1].get(key):
            yield f"{within}.{key} has shape {shapes[0].get(key)}, and {shapes[1].get(key)}"
    ties = [shared_keys(each) for each in (module, again)]
    for key in sorted({**ties[0], **ties[1]}):
        if ties[0].get(key) != ties[1].get(key):
            words = [f"one with {within}.{tie[key]}" if key in tie else "one of its own" for tie in ties]
            yield f"{within}.{key} is {words[0]}, and {words[1]}"
    yield from table_faults(module, again, within)


def held_faults(module: nn.Module, again: nn.Module, within: str) -> dict[str, str]:
    """Returns the attributes in which two modules of the same parts differ: private ones and those of slots too.

    By name, each with a sentence. Tensors that are parameters or buffers are left out, as is whether a module trains,
    and a forward that `again` alone has on the instance: it may be one of the class in the other.
    """
    return dict(_compare_held(module, again, within))


def _compare_held(module: nn.Module, again: nn.Module, within: str) -> Iterator[tuple[str, str]]:
    mine, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (module, again))
    comparison = _Comparison(
        {id(part): name for name, part in reversed(mine.items())},
        {id(part): name for name, part in reversed(theirs.items())},
    )
    for name, part in mine.items():
        other = theirs.get(name)
        if other is None:
            continue  # told by who compares the parts
        where = f"{within}.{name}" if name and within else name or within
        first, second = ({**_read_held(each), **_read_registered(each)} for each in (part, other))
        for key in dict.fromkeys([*first, *second]):
            a, b = first.get(key, _MISSING), second.get(key, _MISSING)
            same = foreign.attempt(comparison.are_same, a, b).value  # classes may raise when they are compared
            if not same and not (key == "forward" and a is _MISSING):
                words = [_show(a), _show(b)]
                if words[0] == words[1]:
                    words = [f"{text} ({type(value).__qualname__})" for text, value in zip(words, (a, b), strict=True)]
                yield f"{where}.{key}", f"{where}.{key} is {words[0]}, and {words[1]}"


def _read_held(part: Any) -> dict[str, Any]:
    """Returns what an object has of its own: attributes, and slots that are filled."""
    listed = [vars(kind).get("__slots__", ()) for kind in type(part).__mro__]
    names = [key for each in listed for key in ([each] if isinstance(each, str) else each)]
    slots = [key for key in names if key not in ("__dict__", "__weakref__") and hasattr(part, key)]
    found = {**getattr(part, "__dict__", {}), **{key: getattr(part, key) for key in slots}}
    if isinstance(part, nn.Module):
        found = {key: value for key, value in found.items() if key not in _OF_EVERY_MODULE and key != LOADED}
    return found


def _read_registered(part: nn.Module) -> dict[str, Any]:
    """Returns the functions of a module's hooks, by what is said of them, and what is set on its own tensors."""
    tensors = [item for table in (own_parameters(part), own_buffers(part)) for item in table.items()]
    marks = {
        f"{key}.{mark}": value
        for key, tensor in tensors
        if tensor is not None
        for mark, value in list_marks(tensor).items()
    }
    return {**marks, **{f"hook {kind}": hooks for kind, hooks in every_hook(part).items() if hooks}}


def _show(value: Any) -> str:
    if value is _MISSING:
        return "not there"
    text = foreign.attempt(repr, value).value or type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class _Comparison:
    """Compares values of two models, in which modules stand at `mine` and `theirs` (paths by identity)."""

    def __init__(self, mine: Mapping[int, str], theirs: Mapping[int, str]) -> None:
        self.mine, self.theirs = mine, theirs
        # What of the one stands for what of the other, both ways: who shares an object shares it there, too.
        self.met: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.kept: list[Any] = []  # alive, so that identities stay theirs

    def are_same(self, a: Any, b: Any) -> bool:
        """Returns whether two values are the same, as far as anything made of them can tell."""
        if type(a) is not type(b):
            return False
        if isinstance(a, float):
            return a == b or (math.isnan(a) and math.isnan(b))
        if isinstance(a, (bool, int, str, bytes, complex, types.NoneType, type, torch.dtype, torch.device)):
            return bool(a == b)
        if isinstance(a, nn.Module):
            return id(a) in self.mine and self.mine[id(a)] == self.theirs.get(id(b))
        if isinstance(a, torch.Tensor):
            return _are_same_tensors(a, b)
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(self.are_same, a, b))
        if id(a) in self.met[0] or id(b) in self.met[1]:
            return self.met[0].get(id(a)) == id(b) and self.met[1].get(id(b)) == id(a)
        self.met[0][id(a)], self.met[1][id(b)] = id(b), id(a)
        self.kept += [a, b]
        return self._are_alike(a, b)

    def _are_alike(self, a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return len(a) == len(b) and all(map(self.are_same, a, b))
        if isinstance(a, (set, frozenset)):
            return bool(a == b)
        if isinstance(a, Mapping):
            return self.are_same(tuple(a), tuple(b)) and all(self.are_same(a[k], b[k]) for k in a)
        if isinstance(a, functools.partial):
            return all(map(self.are_same, (a.func, a.args, a.keywords), (b.func, b.args, b.keywords)))
        if isinstance(a, types.MethodType):
            return a.__func__ is b.__func__ and self.are_same(a.__self__, b.__self__)
        if isinstance(a, types.FunctionType):
            return self._are_same_functions(a, b)
        if a is b:
            return True
        if isinstance(a, weakref.ReferenceType):
            return self.are_same(a(), b())
        if isinstance(a, torch.Generator):
            return bool(torch.equal(a.get_state(), b.get_state()))
        if type(a).__module__ == "numpy":
            return bool(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes())
        return self._hold_same(a, b) and (bool(_read_held(a)) or _are_equal(a, b))

    def _hold_same(self, a: Any, b: Any) -> bool:
        first, second = _read_held(a), _read_held(b)
        return first.keys() == second.keys() and all(self.are_same(first[key], second[key]) for key in first)

    def _are_same_functions(self, a: types.FunctionType, b: types.FunctionType) -> bool:
        """Compares code, defaults, and what is closed over: a constructor makes a new function each time."""
        if a is b:
            return True
        first, second = (
            (each.__defaults__, each.__kwdefaults__, tuple(cell.cell_contents for cell in each.__closure__ or ()))
            for each in (a, b)
        )
        return a.__code__ == b.__code__ and self.are_same(first, second)


def _are_same_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares tensors; of one on the meta device, dtype and shape."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) if a.is_meta or b.is_meta else same_bits(a, b)


def _are_equal(a: Any, b: Any) -> bool:
    """Returns whether two objects that hold nothing that can be read say that they are equal."""
    return vars(type(a)).get("__eq__") is not None and foreign.attempt(lambda: bool(a == b)).value is True
