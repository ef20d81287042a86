"""What an object remembers from step to step: its own state_dict, or the plain attributes that it changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from solidify.weights.format import same_bits

_PLAIN = (bool, int, float, str, bytes, type(None), torch.Tensor)


@runtime_checkable
class Stateful(Protocol):
    """A loss term or a callback whose memory belongs to a checkpoint; every `nn.Module` is one."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what is remembered, as plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Takes it back."""


def memory(subject: Any) -> dict[str, Any]:
    """Returns an object's attributes that are plain values or tensors, or lists and dicts of such."""
    values = vars(subject) if hasattr(subject, "__dict__") else {}
    return {key: _copy_value(value) for key, value in values.items() if _is_plain(value)}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of `now` that are not those of `before`."""
    return {key: value for key, value in now.items() if key not in before or not _are_equal(before[key], value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN)


def _copy_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copy_value, value))
    return {key: _copy_value(each) for key, each in value.items()} if isinstance(value, dict) else value


def _are_equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return same_bits(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_are_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_are_equal(a[key], b[key]) for key in a)
    return bool(a == b)
