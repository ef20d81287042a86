"""What a pass through a model may move beside its outputs: random states, buffers, and attributes of its modules.

They are put back when a batch is run twice; what cannot be put back is refused by name.
"""

from __future__ import annotations

import random
import re
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy import random as numpy_random
from torch import nn

from solidify.artifact import tensors
from solidify.behaviour.calling import RandomStates, put_random_states, random_states
from solidify.errors import ObjectiveError, refuse
from solidify.upstream.torch import TABLES, own_buffers, writes
from solidify.weights.format import same_bits

FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_BITS = re.compile(r"torch\.u?int[1-7]")
_DEEPEST = 6  # objects in objects that are looked into


def name_moved(before: RandomStates, after: RandomStates) -> str:
    """Returns whose random numbers were drawn between two states; empty for none."""
    pairs = zip((before.cpu, *before.accelerators), (after.cpu, *after.accelerators), strict=False)
    if not all(torch.equal(a, b) for a, b in pairs):
        return "PyTorch"
    if before.python != after.python:
        return "Python"
    return "NumPy" if _tell_numpy(before) != _tell_numpy(after) else ""


def _tell_numpy(states: RandomStates) -> tuple[Any, ...]:
    """Returns NumPy's state in a form that can be compared."""
    assert states.numpy is not None  # its random numbers are imported here
    name, keys, *rest = states.numpy
    return name, keys.tobytes(), *rest


def accelerator() -> torch.device | None:
    """Returns the accelerator if there is one."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def describe_tensor(tensor: torch.Tensor) -> list[str]:
    """Returns plain values that tell two tensors apart: content, order in memory, and place."""
    whole = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return [tensors.digest(whole), str(tensor.stride()), str(tensor.device)]


def odd_kind(tensor: torch.Tensor) -> str:
    """Returns in words why the numbers of a tensor cannot be read as they stand in memory; empty where they can."""
    if tensor.is_meta:
        return "a tensor without numbers (on the meta device)"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "a sparse or nested tensor"
    if _BITS.fullmatch(str(tensor.dtype)):
        return f"a tensor of {tensor.dtype}, which PyTorch does not copy"
    return "a quantised tensor" if tensor.is_quantized else ""


class State:
    """Random states, and the buffers and attributes of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self._random = random_states()
        self._modules = [(name, module, _Held(module)) for name, module in model.named_modules()]
        self._looks = self._look()

    def put_back(self) -> None:
        """Makes them what they were, in place.

        Raises:
            ObjectiveError: something of them is of a kind that cannot be put back.
        """
        put_random_states(self._random)
        for _, _, held in self._modules:
            held.put_back()
        now = self._look()
        moved = [name for name in {**self._looks, **now} if self._looks.get(name) != now.get(name)]
        words = "cache_prefix: a pass through the model changes what cannot be put back before the second one"
        refuse(ObjectiveError, words, moved[:4])

    def _look(self) -> dict[str, Any]:
        """Returns what tells two states of every attribute apart."""
        found: dict[str, Any] = {}
        for name, module, _ in self._modules:
            for key, value in vars(module).items():
                if key not in TABLES:
                    found[f"{name}.{key}".lstrip(".")] = look(value)
            for key, value in own_buffers(module).items():
                found[f"{name}.{key}".lstrip(".")] = look(value)
            for key, parameter in module.named_parameters(recurse=False):
                place = odd_kind(parameter) or parameter.data_ptr()
                found[f"{name}.{key}".lstrip(".")] = id(parameter), writes(parameter), place
        return found


class _Held:
    """The buffers and attributes of one module: the objects, and the contents of those that can be changed."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = {key: value for key, value in vars(module).items() if key not in TABLES}
        self._buffers = dict(own_buffers(module))
        self._contents: dict[int, tuple[Any, Any]] = {}  # by identity, with the object
        for value in (*self._attributes.values(), *self._buffers.values()):
            self._hold(value)

    def _hold(self, value: Any) -> None:
        if id(value) in self._contents:
            return
        if isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter) and not odd_kind(value):
                self._contents[id(value)] = value, value.detach().clone()
        elif isinstance(value, (list, dict, set, tuple)):
            if not isinstance(value, tuple):
                self._contents[id(value)] = value, value.copy()
            for each in value.values() if isinstance(value, dict) else value:
                self._hold(each)

    def put_back(self) -> None:
        """Makes them what they were."""
        own = vars(self._module)
        for key in [key for key in own if key not in TABLES and key not in self._attributes]:
            del own[key]
        own.update(self._attributes)
        _refill(own_buffers(self._module), self._buffers)
        for value, content in self._contents.values():
            if isinstance(value, torch.Tensor):
                if value.shape == content.shape and not same_bits(value, content):
                    with torch.no_grad():
                        value.copy_(content)
            else:
                _refill(value, content)


def _refill(value: Any, content: Any) -> None:
    """Gives a list, mapping or set its content back."""
    if isinstance(value, list):
        if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
            value[:] = content
    elif isinstance(value, set):
        value.intersection_update(content)
        value.update(content)
    elif list(value) != list(content) or any(value[key] is not content[key] for key in content):
        value.clear()
        value.update(content)


def look(value: Any, depth: int = 0) -> Any:
    """Returns what tells two states of a value apart within one process: functions and modules by identity."""
    if isinstance(value, (bool, int, float, str, bytes, type(None))):
        return repr(value)
    if isinstance(value, torch.Tensor):
        if odd := odd_kind(value):
            return id(value), odd, writes(value)
        return id(value), value.data_ptr() if isinstance(value, nn.Parameter) else describe_tensor(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, numpy_random.Generator):
        return id(value), repr(value.bit_generator.state)
    if depth == _DEEPEST or isinstance(value, (type, nn.Module, *FUNCTIONS)):
        return id(value)
    if isinstance(value, Mapping):
        return id(value), [(repr(key), look(each, depth + 1)) for key, each in value.items()]
    if isinstance(value, (set, frozenset)):
        return id(value), sorted(repr(look(each, depth + 1)) for each in value)
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return id(value), [look(each, depth + 1) for each in value]
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return id(value), None
    return id(value), [(key, look(each, depth + 1)) for key, each in attributes.items()]
