"""Values as a configuration holds them: plain ones, and forms that `model/assembling.py` makes others of.

Classes and functions are numbers in a list beside the description, which the artifact's code imports.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from solidify.system import foreign

PLAIN = (bool, int, float, str, type(None))
_VALUES: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}
_DEEPEST = 100  # values within one another: what writes and reads files goes through them by recursion
_MADE_IN_PYTHON = 1 << 9  # `Py_TPFLAGS_HEAPTYPE` of the C interface: https://docs.python.org/3/c-api/typeobj.html


@dataclass
class Classes:
    """The classes and functions that a description speaks of by number, and what could not be described."""

    found: list[Any] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    nested: bool = False  # whether arguments are given by the module's name
    exact: bool = False  # whether tuples are told from lists, which constructors take alike, and one object from two
    met: dict[int, int] = field(default_factory=dict)  # numbers of objects that can be changed, by identity
    inside: list[int] = field(default_factory=list)  # the objects that are being written, one within the other
    shared: set[int] = field(default_factory=set)  # the numbers of those that stand at several places

    def ask(self, name: str, key: str) -> str:
        """Writes how an argument of a module's constructor is given."""
        return f"{{{name!r}: {{{key!r}: ...}}}}" if self.nested else f"{{{key!r}: ...}}"

    def number(self, cls: Any) -> int:
        """Returns the number of a class, or of a function."""
        if not any(cls is each for each in self.found):
            self.found.append(cls)
        return next(number for number, each in enumerate(self.found) if each is cls)


Describe = Callable[[str, nn.Module], Any]


def encode(where: str, value: Any, classes: Classes, describe: Describe) -> Any:
    """Writes a value for a configuration; of modules, what `describe` says. What cannot be written is a fault."""

    def inner(each: Any) -> Any:
        """Writes a value that this one holds."""
        classes.inside.append(id(value))
        try:
            return encode(where, each, classes, describe)
        finally:
            classes.inside.pop()

    if id(value) in classes.inside or len(classes.inside) > _DEEPEST:
        classes.faults.append(f"{where} holds itself, or is nested too deep for config.json; have the class make it")
        return None
    if not classes.exact or (not isinstance(value, (list, Mapping, set)) and not _is_own_object(value)):
        return _encode_value(where, value, classes, describe, inner)
    if (number := classes.met.get(id(value))) is not None:
        classes.shared.add(number)
        return {"same": number}
    number = classes.met[id(value)] = len(classes.met)
    return {"as": number, "value": _encode_value(where, value, classes, describe, inner)}


def settle_shared(description: Any, classes: Classes) -> Any:
    """Returns a description in which only those objects have numbers that stand at several places."""
    if isinstance(description, list):
        return [settle_shared(each, classes) for each in description]
    if not isinstance(description, dict):
        return description
    if description.keys() == {"as", "value"} and description["as"] not in classes.shared:
        return settle_shared(description["value"], classes)
    return {key: settle_shared(each, classes) for key, each in description.items()}


def _encode_value(where: str, value: Any, classes: Classes, describe: Describe, inner: Callable[[Any], Any]) -> Any:
    if isinstance(value, enum.Enum):
        member = value.name in type(value).__members__  # else several flags at once
        return (
            {"class": classes.number(type(value)), "enum": value.name}
            if member
            else _made_of(value.value, value, classes)
        )
    if isinstance(value, str) and not is_text(value):
        classes.faults.append(f"{where} is {value!r}, which has half a character in it, and is no text for config.json")
        return None
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.generic) and type(value.item()) in PLAIN:
        return _made_of(value.item(), value, classes)
    if (read := next((_VALUES[kind] for kind in _VALUES if isinstance(value, kind)), None)) and not _has_attributes(
        value
    ):
        return _made_of(read(value), value, classes)
    if isinstance(value, nn.Module):
        return describe(where, value)
    if isinstance(value, (list, tuple)):
        return _encode_row(value, classes, inner)
    if isinstance(value, type):
        return {"class": classes.number(value)}
    if isinstance(value, Mapping) and _is_made_of_pairs(value):
        return _encode_mapping(value, classes, inner)
    if type(value) is set:
        return {"set": [inner(each) for each in value]}
    if isinstance(value, functools.partial):
        given, named = [inner(each) for each in value.args], {k: inner(each) for k, each in value.keywords.items()}
        return {"partial": inner(value.func), "given": given, "named": {"mapping": named}}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"of_torch": str(value).removeprefix("torch.")}
    if _is_importable(value):
        return {"class": classes.number(value)}
    if _is_plain_object(value):
        return {"class": classes.number(type(value)), "object": {k: inner(each) for k, each in vars(value).items()}}
    classes.faults.append(_refusal(where, value))
    return None


