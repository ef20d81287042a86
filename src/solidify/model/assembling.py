"""Builds modules as a configuration describes them: by their constructors, or part by part without.

Artifacts of modules that were wrapped or patched carry this file's text behind that of `operations.py`, so it depends
on torch alone. A description is plain values; classes and functions are numbers in a list beside it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

_FORMS = ("mapping", "pairs", "tuple", "set", "partial", "enum", "object", "method", "at", "of_torch", "same", "as")


def in_order(children: Any) -> Any:
    """Returns names with what stands there; files sort the keys of a mapping, as of children it was once."""
    return children.items() if isinstance(children, dict) else children


class Maker:
    """Makes what one description stands for; `sources` gives what the model supplies, by key.

    A part without a constructor is an empty module of its class, into which tensors (whose values the weights bring),
    children and attributes are put. Attributes come last: they may speak of modules by where those stand (`at`).
    """

    def __init__(self, kinds: list[Any], sources: Mapping[str, Callable[[], Any]]) -> None:
        self.kinds, self.sources = kinds, sources
        self.standing: dict[str, Any] = {}
        self.pending: list[tuple[nn.Module, dict[str, Any]]] = []
        self.shared: dict[int, Any] = {}  # descriptions of objects that stand at several places, then these objects
        self.made: set[int] = set()

    def build(self, description: dict[str, Any]) -> Any:
        """Makes a module."""
        self.find_shared(description)
        made = self.make(description, "")
        for owner, attributes in self.pending:
            vars(owner).update({key: self.make(each, None) for key, each in attributes.items()})
        return made

    def find_shared(self, value: Any) -> None:
        """Notes how the objects are described that stand at several places."""
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if isinstance(value, dict) and set(value) == {"as", "value"}:
            self.shared[value["as"]] = value["value"]
        for each in inner:
            self.find_shared(each)

    def make(self, value: Any, place: str | None) -> Any:
        """Makes what a value stands for: itself, what a form says, or a module, which stands at a place."""
        if isinstance(value, list):
            return [self.make(each, None) for each in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"class"}:
            return self.kinds[value["class"]]
        for form in _FORMS:
            if form in value:
                return getattr(self, f"make_{form}")(value)
        return self.make_module(value, place)

    def make_module(self, value: dict[str, Any], place: str | None) -> Any:
        """Makes a module by its constructor, or takes one that the model supplies, or starts with an empty one."""
        if "supplied" in value:
            made = self.sources[value["supplied"]]()
        elif "empty" in value:
            kind = self.kinds[value["class"]]
            made = kind.__new__(kind)
            nn.Module.__init__(made)
        else:
            arguments = value.get("arguments", {}).items()
            made = self.kinds[value["class"]](**{key: self.make(each, None) for key, each in arguments})
        if place is not None:
            self.standing[place] = made
        if "empty" in value:
            self.fill(made, value["empty"])
            self.pending.append((made, value.get("attributes", {})))
        for key, child in in_order(value.get("children", [])):
            inside = None if place is None else f"{place}.{key}".lstrip(".")
            nn.Module.add_module(made, key, self.make(child, inside))
        if "empty" not in value:
            self.patch(made, value)
        return made

    def fill(self, made: nn.Module, tensors: dict[str, Any]) -> None:
        """Gives an empty module its own parameters and buffers."""
        for key, each in tensors.get("parameters", []):
            tensor = self.make_tensor(each)
            if each is not None and "at" not in each:
                tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())
            nn.Module.register_parameter(made, key, self.mark(tensor, each))
        for key, each in tensors.get("buffers", []):
            nn.Module.register_buffer(made, key, self.mark(self.make_tensor(each), each))

    def mark(self, tensor: Any, value: dict[str, Any] | None) -> Any:
        """Sets on a tensor what was set on it: attributes of plain values."""
        if value is not None and "marks" in value:
            vars(tensor).update({key: self.make(each, None) for key, each in value["marks"].items()})
        return tensor

    def make_tensor(self, value: dict[str, Any] | None) -> Any:
        """Makes a tensor of zeros, or takes the one that stands at another place; None for None."""
        if value is None:
            return None
        if "at" in value:
            owner, _, name = value["at"].rpartition(".")
            return getattr(self.standing[owner], name)
        kind = getattr(torch, value["dtype"]) if "dtype" in value else None
        return torch.zeros(value["shape"], dtype=kind)

    def patch(self, made: Any, value: dict[str, Any]) -> None:
        """Sets what was set on a module by hand."""
        for key, each in value.get("attributes", {}).items():
            setattr(made, key, self.make(each, None))
        for key, number in value.get("methods", {}).items():
            setattr(made, key, self.kinds[number].__get__(made))
        for key, number in value.get("functions", {}).items():
            setattr(made, key, self.kinds[number])
        for hook in value.get("hooks", []):
            getattr(made, hook["register"])(self.kinds[hook["function"]], with_kwargs=hook["with_kwargs"])

    def make_mapping(self, value: dict[str, Any]) -> Any:
        """Makes a dictionary whose keys are texts."""
        return {key: self.make(each, None) for key, each in value["mapping"].items()}

    def make_pairs(self, value: dict[str, Any]) -> Any:
        """Makes a dictionary of any keys, or one of another class."""
        kind = self.kinds[value["class"]] if "class" in value else dict
        return kind((self.make(key, None), self.make(each, None)) for key, each in value["pairs"])

    def make_tuple(self, value: dict[str, Any]) -> Any:
        """Makes a tuple, or one of another class (a named tuple, a size)."""
        made = [self.make(each, None) for each in value["tuple"]]
        kind = self.kinds[value["class"]] if "class" in value else tuple
        return kind(*made) if value.get("named") else kind(made)

    def make_set(self, value: dict[str, Any]) -> Any:
        """Makes a set."""
        return {self.make(each, None) for each in value["set"]}

    def make_partial(self, value: dict[str, Any]) -> Any:
        """Makes a function, or a class, with some of its arguments."""
        positional, named = self.make(value["given"], None), self.make(value["named"], None)
        return partial(self.make(value["partial"], None), *positional, **named)

    def make_enum(self, value: dict[str, Any]) -> Any:
        """Finds a member of an enumeration."""
        return self.kinds[value["class"]][value["enum"]]

    def make_object(self, value: dict[str, Any]) -> Any:
        """Makes an object of its attributes (a dataclass, a namespace), without its constructor."""
        kind = self.kinds[value["class"]]
        made = kind.__new__(kind)
        vars(made).update(self.make({"mapping": value["object"]}, None))
        return made

    def make_method(self, value: dict[str, Any]) -> Any:
        """Finds a method of a module by where that stands."""
        return getattr(self.standing[value["of"]], value["method"])

    def make_same(self, value: dict[str, Any]) -> Any:
        """Makes an object that stands at several places, once."""
        number = value["same"]
        if number not in self.made:
            self.shared[number] = self.make(self.shared[number], None)
            self.made.add(number)
        return self.shared[number]

    def make_as(self, value: dict[str, Any]) -> Any:
        """Makes an object that stands at other places, too."""
        return self.make_same({"same": value["as"]})

    def make_at(self, value: dict[str, Any]) -> Any:
        """Finds a module by where it stands."""
        return self.standing[value["at"]]

    def make_of_torch(self, value: dict[str, Any]) -> Any:
        """Makes a dtype, or a device."""
        found = getattr(torch, value["of_torch"], None)
        return found if isinstance(found, torch.dtype) else torch.device(value["of_torch"])
