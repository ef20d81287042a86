"""Which module stands at a name, through whatever PEFT has put around it.

PEFT wraps modules and renames what is inside (`base_layer`, `original_module`, `modules_to_save.default`). Here every
module and parameter keeps the name that it had in the plain model, and each name leads to what is active now.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch._dynamo import OptimizedModule  # what torch.compile(module) returns; it has no public name in torch 2.13

from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.adapter.parameters import TrainedParameters


@dataclass(frozen=True)
class Standing:
    """A place in the plain model: its name, what is called there, and the module of the plain model's kind inside."""

    name: str
    called: nn.Module
    inner: nn.Module


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the model inside PEFT's and data-parallel wrappers."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif (inside := _inside(model)) is not None:
            model = inside
        else:
            return model


def peft_model(model: nn.Module) -> PeftModel | None:
    """Returns the PeftModel in or around which `model` stands, or None."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model if isinstance(model, PeftModel) else None


def _inside(model: nn.Module) -> nn.Module | None:
    """Returns what a wrapper of torch (data parallel, compiled) holds, or None for what is no such wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inside: nn.Module = model.module
        return inside
    return model._orig_mod if isinstance(model, OptimizedModule) else None


def modules(model: nn.Module) -> Iterator[Standing]:
    """Yields every place of the plain model with what is active there, without frozen originals and idle copies."""
    yield from _walk("", plain_model(model), set())


def at(model: nn.Module, name: str) -> Standing | None:
    """Returns what is active at one place of the plain model (also the second place of a shared module), or None."""
    called = plain_model(model)
    for part in name.split("."):
        child = unwrap(called)._modules.get(part)
        if child is None:
            return None
        called = child
    return Standing(name, called, unwrap(called))


def _walk(name: str, called: nn.Module, seen: set[int]) -> Iterator[Standing]:
    inner = unwrap(called)
    if id(inner) in seen or isinstance(inner, TrainedParameters):
        return
    seen.add(id(inner))
    yield Standing(name, called, inner)
    for child_name, child in inner.named_children():
        yield from _walk(f"{name}.{child_name}" if name else child_name, child, seen)


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the active module of the plain model's kind inside PEFT's wrappers around one place."""
    while True:
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapters[0]] if is_active(module) else module.original_module
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, TrainedParameters):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def is_active(wrapper: AuxiliaryTrainingWrapper) -> bool:
    """Returns whether the wrapper's trained part, and not the original, is what runs."""
    active = wrapper.active_adapters
    return not wrapper.disable_adapters and bool(active) and active[0] in wrapper._adapters


def trained_parameters(model: nn.Module) -> TrainedParameters | None:
    """Returns the holder of bare parameters that are trained in full, or None."""
    found = plain_model(model)._modules.get(PARAMETERS)
    return found if isinstance(found, TrainedParameters) else None


def named_parameters(model: PeftModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields for every parameter what it is, whose it is in the plain model, and itself.

    The first is `lora` (a part of a low-rank update; the name is the target's), `full` (a version that is or was
    trained; the name is the parameter's) or `base` (the plain model's own).
    """
    holder = trained_parameters(model)
    versions = {id(p) for p in holder.trained.parameters()} if holder is not None else set()
    for path, parameter in model.named_parameters():
        kind, name = _plain_name(model, path)
        if id(parameter) in versions:
            kind = "full"
        if name.startswith(PARAMETERS + "."):
            name = name.rpartition(".")[2].replace("/", ".")
        yield kind, name, parameter


def named_buffers(model: PeftModel) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields for every buffer what it is (`full` for a trained copy's, else `base`), whose it is, and itself."""
    for path, buffer in model.named_buffers():
        kind, name = _plain_name(model, path)
        yield kind, name, buffer


def canonical(model: PeftModel, path: str) -> str:
    """Returns the name in the plain model of a module that stands at `path` in the PeftModel."""
    return _plain_name(model, path)[1]


def _plain_name(model: PeftModel, path: str) -> tuple[str, str]:
    module: nn.Module = model
    parts = path.split(".")
    kind, name = "base", list[str]()
    while parts:
        part = parts.pop(0)
        if isinstance(module, BaseTunerLayer):
            if part != "base_layer":
                target = getattr(module, "parameter_name", None)
                return "lora", ".".join([*name, target] if target else name)
        elif isinstance(module, ModulesToSaveWrapper) and part == "modules_to_save":
            module = module.modules_to_save[parts.pop(0)]
            kind = "full"
            continue
        elif not (isinstance(module, AuxiliaryTrainingWrapper) and part == "original_module") and not (
            not name and part in ("base_model", "model") and _is_wrapping(module)
        ):
            name.append(part)
        if not parts:
            break
        module = module.get_submodule(part)
    return kind, ".".join(name)


def _is_wrapping(module: nn.Module) -> bool:
    """PeftModel holds `base_model` (the tuner), which holds `model` (the plain one)."""
    return isinstance(module, PeftModel) or type(module).__module__.startswith("peft.tuners")
