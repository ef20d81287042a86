"""Which module stands at a name, through whatever PEFT has put around it.

PEFT wraps modules and renames what is inside (`base_layer`, `original_module`, `modules_to_save.default`). Here every
module and parameter keeps the name that it had in the plain model, and each name leads to what is active now.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter.buffers import NAME as BUFFERS
from solidify.adapter.buffers import TrainedBuffers
from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.adapter.parameters import TrainedParameters
from solidify.model.operations import list_marks
from solidify.upstream.peft import layer_adapters, wrapped_adapters
from solidify.upstream.torch import inside_compiled, own_modules, own_parameters

_Tensor = TypeVar("_Tensor", bound=torch.Tensor)
HOLDERS = (TrainedParameters, TrainedBuffers)  # children of the plain model that are no part of it


@dataclass(frozen=True)
class Located:
    """A module name of the plain model, what is called there, and the module of the plain model's kind inside."""

    name: str
    called: nn.Module
    inner: nn.Module


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the model inside PEFT's and data-parallel wrappers."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif (inside := _find_wrapped(model)) is not None:
            model = inside
        else:
            return model


def peft_model(model: nn.Module) -> PeftModel | None:
    """Returns the PeftModel in or around which `model` stands, or None."""
    while (inside := _find_wrapped(model)) is not None:
        model = inside
    return model if isinstance(model, PeftModel) else None


