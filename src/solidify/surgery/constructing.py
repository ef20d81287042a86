"""How a module of the user's is built: what its constructor is given, by name, and what a class may offer besides."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from solidify.surgery import contract, layer_types

SUPPLIED = ("config", "layer_idx", "original")


@runtime_checkable
class Adopting(Protocol):
    """A replacement that takes weights over from the module it replaces, once, at surgery."""

    def adopt(self, original: nn.Module) -> None:
        """Copies what it wants to keep."""


@runtime_checkable
class Bypassing(Protocol):
    """A replacement that computes exactly what the original computed while `bypass` is True."""

    bypass: bool


def faults(module: type[nn.Module], arguments: Mapping[str, Any], *, without: Sequence[str] = ()) -> list[str]:
    """Compares a constructor with the arguments it would get; `without` names what cannot be supplied here."""
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        return [f"it is of type {type(module).__name__}, not a class derived from torch.nn.Module"]
    parameters = contract.constructor(module)
    found = layer_types.faults(module)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    for name in arguments:
        if name in SUPPLIED:
            found.append(f"the argument {name!r} is supplied by solidify; remove it from `arguments`")
        elif name not in named and not open_ended:
            takes = ", ".join(n for n in named if n not in SUPPLIED) or "none"
            found.append(f"it takes no argument {name!r}; it takes: {takes}")
    for name, parameter in named.items():
        if name in without and parameter.default is inspect.Parameter.empty:
            found.append(f"its argument {name!r} cannot be supplied where nothing stood before")
        elif parameter.default is inspect.Parameter.empty and name not in arguments and name not in SUPPLIED:
            found.append(f"its argument {name!r} has no default; give it in `arguments`")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        found.append(f"`arguments` must be plain values that a config.json can hold ({error})")
    return found


def supplied_to(module: type[nn.Module]) -> list[str]:
    """Returns which of a constructor's parameters come from the model."""
    return [key for key in SUPPLIED if key in contract.constructor(module)]


@contextmanager
def under(dtype: torch.dtype) -> Iterator[None]:
    """While the block lasts, makes new tensors of a dtype by default, as transformers does while it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def frozen(new: nn.Module) -> tuple[str, ...]:
    """Returns the parameters that a module froze itself while it left others trainable."""
    names = tuple(name for name, parameter in new.named_parameters() if not parameter.requires_grad)
    return names if any(parameter.requires_grad for parameter in new.parameters()) else ()