def _made_of(plain: Any, value: Any, classes: Classes) -> dict[str, Any]:
    """Says that a value is what its class makes of a plain one: a number of numpy's, or of a class of the user's."""
    return {"class": classes.number(type(value)), "tuple": [plain], "named": True}


def is_text(value: str) -> bool:
    """Returns whether all of a text can be written: half a character (a lone surrogate) cannot."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _has_attributes(value: Any) -> bool:
    return bool(getattr(value, "__dict__", None))


def _is_made_of_pairs(value: Mapping[Any, Any]) -> bool:
    """Returns whether a mapping's class makes the same of its keys and values, and it holds nothing besides."""
    if type(value) is dict:
        return True
    made = foreign.attempt(type(value), list(value.items())).value
    return made is not None and list(made.items()) == list(value.items()) and not _has_attributes(value)


def _is_made_of_items(value: list[Any]) -> bool:
    """Returns whether a class of lists makes the same of the items, and it holds nothing besides."""
    made = foreign.attempt(type(value), list(value)).value
    return made is not None and list(made) == list(value) and not _has_attributes(value)


def _encode_row(value: Any, classes: Classes, inner: Callable[[Any], Any]) -> Any:
    row = [inner(each) for each in value]
    if not classes.exact or type(value) is list or (isinstance(value, list) and not _is_made_of_items(value)):
        return row
    if type(value) is tuple:
        return {"tuple": row}
    named = {"named": True} if hasattr(value, "_fields") else {}  # a named tuple takes its items one by one
    return {"class": classes.number(type(value)), "tuple": row, **named}


def _encode_mapping(value: Mapping[Any, Any], classes: Classes, inner: Callable[[Any], Any]) -> Any:
    plain = type(value) is dict
    ordered = all(type(key) is str and is_text(key) for key in value) and list(value) == sorted(value)
    if plain and ordered:  # files sort the keys of a mapping
        return {"mapping": {key: inner(each) for key, each in value.items()}}
    pairs = {"pairs": [[inner(key), inner(each)] for key, each in value.items()]}
    return pairs if plain else {"class": classes.number(type(value)), **pairs}


def _is_importable(value: Any) -> bool:
    """Returns whether a function can be imported by its name from its module (torch's own functions name none)."""
    home = sys.modules.get(getattr(value, "__module__", None) or "torch")
    name = getattr(value, "__name__", None)
    return callable(value) and home is not None and name is not None and vars(home).get(name) is value


def _is_own_object(value: Any) -> bool:
    """Returns whether a value is written as an object of its attributes."""
    others = (*PLAIN, enum.Enum, nn.Module, tuple, type, functools.partial, torch.dtype, torch.device)
    return not isinstance(value, others) and not _is_importable(value) and _is_plain_object(value)


def _is_plain_object(value: Any) -> bool:
    """Returns whether an object is what its attributes are: of a class of Python that has no state besides."""
    if isinstance(value, types.ModuleType):
        return False
    kinds = type(value).__mro__[:-1]
    simple = all(kind.__flags__ & _MADE_IN_PYTHON and not vars(kind).get("__slots__") for kind in kinds)
    return (
        simple
        and hasattr(value, "__dict__")
        and not any("__reduce_ex__" in vars(kind) or "__reduce__" in vars(kind) for kind in kinds)
    )


def _refusal(where: str, value: Any) -> str:
    if callable(value) and (name := getattr(value, "__qualname__", "")) and ("<lambda>" in name or "<locals>" in name):
        return f"{where} is {name}, which no file can be asked for; write it as a function (`def`) at module level"
    return (
        f"{where} is {type(value).__name__}, which config.json cannot hold: only numbers, texts, lists, modules, "
        "classes, functions of a file and what is made of such; have the class make it from them"
    )
