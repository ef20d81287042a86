"""What of a module no file brings back, seen before anything is written: each with what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from solidify.model import anatomy
from solidify.model.operations import shared_keys

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def find_faults(module: nn.Module, within: str) -> list[str]:
    """Says why a module cannot be wrapped as it stands; `within` is the name that it will have."""
    if faults := [*_find_lazy(module, within), *_find_parametrized(module, within)]:
        return faults
    with anatomy.evaluation(module):
        module.train().eval()  # what is kept from one call to the next in evaluation alone is let go
        return [*_find_views(module, within), *_find_aliases(module, within)]


def _find_lazy(module: nn.Module, within: str) -> Iterator[str]:
    names = [name for name, part in module.named_modules() if any(map(is_lazy, _list_own(part)))]
    if names:
        shown = ", ".join(f"{within}.{name}".rstrip(".") for name in names)
        yield f"{shown} has no shape yet (a lazy layer); call the module once on the example, and wrap it then"


def _list_own(part: nn.Module) -> list[torch.Tensor]:
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]


def _find_parametrized(module: nn.Module, within: str) -> Iterator[str]:
    for name, part in module.named_modules():
        where = f"{within}.{name}".rstrip(".")
        for key in dict(part.parametrizations.items()) if parametrize.is_parametrized(part) else ():
            yield (
                f"{where}.{key} is parametrized, by a class that torch makes at run time and no file holds; wrap the "
                f"module after torch.nn.utils.parametrize.remove_parametrizations({where}, {key!r}), or write the "
                "computation into a module of your own"
            )


def _find_views(module: nn.Module, within: str) -> Iterator[str]:
    """Names the tensors that share memory and are not one tensor: files keep each by itself, and would part them."""
    first: dict[int, str] = {}
    later = shared_keys(module)
    for table in (module.named_parameters, module.named_buffers):
        for key, tensor in table(remove_duplicate=False):
            if tensor.numel() and not tensor.is_meta and key not in later:
                other = first.setdefault(_memory_of(tensor), key)
                if other != key:
                    yield (
                        f"{within}.{key} and {within}.{other} are views of one memory; make them one tensor (one "
                        "nn.Parameter at both names is a tie, and stays one), or give each its own by clone()"
                    )


def _find_aliases(module: nn.Module, within: str) -> Iterator[str]:
    """Names the attributes that hold a parameter or a buffer again: loading puts others in their places."""
    registered = {
        _memory_of(tensor): f"{within}.{key}"
        for table in (module.named_buffers, module.named_parameters)
        for key, tensor in table()
        if tensor.numel() and not tensor.is_meta
    }
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key in _OF_EVERY_MODULE or (key == "_flat_weights" and isinstance(part, nn.RNNBase)):  # torch keeps it
                continue
            held = next((registered[m] for t in _walk_tensors(value, set()) if (m := _memory_of(t)) in registered), "")
            if held:
                where = f"{within}.{name}.{key}".replace("..", ".")
                yield (
                    f"{where} holds the memory of {held} again, and would not follow it when the model is loaded or "
                    "moved; read that one in its place, register it (a nn.ParameterList, for a list), or keep a copy "
                    "(clone())"
                )


def _walk_tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yields the tensors in a value, however it is nested; modules are looked through by themselves."""
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if value.numel() and not value.is_meta:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _walk_tensors(each, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for each in value:
            yield from _walk_tensors(each, seen)
    elif not callable(value):
        for each in getattr(value, "__dict__", {}).values():
            yield from _walk_tensors(each, seen)


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
