"""How a module is made again without its constructor: its class, its tensors' shapes, its children, its attributes.

A description by the constructor (`describing.py`) is shorter and comes first; this one needs no argument of any.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from solidify.model import anatomy, operations
from solidify.model.assembling import Maker
from solidify.surgery import describing
from solidify.surgery.comparing import held_faults, part_faults
from solidify.surgery.encoding import Classes, encode, settle_shared
from solidify.system import foreign
from solidify.upstream.torch import (
    every_hook,
    own_buffers,
    own_modules,
    own_parameters,
    unsaved_buffers,
)

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def dissect(name: str, module: nn.Module, classes: Classes) -> dict[str, Any]:
    """Says what a module consists of, for `Maker` to build it without its constructor.

    Leaves of torch's own are described by their constructors where these make the same. What cannot be written down
    (hooks, functions without a name) is a fault of `classes`.
    """
    dtype = anatomy.main_dtype(module) or torch.float32  # that of the configuration, in which models are loaded
    paths = {id(part): path for path, part in module.named_modules()}
    found: dict[str, Any] = settle_shared(_Dissection(name, paths, dtype, classes).part("", module), classes)
    return found


def keep_tensors(module: nn.Module) -> Callable[[], None]:
    """Has a module's state hold all of its tensors, in place: loose ones become buffers, all buffers are saved.

    Nothing but the state brings the values of those back, where no constructor computes them. Returns what undoes it.
    """
    loose = [(part, key, tensor) for part in module.modules() for key, tensor in _loose_tensors(part)]
    unsaved = [(unsaved_buffers(part), set(unsaved_buffers(part))) for part in module.modules()]
    for part, key, tensor in loose:
        delattr(part, key)
        part.register_buffer(key, tensor)
    for names, _ in unsaved:
        names.clear()

    def undo() -> None:
        """Makes the module what it was."""
        for part, key, tensor in loose:
            delattr(part, key)
            setattr(part, key, tensor)
        for names, before in unsaved:
            names.update(before)

    return undo


def unsaved_tensors(module: nn.Module) -> list[str]:
    """Names the tensors that no state holds; a model is loaded without memory for them, and so without their values."""
    return [
        f"{path}.{key}".lstrip(".")
        for path, part in module.named_modules()
        for key in (*sorted(unsaved_buffers(part)), *(key for key, _ in _loose_tensors(part)))
    ]


def _loose_tensors(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(key, value) for key, value in vars(part).items() if isinstance(value, torch.Tensor)]


@dataclass
class _Dissection:
    """One description: where each module stands, which tensor was met where, and the dtype that needs no word."""

    name: str
    paths: dict[int, str]
    dtype: torch.dtype
    classes: Classes
    described: set[int] = field(default_factory=set)
    tensors: dict[int, str] = field(default_factory=dict)

    def part(self, path: str, part: nn.Module) -> Any:
        """Describes a module that is held; of one that was met before, says where."""
        if id(part) in self.described:
            return {"at": self.paths[id(part)]}
        self.described.add(id(part))
        if (short := self._by_constructor(path, part)) is not None:
            return short
        where = f"{self.name}.{path}".rstrip(".")
        self.classes.faults += _hook_faults(where, part)
        loose = _loose_tensors(part)
        parameters = [[key, self._tensor(path, key, held)] for key, held in own_parameters(part).items()]
        buffers = [[key, self._tensor(path, key, held)] for key, held in [*own_buffers(part).items(), *loose]]
        children = [
            [key, None if child is None else self.part(f"{path}.{key}".lstrip("."), child)]
            for key, child in own_modules(part).items()
        ]
        tensors = {"parameters": parameters, "buffers": buffers}
        found = {
            "class": self.classes.number(type(part)),
            "empty": {key: each for key, each in tensors.items() if each},
            "children": children,
            "attributes": dict(self._attributes(where, part)),
        }
        return {key: value for key, value in found.items() if value or key in ("class", "empty")}

    def _attributes(self, where: str, part: nn.Module) -> Iterator[tuple[str, Any]]:
        for key, value in vars(part).items():
            if key in _OF_EVERY_MODULE or isinstance(value, torch.Tensor):
                continue
            if key == "forward":
                self.classes.faults.append(f"{where} has a forward of its own, set on the instance")
            elif inspect.ismethod(value) and id(value.__self__) in self.paths:
                yield key, {"method": value.__name__, "of": self.paths[id(value.__self__)]}
            else:
                yield key, encode(f"{where}.{key}", value, self.classes, self._mentioned)

    def _mentioned(self, where: str, module: nn.Module) -> Any:
        """Says where a module stands that an attribute speaks of."""
        if id(module) in self.paths:
            return {"at": self.paths[id(module)]}
        self.classes.faults.append(
            f"{where} is {type(module).__name__}, which is no part of the module; register it (nn.ModuleList)"
        )
        return None

    def _tensor(self, path: str, key: str, held: torch.Tensor | None) -> Any:
        if held is None:
            return None
        if (first := self.tensors.setdefault(id(held), f"{path}.{key}")) != f"{path}.{key}":
            return {"at": first}
        where = f"{self.name}.{path}.{key}".replace("..", ".")
        marks = {
            mark: encode(f"{where}.{mark}", value, self.classes, self._mentioned)
            for mark, value in operations.list_marks(held).items()
        }
        return {**self._shape(held), **({"marks": marks} if marks else {})}

    def _shape(self, tensor: torch.Tensor) -> dict[str, Any]:
        usual = {} if tensor.dtype == self.dtype else {"dtype": str(tensor.dtype).removeprefix("torch.")}
        return {"shape": list(tensor.shape), **usual}

    def _by_constructor(self, path: str, part: nn.Module) -> dict[str, Any] | None:
        """Describes a leaf of torch's own by its constructor, if that makes the same; else None."""
        tables = (own_parameters(part), own_buffers(part))
        own = {key: held for table in tables for key, held in table.items() if held is not None}
        leaf = type(part).__module__.startswith("torch.nn.") and not own_modules(part)
        if not leaf or any(id(held) in self.tensors for held in own.values()):
            return None
        if any(held.is_floating_point() and held.dtype != self.dtype for held in own.values()):
            return None  # a constructor makes them in the dtype of the model
        scratch = Classes(exact=True)
        tree = describing.describe(self.name, part, None, scratch)
        if scratch.faults:
            return None
        with torch.device("meta"):
            made = foreign.attempt(Maker(scratch.found, {}).build, tree)
        if made.value is None or not _are_alike(part, made.value) or _hook_faults("", part):
            return None
        self.tensors.update({id(held): f"{path}.{key}" for key, held in own.items()})
        numbers = [self.classes.number(cls) for cls in scratch.found]
        found: dict[str, Any] = _renumber(tree, numbers)
        return found


def _renumber(value: Any, numbers: list[int]) -> Any:
    """Returns a description with the numbers that its classes have in another list."""
    if isinstance(value, list):
        return [_renumber(each, numbers) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: numbers[each] if key == "class" and isinstance(each, int) else _renumber(each, numbers)
        for key, each in value.items()
    }


def _are_alike(part: nn.Module, again: nn.Module) -> bool:
    """Compares two leaves in all that is no tensor's value."""
    return not any((*part_faults(part, again, ""), *held_faults(part, again, "")))


def _hook_faults(where: str, part: nn.Module) -> list[str]:
    if not any(every_hook(part).values()):
        return []
    return [f"{where} has hooks, which its class does not register"]
