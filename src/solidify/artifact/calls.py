"""Calls of single modules, kept as tensors and plain values so that another process can repeat them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.model import anatomy, probing
from solidify.surgery import contract

Tensors = dict[str, torch.Tensor]


def record(model: PreTrainedModel, names: Sequence[str]) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
    """Runs a model until some modules were called, and returns what they were given and gave back.

    Returns the tensors that went in and those that came out, by keys, and for every module its `name` and how its
    `args` and `kwargs` are made of the tensors. A module that was given what cannot be kept (a cache, say), or was not
    called, or returned no tensor, is left out.
    """
    inputs: Tensors = {}
    outputs: Tensors = {}
    modules: list[dict[str, Any]] = []
    if not names:
        return inputs, outputs, modules
    found = contract.record(model, names, probing.few_inputs(model), partly=True)
    for name in [name for name in names if name in found]:
        taken: Tensors = {}
        try:
            args, kwargs = (_describe_value(part, f"{name}/", taken) for part in (found[name].args, found[name].kwargs))
        except TypeError:
            continue
        # Called again as the other process will call it: with inputs of their own, which are aligned.
        with torch.no_grad(), anatomy.evaluation(model):
            given = [_make_value(part, taken) for part in (args, kwargs)]
            returned = contract.tensors_in(model.get_submodule(name)(*given[0], **given[1]))
        if not returned:
            continue
        inputs |= taken
        outputs |= {f"{name}/{index}": tensor.cpu().contiguous() for index, tensor in enumerate(returned)}
        modules.append({"name": name, "args": args, "kwargs": kwargs})
    return inputs, outputs, modules


def _make_value(value: dict[str, Any], tensors: Tensors) -> Any:
    """Makes a value of its description."""
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "dict":
        return {key: _make_value(item, tensors) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = [_make_value(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def _describe_value(value: Any, prefix: str, taken: Tensors) -> Any:
    """Describes a value in plain words, its tensors by their keys in `taken`."""
    if isinstance(value, torch.Tensor):
        key = f"{prefix}{len(taken)}"
        taken[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, (tuple, list)):
        return {type(value).__name__: [_describe_value(item, prefix, taken) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": {key: _describe_value(item, prefix, taken) for key, item in value.items()}}
    raise TypeError(type(value).__name__)
