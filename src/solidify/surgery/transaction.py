"""All or nothing for a model in memory: what user code, PEFT or an interrupt leaves half done is put back.

Remembered are: of every module its class (with what the class holds), attributes, children, parameters, buffers, hooks
and mode; configurations with all they contain; of every parameter its storage, attributes, hooks, `requires_grad` and
gradient; the values of buffers, and, where the model is small, those of parameters; whether gradients are computed.

What a change was not asked to change has the values that it had, or the change is refused (`outside.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from solidify.errors import SurgeryError
from solidify.model.extent import Extent
from solidify.surgery.outside import Outside
from solidify.upstream.torch import TENSOR_HOOKS, writes
from solidify.weights.format import same_bits

_CONTAINERS = (dict, list, set, OrderedDict)
_PLAIN = frozenset({bool, int, float, str, type(None)})


@contextmanager
def transaction(
    model: nn.Module, extent: Extent, changes: Collection[str] | None = None
) -> Iterator[dict[int, torch.Tensor]]:
    """Runs the block; when it is left by any exception, an interrupt too, the model is put back as it was, in place.

    The block is given the values of parameters that are kept for it, by the parameters' `id`. Of a bounded model,
    values that the block wrote into a parameter's own memory cannot be put back; a note on the exception names them
    then. `changes` names the modules and tensors that the block is to change (None: nothing is compared).

    Raises:
        SurgeryError: the block ended, well or by such an error, but a tensor outside `changes` is not what it was.
    """
    before = _Before(model, extent)
    outside = Outside(model, changes, before.list_values()) if changes is not None else None
    try:
        try:
            yield before.list_values()
        except SurgeryError:
            if outside is not None:  # what was written elsewhere is the cause of what was refused
                outside.refuse_changes()
            raise
        if outside is not None:
            outside.refuse_changes()
    except BaseException as error:
        written = outside.list_written() if outside is not None and not extent.whole else []
        lost = before.put_back(written)
        if lost:
            error.add_note(f"values were written in place, and the model must be loaded again: {', '.join(lost[:4])}")
        raise


class _Before:
    """A model as it was."""

    def __init__(self, model: nn.Module, extent: Extent) -> None:
        self._seen: dict[int, Any] = {}  # what was remembered, kept alive, by identity
        self._steps: list[tuple[Any, type, Any]] = []
        self._parameters: list[_Parameter] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._gradients = torch.is_grad_enabled()
        kinds = {kind for module in model.modules() for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
        self._classes = {kind: dict(vars(kind)) for kind in kinds}
        for module in model.modules():
            self._remember_object(module)
        for name, parameter in model.named_parameters():
            self._parameters.append(_Parameter(name, parameter, extent.whole))
        for buffer in model.buffers():
            self._buffers.append((buffer, buffer.data, buffer.detach().clone()))

    def _remember_object(self, value: Any) -> None:
        """Remembers an object's attributes, and the containers and configurations among them."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        self._steps.append((value, type(value), dict(vars(value))))
        self._remember_values(vars(value).values())

    def _remember_values(self, values: Iterable[Any]) -> None:
        for value in values:
            kind = type(value)
            if kind in _CONTAINERS:
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    self._steps.append((value, kind, value.copy()))
                    if value:  # most tables of hooks are empty
                        self._remember_values(value.values() if isinstance(value, dict) else value)
            elif kind not in _PLAIN and isinstance(value, (PreTrainedConfig, GenerationConfig)):
                self._remember_object(value)

    def list_values(self) -> dict[int, torch.Tensor]:
        """Returns the values of parameters and buffers that are kept, by the tensors' identity."""
        found = {id(p.parameter): p.values for p in self._parameters if p.values is not None}
        return found | {id(buffer): copy for buffer, _, copy in self._buffers}

    def put_back(self, written: Collection[str] = ()) -> list[str]:
        """Puts everything back; returns the names of parameters whose values could not be, `written` ones too."""
        for value, kind, content in self._steps:
            if isinstance(value, _CONTAINERS) and type(value) is kind:
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
            else:
                if type(value) is not kind:
                    value.__class__ = kind
                vars(value).clear()
                vars(value).update(content)
        torch.set_grad_enabled(self._gradients)
        for kind, attributes in self._classes.items():
            _put_back_class(kind, attributes)
        for buffer, data, copy in self._buffers:
            buffer.data = data
            if not buffer.is_meta and not same_bits(buffer, copy):
                buffer.data.copy_(copy)
        lost = [parameter.name for parameter in self._parameters if not parameter.put_back()]
        return list(dict.fromkeys([*lost, *written]))


class _Parameter:
    """A parameter as it was; with its values, if they are to be kept."""

    def __init__(self, name: str, parameter: nn.Parameter, with_values: bool) -> None:
        self.name = name
        self.parameter, self._data, self._version = parameter, parameter.data, writes(parameter)
        self._requires_grad, self._gradient = parameter.requires_grad, parameter.grad
        self._attributes = dict(vars(parameter))
        self._hooks = {key: _copy_hooks(getattr(parameter, key)) for key in TENSOR_HOOKS}
        self.values = parameter.detach().clone() if with_values and not parameter.is_meta else None

    def put_back(self) -> bool:
        """Returns whether all of it is as it was."""
        written = writes(self.parameter) != self._version and not self.parameter.is_meta
        self.parameter.data = self._data
        self.parameter.requires_grad_(self._requires_grad)
        self.parameter.grad = self._gradient
        vars(self.parameter).clear()
        vars(self.parameter).update(self._attributes)
        for key, hooks in self._hooks.items():
            now = getattr(self.parameter, key)
            if now is not None:
                now.clear()
                now.update(hooks or {})
        if self.values is None:
            return not written
        if not same_bits(self._data, self.values):
            self._data.copy_(self.values)
        return True


def _copy_hooks(hooks: Any) -> Any:
    return None if hooks is None else dict(hooks)


def _put_back_class(kind: type, attributes: dict[str, Any]) -> None:
    """Gives a class the attributes that it had: a patched forward is one of all models of the class."""
    for key in [key for key in vars(kind) if key not in attributes]:
        delattr(kind, key)
    for key, value in attributes.items():
        if vars(kind).get(key) is not value:
            setattr(kind, key, value)
