"""The values that a patched model, its base and what its class builds are compared by: settings, attributes, shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.system import files

_NOT_OF_OUTPUTS = ("padding_idx",)  # set along with config.pad_token_id, as tokenizers ask for: gradients alone see it
_PLAIN = (bool, int, float, str, type(None))


def changed_keys(model: PreTrainedModel, original: PreTrainedModel) -> list[str]:
    """Says which values of the configuration are others than the base's."""
    mine, theirs = (files.flatten(each.config.to_dict()) for each in (model, original))
    keys = [key for key in sorted({**theirs, **mine}) if mine.get(key) != theirs.get(key) and not is_incidental(key)]
    return [f"config.{key} is {mine.get(key)!r}, and {theirs.get(key)!r} in the base" for key in keys]


def tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields parameters and buffers by name, shared ones under each name."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a module's own parameters and buffers."""
    return {key: tuple(tensor.shape) for key, tensor in tensors(module, recurse=False)}


def outline(module: nn.Module) -> list[tuple[str, type, dict[str, tuple[int, ...]]]]:
    """Returns the names, classes and shapes of a module and of all inside it."""
    return [(name, type(each), shapes(each)) for name, each in module.named_modules()]


def added_tensors(module: nn.Module, plain: nn.Module) -> list[str]:
    """Returns parameters and buffers that were set on a module whose class is not even asked for them."""
    mine, theirs = shapes(module), shapes(plain)
    asked = inspect.signature(type(module).__init__).parameters
    if type(module) is not type(plain) or any(mine.get(key) != shape for key, shape in theirs.items()):
        return []
    added = [key for key in mine if key not in theirs]
    return [] if any(key in asked for key in added) else added


def is_made_alike(module: nn.Module, plain: nn.Module) -> bool:
    """Returns whether a module presents itself as another does, once that has its plain attributes."""
    if module.extra_repr() == plain.extra_repr():
        return True
    alike = copy(plain)
    vars(alike).update({key: value for key, value in vars(module).items() if is_plain(value)})
    return module.extra_repr() == alike.extra_repr()


def is_stale(module: nn.Module, plain: nn.Module, loaded: nn.Module) -> bool:
    """Returns whether a module is still as the base's, and not as the changed configuration makes it."""
    made, before = vars(plain), vars(loaded)
    kept = [key for key, value in vars(module).items() if is_plain(value) and not is_incidental(key)]
    kept = [key for key in kept if key not in _NOT_OF_OUTPUTS]
    stale = [k for k in kept if k in made and k in before and before[k] == vars(module)[k] != made[k]]
    return bool(stale) and outline(module) == outline(loaded)


def is_incidental(key: str) -> bool:
    """Returns whether an attribute is one that loading, training and transformers set."""
    return key.startswith("_") or key in ("training", "name_or_path", "warnings_issued", "gradient_checkpointing")


def is_plain(value: Any) -> bool:
    """Returns whether a value is a number, a text, None, or a list of such."""
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(is_plain(each) for each in value))


def is_value(value: Any) -> bool:
    """Returns whether an attribute is a value, which can be compared, and no part of how a model runs."""
    kinds = (torch.Tensor, torch.dtype, np.ndarray, np.generic, dict, set, frozenset, complex, bytes)
    return is_plain(value) or isinstance(value, (*kinds, tuple, list))


def is_mapping(value: Any) -> bool:
    """Returns whether a value is a mapping from texts to plain values."""
    return isinstance(value, dict) and all(
        isinstance(key, str) and (is_plain(each) or is_mapping(each)) for key, each in value.items()
    )


def equals(one: Any, other: Any) -> bool:
    """Returns whether two values are the same, of one type; what cannot be compared is not."""
    if type(one) is not type(other):
        return bool(is_plain(one) and is_plain(other) and one == other)
    if isinstance(one, torch.Tensor):
        return one.is_meta or other.is_meta or has_values(one, other)
    try:
        return bool(np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other)
    except (TypeError, ValueError, RuntimeError):  # as of a list of tensors
        return True


def has_values(tensor: torch.Tensor, made: torch.Tensor) -> bool:
    """Returns whether a tensor has the values of another, cast as a model is cast as a whole."""
    if tensor.is_meta or made.is_meta:
        return True
    mine, other = tensor.cpu(), made.cpu()
    same = torch.equal(mine, other.to(mine.dtype)) or torch.equal(mine.to(other.dtype), other)
    return tensor.shape == made.shape and same


def describe_value(value: Any) -> str:
    """Says what a value is, without its content."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
