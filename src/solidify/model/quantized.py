"""Weights that a library keeps quantised in memory: which they are, what they consist of, how many numbers they hold.

A packed weight is no tensor of numbers: bitsandbytes keeps two numbers of four bits in a byte and scales beside them,
torchao a tensor made of tensors. Its shape, its dtype and its digest say nothing about the weight that it was made of.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from solidify.errors import SurgeryError


def is_quantized(model: nn.Module) -> bool:
    """Returns whether transformers loaded or made the model quantised."""
    return getattr(model, "is_quantized", False) is True


def is_packed(tensor: torch.Tensor) -> bool:
    """Returns whether a parameter of a quantised model is packed: of a library's own class, or not of real numbers."""
    ours = type(tensor).__module__.split(".")[0] == "torch"
    return isinstance(tensor, nn.Parameter) and not (ours and (tensor.is_floating_point() or tensor.is_complex()))


def stands_for(module: nn.Module, kind: type) -> bool:
    """Returns whether a module is a linear layer (`kind`) in a library's quantised form."""
    held = any(is_packed(parameter) for parameter in module.parameters(recurse=False))
    return held and kind is (vars(module).get("source_cls") or (Conv1D if kind is Conv1D else nn.Linear))


def parts(module: nn.Module, key: str) -> dict[str, torch.Tensor]:
    """Returns all tensors that a packed parameter of a module consists of: the numbers, and the scales beside them."""
    parameter = getattr(module, key)
    if hasattr(type(parameter), "__tensor_flatten__"):
        return _flatten(key, parameter)
    beside = {name for name, _ in module.named_parameters(recurse=False)} - {key}
    beside |= {name for name, _ in module.named_buffers(recurse=False)}
    state: dict[str, Any] = module.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if name not in beside and isinstance(t, torch.Tensor)}


def _flatten(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return {name: tensor}
    found: dict[str, torch.Tensor] = {}
    inner, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]  # of tensors that are made of tensors
    for key in inner:
        found |= _flatten(f"{name}.{key}", getattr(tensor, key))
    return found


def numel(tensor: torch.Tensor) -> int:
    """Returns how many numbers a parameter stands for: of four bits, two are in a byte."""
    state = vars(tensor).get("quant_state")
    return math.prod(state.shape) if state is not None else tensor.numel()


def difference(model: nn.Module) -> int:
    """Returns by how many bytes the packed parameters of a quantised model are more than they say themselves.

    There are scales beside them, and a tensor that is made of tensors tells the size of what it stands for.
    """
    if not is_quantized(model):
        return 0
    found = 0
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if is_packed(parameter):
                held = parts(module, key)
                found -= parameter.nbytes
                found += sum(t.nbytes for name, t in held.items() if ".quant_state." not in name)  # a description
    return found


def refuse(model: nn.Module) -> None:
    """Refuses surgery on a quantised model.

    Raises:
        SurgeryError: it is one.
    """
    if is_quantized(model):
        method = getattr(model, "quantization_method", None)
        raise SurgeryError(
            f"the model is quantised ({getattr(method, 'value', method)}), and surgery keeps the base's weights bit "
            "for bit; change the unquantised model, build it, and load the artifact quantised: "
            "solidify.load(artifact, quantization=...)"
        )