def _find_wrapped(model: nn.Module) -> nn.Module | None:
    """Returns what a wrapper of torch (data parallel, compiled) holds, or None for what is no such wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inside: nn.Module = model.module
        return inside
    return inside_compiled(model)


def modules(model: nn.Module) -> Iterator[Located]:
    """Yields each module name of the plain model with what is active there; no frozen originals, no idle copies."""
    yield from _walk_modules("", plain_model(model), set())


def at(model: nn.Module, name: str) -> Located | None:
    """Returns what is active under one module name of the plain model (also a shared module's second), or None."""
    called = plain_model(model)
    for part in name.split(".") if name else ():
        child = own_modules(unwrap(called)).get(part)
        if child is None:
            return None
        called = child
    return Located(name, called, unwrap(called))


def find_inner(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the active module of the plain model's kind under one of its module names, or None."""
    located = at(model, name)
    return None if located is None else located.inner


def _walk_modules(name: str, called: nn.Module, seen: set[int]) -> Iterator[Located]:
    inner = unwrap(called)
    if id(inner) in seen or isinstance(inner, HOLDERS):
        return
    seen.add(id(inner))
    yield Located(name, called, inner)
    for child_name, child in inner.named_children():
        yield from _walk_modules(f"{name}.{child_name}" if name else child_name, child, seen)


def unwrap(module: nn.Module) -> nn.Module:
    """Returns the active module of the plain model's kind inside PEFT's wrappers around one module."""
    while True:
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[module.active_adapters[0]] if is_active(module) else module.original_module
        elif isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, HOLDERS):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def is_active(wrapper: AuxiliaryTrainingWrapper) -> bool:
    """Returns whether the wrapper's trained part, and not the original, is what runs."""
    active = wrapper.active_adapters
    return not wrapper.disable_adapters and bool(active) and active[0] in wrapped_adapters(wrapper)


def trained_parameters(model: nn.Module) -> TrainedParameters | None:
    """Returns the holder of bare parameters that are trained in full, or None."""
    found = own_modules(plain_model(model)).get(PARAMETERS)
    return found if isinstance(found, TrainedParameters) else None


def trained_buffers(model: nn.Module) -> TrainedBuffers | None:
    """Returns the holder of the adapters' own versions of buffers, or None."""
    found = own_modules(plain_model(model)).get(BUFFERS)
    return found if isinstance(found, TrainedBuffers) else None


def mark_copies(model: nn.Module, adapter: str) -> None:
    """Sets on an adapter's trained copies of parameters what is set on the originals: PEFT copies values alone."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            copies: dict[str, torch.Tensor] = dict(
                module.modules_to_save[adapter].named_parameters(remove_duplicate=False)
            )
            for key, parameter in module.original_module.named_parameters(remove_duplicate=False):
                if key in copies:
                    vars(copies[key]).update(list_marks(parameter))


def owner(model: nn.Module, name: str) -> nn.Module:
    """Returns the plain model's own module of a name, whatever adapter is active.

    Raises:
        KeyError: it has none of that name.
    """
    module = original(plain_model(model))
    for part in name.split(".") if name else ():
        child = own_modules(module)[part]
        if child is None:
            raise KeyError(name)
        module = original(child)
    return module


def original(module: nn.Module) -> nn.Module:
    """Returns the plain model's own module inside PEFT's wrappers around one module."""
    while True:
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, HOLDERS):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            return module


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the plain model's own modules with their names (a shared one under its first), whatever is active."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yields a module and all within it, PEFT's wrappers left out."""
        module = original(module)
        if id(module) in seen or isinstance(module, HOLDERS):
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", plain_model(model))


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters that stand in the plain model's own modules, with their names there."""
    for name, module in owners(model):
        for key, parameter in own_parameters(module).items():
            if parameter is not None:
                yield f"{name}.{key}" if name else key, parameter


def path_alone(model: nn.Module, name: str, adapter: str) -> str:
    """Returns where PEFT's tree has a module of the plain model when one adapter stands on it alone."""
    path = ["base_model", "model"]
    module: Any = plain_model(model)
    for part in name.split(".") if name else ():
        module = own_modules(original(module))[part]
        path.append(part)
        inside: Any = module
        while isinstance(inside, BaseTunerLayer):
            if adapter in layer_adapters(inside):
                path.append("base_layer")
            inside = inside.base_layer
    return ".".join(path)


def full_modules(model: PeftModel, adapter: str) -> set[str]:
    """Names the modules of which an adapter trains a copy."""
    return {
        canonical(model, path)
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def versions(model: nn.Module) -> set[int]:
    """Returns the identities of tensors that are some adapter's versions of single parameters or buffers."""
    held, buffers = trained_parameters(model), trained_buffers(model)
    found = {id(p) for p in held.trained.parameters()} if held is not None else set()
    return found | (buffers.identities() if buffers is not None else set())


def set_aside(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the plain model's own parameters and persistent buffers that adapters have versions of, by name."""
    held, buffers = trained_parameters(model), trained_buffers(model)
    found: dict[str, torch.Tensor] = dict(held.own()) if held is not None else {}
    return found | (buffers.versions(None) if buffers is not None else {})


def ties(model: nn.Module) -> dict[str, set[str]]:
    """Maps the names of tensors that the plain model ties to the names of the others of their group."""
    plain = plain_model(model)
    pairs = plain.all_tied_weights_keys.items() if isinstance(plain, PreTrainedModel) else ()
    groups: dict[str, set[str]] = {}
    for name, other in pairs:
        group = groups.get(name, {name}) | groups.get(other, {other})
        for member in group:
            groups[member] = group
    return {name: group - {name} for name, group in groups.items()}


def named_parameters(model: PeftModel) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields for every parameter what it is, whose it is in the plain model, and itself.

    The first is `lora` (a part of a low-rank update; the name is the target's), `tokens` (rows of a module of that
    name), `full` (a version that is or was trained; the name is the parameter's) or `base` (the plain model's own).
    """
    holder = trained_parameters(model)
    versions = {id(p) for p in holder.trained.parameters()} if holder is not None else set()
    yield from _name_tensors(model, model.named_parameters(), versions, PARAMETERS)


def named_buffers(model: PeftModel) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields for every buffer what it is (`full`: an adapter's own version, or `base`), whose it is, and itself.

    Of trained rows (`tokens`) those are buffers that they started from.
    """
    holder = trained_buffers(model)
    versions = holder.identities() if holder is not None else set()
    yield from _name_tensors(model, model.named_buffers(), versions, BUFFERS)


def _name_tensors(
    model: PeftModel, tensors: Iterable[tuple[str, _Tensor]], versions: Collection[int], holder: str
) -> Iterator[tuple[str, str, _Tensor]]:
    for path, tensor in tensors:
        kind, name = _plain_name(model, path)
        if id(tensor) in versions:
            kind = "full"
        if name.startswith(holder + "."):
            name = name.rpartition(".")[2].replace("/", ".")
        yield kind, name, tensor


def canonical(model: PeftModel, path: str) -> str:
    """Returns the name in the plain model of a module that stands at `path` in the PeftModel."""
    return _plain_name(model, path)[1]


def named(model: PeftModel, path: str) -> tuple[str, str]:
    """Returns what stands at a path in the PeftModel (as `named_parameters`), and whose it is in the plain model."""
    return _plain_name(model, path)


def _plain_name(model: PeftModel, path: str) -> tuple[str, str]:
    module: nn.Module = model
    parts = path.split(".")
    kind, name = "base", list[str]()
    while parts:
        part = parts.pop(0)
        if isinstance(module, TrainableTokensLayer) and part != "base_layer":
            return "tokens", ".".join(name)
        if isinstance(module, BaseTunerLayer):
            if part != "base_layer":
                target = getattr(module, "parameter_name", None)
                return "lora", ".".join([*name, target] if target else name)
        elif isinstance(module, ModulesToSaveWrapper) and part == "modules_to_save":
            module = module.modules_to_save[parts.pop(0)]
            kind = "full"
            continue
        elif isinstance(module, TrainableTokensWrapper) and part == "token_adapter":
            pass
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
    return isinstance(module, (PeftModel, BaseTuner))


@contextmanager
def trainable_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what was trainable: PEFT's switches change what is active, and make all of it trainable or frozen."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
