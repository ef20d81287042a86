"""Which tensors no weight file holds, and what to hold instead."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from solidify.upstream.torch import own_buffers, unsaved_buffers
from solidify.weights.format import DTYPES

_UNKEPT = "which weight files do not hold"


def say_first_unstorable(name: str, module: nn.Module, *, filled: bool) -> str | None:
    """Says which tensor of a module no weight file holds, the first of them; `name` is the module's.

    Of those that its state leaves out, sparse and nested ones: they could not be compared. A module that must be
    `filled` has no tensor without values (on the meta device).
    """
    unsaved = {id(own_buffers(part).get(key)) for part in module.modules() for key in unsaved_buffers(part)}
    held = [*module.named_parameters(prefix=name), *module.named_buffers(prefix=name)]
    empty = {key: "a tensor without values (on the meta device); fill it" for key, t in held if filled and t.is_meta}
    said = (
        (key, empty.get(key) or (say_layout(tensor) if id(tensor) in unsaved else say_unstorable(tensor)))
        for key, tensor in held
    )
    return next((f"{key} is {words}" for key, words in said if words), None)


def say_layout(tensor: torch.Tensor) -> str:
    """Says of a tensor that is nested or sparse what it is, and what to do; nothing of others."""
    if tensor.is_nested:
        return f"a nested tensor, {_UNKEPT}; keep its values and its offsets, and make it of them in forward"
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        return f"a sparse tensor ({layout}), {_UNKEPT}; keep its values and its indices, and make it of them in forward"
    return ""


def say_unstorable(tensor: torch.Tensor) -> str:
    """Says of a tensor that no weight file holds what it is, and what to do; nothing of others."""
    if is_lazy(tensor):
        return "a tensor without a shape yet (of a lazy layer); give its sizes"
    if strange := say_layout(tensor):
        return strange
    if tensor.is_quantized:
        return f"a quantised tensor ({tensor.dtype}), {_UNKEPT}; keep whole numbers and a scale, or dequantize() it"
    if tensor.dtype not in DTYPES.values():
        return f"a tensor of {tensor.dtype}, {_UNKEPT}; keep it in another dtype"
    return ""
