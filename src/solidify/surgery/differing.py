"""What differs between a model that was patched by hand and the one that its class makes of its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from solidify.model import anatomy
from solidify.surgery import values
from solidify.system import console
from solidify.upstream.torch import TENSOR_HOOKS, module_hooks, other_hooks, unsaved_buffers

_SHOWN = 6
# What defines methods of transformers' and torch's classes, by itself or by decorators.
_LIBRARIES = ("torch", "transformers", "huggingface_hub", "accelerate", "kernels", "functools", "contextlib", "typing")


@dataclass
class Change:
    """What was done to one module: whether it is another (`new`), and what was set on it."""

    new: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, FunctionType] = field(default_factory=dict)
    functions: dict[str, FunctionType] = field(default_factory=dict)
    hooks: list[tuple[str, FunctionType, bool]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.new or self.attributes or self.methods or self.functions or self.hooks)


@dataclass
class Differences:
    """Changes by the name of the outermost module, and what cannot be made again."""

    changes: dict[str, Change] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    resized: str = ""  # what became of the vocabulary
    reconfigured: list[str] = field(default_factory=list)  # the values of the configuration that are others
    stale: list[str] = field(default_factory=list)  # modules that do not follow them


def find(model: PreTrainedModel, plain: PreTrainedModel, original: PreTrainedModel) -> Differences:
    """Compares a patched model with what its class builds (`plain`), and its attributes with the base's."""
    found = Differences(resized=_resized(model, plain, original), reconfigured=values.changed_keys(model, original))
    expected = dict(plain.named_modules(remove_duplicate=False))
    loaded = dict(original.named_modules(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(change.new and name.startswith(f"{outer}.") for outer, change in found.changes.items()):
            found.faults += _inner_faults(name, module)
            continue
        if name not in expected:
            if not any(name.startswith(f"{fault}.") for fault in seen.values() if fault not in expected):
                found.faults.append(_describe_extra(name, module))
            seen[id(module)] = name
            continue
        change = _compare(name, module, expected[name], loaded.get(name), found)
        if change and id(module) in seen:
            found.faults.append(f"{name} is the very module that stands at {seen[id(module)]}: use solidify.share")
        elif change:
            found.changes[name] = change
        seen.setdefault(id(module), name)
    if found.resized:
        found.faults.append(found.resized)
    here = {name for name, _ in model.named_modules(remove_duplicate=False)}
    found.faults += _list_missing(here, expected, found)
    found.faults += _list_tensor_hooks(model, original)
    found.faults += _list_changed_buffers(model, plain, original, found)
    if found.stale:
        found.faults.append(
            f"{'; '.join(found.reconfigured[:_SHOWN])}, but {_join_names(found.stale)} are as the base has them, for a "
            "configuration is read when a model is made: load the base with that configuration and patch this, or set "
            "the configuration back"
        )
    return found


def _list_changed_buffers(
    model: PreTrainedModel, plain: PreTrainedModel, original: PreTrainedModel, found: Differences
) -> Iterator[str]:
    """Names buffers that no state holds (`persistent=False`), and that are not as the configuration makes them.

    The base's buffers say what that is; those of another configuration are made, for `plain` is on the meta device.
    """
    made: nn.Module = original
    if found.reconfigured:
        with init_empty_weights(include_buffers=False), console.silence():
            made = type(plain)(deepcopy(model.config))
    theirs = dict(made.named_modules(remove_duplicate=False))
    kept = dict(original.named_buffers(remove_duplicate=False)) if found.reconfigured else {}
    changed = list[str]()
    for name, module in model.named_modules(remove_duplicate=False):
        inside_new = any(change.new and f"{name}.".startswith(f"{outer}.") for outer, change in found.changes.items())
        if name not in theirs or inside_new:
            continue
        before = dict(theirs[name].named_buffers(recurse=False))
        for key, tensor in module.named_buffers(recurse=False):
            watched = key in unsaved_buffers(module) and key in before and not _moves_by_itself(module, key)
            if watched and not values.has_values(tensor, before[key]):
                where = f"{name}.{key}" if name else key
                stale = where in kept and values.has_values(tensor, kept[where])
                (found.stale if stale else changed).append(where)
    if changed:
        yield (
            f"{_join_names(changed)} have other values than the configuration makes, and no file of weights holds "
            "such buffers (persistent=False): change the configuration that they are computed from, or have a module "
            "of your own compute them"
        )


def _moves_by_itself(module: nn.Module, key: str) -> bool:
    """Returns whether a buffer is computed anew as the model runs: frequencies of positions that follow the length."""
    kinds = str(getattr(module, "rope_type", ""))
    return "original" not in key and any(kind in kinds for kind in ("dynamic", "longrope"))


def _list_tensor_hooks(model: nn.Module, original: nn.Module) -> Iterator[str]:
    """Names parameters and buffers that have hooks of their own, more than the base's have."""
    before = dict(values.tensors(original))
    hooked = [name for name, tensor in values.tensors(model) if _hooks(tensor) > _hooks(before.get(name))]
    if hooked:
        yield (
            f"{_join_names(hooked)} have hooks of their own (register_hook or register_post_accumulate_grad_hook), "
            "which no artifact carries: remove them, and register them where the artifact is trained; to hold a "
            "parameter still, set requires_grad to False"
        )


def _hooks(tensor: torch.Tensor | None) -> int:
    return sum(len(getattr(tensor, table, None) or ()) for table in TENSOR_HOOKS)


def _join_names(names: list[str]) -> str:
    """Writes names, alike ones of repeated layers as one."""
    folded = list(dict.fromkeys(anatomy.fold(names))) if len(names) > 1 else names
    return ", ".join(folded[:_SHOWN]) + (f" and {len(folded) - _SHOWN} more" if len(folded) > _SHOWN else "")


def _resized(model: PreTrainedModel, plain: PreTrainedModel, original: PreTrainedModel) -> str:
    """Says that the vocabulary was resized, embedding and configuration alike; "" where it was not."""
    rows, expected, before = (_count_rows(each) for each in (model, plain, original))
    if rows is None or before is None or rows != expected or rows == before or vars(model).get("vocab_size") != rows:
        return ""
    return (
        f"the vocabulary has {rows} rows, and {before} in the base (resize_token_embeddings): add tokens with "
        "solidify.add_tokens, or take what save_pretrained writes of the resized model as the base"
    )


def _count_rows(model: PreTrainedModel) -> int | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # as of a model without a vocabulary
        return None
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None


def _describe_extra(name: str, module: nn.Module) -> str:
    return (
        f"{name} ({type(module).__name__}) is a module that no class puts there: take it away, have a class of your "
        "own hold it, or use solidify.add"
    )


def _list_missing(here: set[str], expected: dict[str, nn.Module], found: Differences) -> Iterator[str]:
    gone = [n for n in expected if n not in here and n.rpartition(".")[0] in here]
    for name in gone:
        if not any(change.new and name.startswith(f"{outer}.") for outer, change in found.changes.items()):
            yield (
                f"{name} ({type(expected[name]).__name__}) is gone: use solidify.remove for layers, or set the "
                "configuration to what is left"
            )


def _compare(name: str, module: nn.Module, plain: nn.Module, loaded: nn.Module | None, found: Differences) -> Change:
    """Says what was done to a module that has a name of the base's."""
    change = Change()
    if added := values.added_tensors(module, plain):
        found.faults.append(
            f"{_join_names([f'{name}.{key}'.lstrip('.') for key in added])}: {type(plain).__name__} makes no such "
            "parameter or buffer; write a class of your own that does, and put that there"
        )
    elif (
        type(module) is not type(plain)
        or values.shapes(module) != values.shapes(plain)
        or not values.is_made_alike(module, plain)
    ):
        change.new = True
    if not change.new and loaded is not None and type(loaded) is type(module):
        _take_attributes(name, module, plain, loaded, change, found)
        if found.reconfigured and not isinstance(module, PreTrainedModel) and values.is_stale(module, plain, loaded):
            found.stale.append(name)
    for key, value in vars(module).items():
        if isinstance(value, (FunctionType, MethodType)) or (key == "forward" and callable(value)):
            _take_function(name, module, key, value, change, found)
    _take_patched_class(name, module, change, found)
    for register, hook, with_kwargs in module_hooks(module):
        if hasattr(hook, "solid_mask") or is_library(str(getattr(hook, "__module__", type(hook).__module__))):
            continue  # by which transformers records outputs, for one
        if fault := _function_fault(hook):
            found.faults.append(f"{name or 'the model'}: a hook {fault}")
        else:
            change.hooks.append((register, hook, with_kwargs))
    if other_hooks(module) > (other_hooks(loaded) if loaded is not None else 0):
        found.faults.append(f"{name or 'the model'} has hooks on gradients or its state, which no artifact carries")
    if change and not name:
        found.faults.append(
            "the model itself was changed (a method, attribute or hook of the outermost module): write a subclass of "
            f"{type(module).__name__}, or make the change in the module inside that needs it"
        )
        return Change()
    return change


def _take_attributes(
    name: str, module: nn.Module, plain: nn.Module, loaded: nn.Module, change: Change, found: Differences
) -> None:
    """Notes attributes that were set to other values than the base has, and than the configuration makes."""
    before, made = vars(loaded), vars(plain)
    for key, value in vars(module).items():
        known = values.is_value(value) or (key in before and values.is_plain(before[key]) and not callable(value))
        if (
            values.is_incidental(key)
            or not known
            or any(key in each and values.equals(each[key], value) for each in (before, made))
        ):
            continue
        if not name and key == "vocab_size" and found.resized:
            continue
        if values.is_plain(value) or values.is_mapping(value):
            change.attributes[key] = value
        else:
            found.faults.append(
                f"{name}.{key} is {values.describe_value(value)}, which config.json cannot hold: set a number, a text "
                "or a list (of a tensor, `.item()` or `.tolist()`), or have a module of your own make it"
            )


def _inner_faults(name: str, module: nn.Module) -> Iterator[str]:
    """Names what was done to modules within a new one: its class makes them without."""
    for key, value in vars(module).items():
        if isinstance(value, (FunctionType, MethodType)):
            yield f"{name}.{key} was set on an instance within a new module; put it into the module's class"


def _take_function(name: str, module: nn.Module, key: str, value: Any, change: Change, found: Differences) -> None:
    """Notes a function that was set on an instance, bound to it or not."""
    bound = isinstance(value, MethodType)
    if bound and value.__self__ is not module:
        whose = type(value.__self__).__name__
        found.faults.append(f"{name}.{key} is a method of another object ({whose}), which no artifact holds")
        return
    function = value.__func__ if bound else value
    if key not in dir(type(module)) and not bound and _belongs_to_libraries(function):
        return  # as transformers keeps an activation or a kernel, which the class sets again
    if bound and getattr(type(module), key, None) is function:
        return
    if fault := _function_fault(function):
        found.faults.append(f"{name}.{key} {fault}")
    else:
        (change.methods if bound else change.functions)[key] = function


def _take_patched_class(name: str, module: nn.Module, change: Change, found: Differences) -> None:
    """Notes methods that were set on a class of a library: a fresh process has the class as it was."""
    for cls in type(module).__mro__:
        if not is_library(cls.__module__):
            continue
        for key, value in vars(cls).items():
            function = inspect.unwrap(value) if callable(value) and isinstance(value, FunctionType) else None
            if not isinstance(function, FunctionType) or _belongs_to_libraries(function) or key in vars(module):
                continue
            if fault := _function_fault(function):
                found.faults.append(f"{cls.__name__}.{key} was set on the class, and {fault}")
            elif not change.new:
                change.methods[key] = function


def is_library(module: str) -> bool:
    """Returns whether a module is of torch, of transformers or of what they stand on, by its dotted name."""
    return module.split(".")[0] in _LIBRARIES


def _belongs_to_libraries(function: FunctionType) -> bool:
    """Returns whether a function comes from where a library's class does, and not from a script that set it there."""
    return function.__module__ is None or is_library(function.__module__)


def _function_fault(function: Any) -> str:
    """Says why a function cannot be imported where an artifact is loaded; "" if it can."""
    if not isinstance(function, FunctionType):
        return f"is a {type(function).__name__}, and only functions of a file can be carried: write one (`def`)"
    where = f"{Path(function.__code__.co_filename).name}, line {function.__code__.co_firstlineno}"
    if function.__name__ == "<lambda>":
        return f"is a lambda ({where}), which has no name to import it by: write a function (`def`) at module level"
    if function.__closure__:
        names = ", ".join(function.__code__.co_freevars)
        return (
            f"is a closure ({function.__qualname__}, {where}) over {names}, which no file holds: write a module whose "
            "class keeps these, and put it there"
        )
    if "<locals>" in function.__qualname__:
        return f"is defined inside a function ({function.__qualname__}, {where}): move it to module level"
    return ""


def noticed(model: PreTrainedModel, original: PreTrainedModel) -> list[str]:
    """Says what differs and is saved anyway: settings of the configuration, and values of the base's tensors."""
    words = values.changed_keys(model, original)[:_SHOWN]
    state = original.state_dict()
    moved = [
        name
        for name, tensor in model.state_dict().items()
        if name in state and tensor.shape == state[name].shape and not torch.equal(tensor.cpu(), state[name].cpu())
    ]
    if moved:
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        words.append(f"{len(moved)} tensors of the base have other values ({', '.join(moved[:3])}{more})")
    return words
