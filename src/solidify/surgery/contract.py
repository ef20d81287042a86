"""Can B stand where A stood? Shown by a probe of the single module: same inputs, same structure, shape and dtype.

The original's real calls are recorded during one forward pass of the model, before a new module is built; the
replacement is then called with them. How the whole model behaves is in `behaviour/`. Nothing is changed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from solidify.model import anatomy
from solidify.system import foreign
from solidify.upstream.torch import own_buffers


@dataclass(frozen=True)
class Call:
    """One recorded call of a module: what it was given, and what it gave back.

    `habits` says of the original, where it was tried (else it is empty), whether a gradient reaches what it is given
    (`gradient`), whether it leaves that as it is (`inputs`) and whether it works in bfloat16 (`half_precision`).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    habits: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _EnoughError(Exception):
    """Ends a forward pass of which the rest is of no interest."""


def record(
    model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, torch.Tensor], *, partly: bool = False
) -> dict[str, Call]:
    """Runs the model on `inputs` and returns the first call of each named module; what is never called is missing.

    With `partly`, the model is left as soon as all of them were called.
    """
    with recording(model, names, partly=partly) as calls, suppress(_EnoughError):
        anatomy.run(model, inputs)
    return calls


@contextmanager
def recording(model: PreTrainedModel, names: Sequence[str], *, partly: bool = False) -> Iterator[dict[str, Call]]:
    """While the block lasts, notes the first call of each named module. `partly`: ends the pass with the last one."""
    given: dict[str, tuple[Any, Any]] = {}
    calls: dict[str, Call] = {}

    def before(name: str) -> Any:
        """Makes a hook that copies what the module is given."""

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            """Copies what the first call gives."""
            if name not in given:
                given[name] = (copied(args), copied(kwargs))

        return keep

    def after(name: str) -> Any:
        """Makes a hook that copies what the module gives back."""

        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            """Copies what the first call returns."""
            if name not in calls:
                whole = _is_untouched(given[name][0], _args)
                calls[name] = Call(*given[name], copied(output), {"inputs": whole})
            if partly and len(calls) == len(names):
                raise _EnoughError

        return keep

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def copied(value: Any) -> Any:
    """Copies the tensors in nested arguments or outputs, whatever they are nested in: a caller may write into them."""
    return _map_tensors(value, torch.Tensor.clone)


def widened(value: Any) -> Any:
    """Copies nested arguments with tensors of half precision in float32."""
    return _map_tensors(value, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Rebuilds nested arguments or outputs with every tensor changed; a cache is only copied."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Cache):
        return deepcopy(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{key: _map_tensors(item, change) for key, item in value.items()})
    if isinstance(value, dict):
        result: Any = copy(value)
        result.update({key: _map_tensors(item, change) for key, item in value.items()})
        return result
    if isinstance(value, tuple):
        items = [_map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is list:
        return [_map_tensors(item, change) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy(value)
        for key, item in vars(value).items():
            object.__setattr__(result, key, _map_tensors(item, change))
        return result
    return value


def with_habits(module: nn.Module, call: Call) -> Call:
    """Adds to a call of an original what the module does beside it: see `Call.habits`."""
    return dataclasses.replace(call, habits={**call.habits, **_find_habits(module, call)})


def compare(name: str, replacement: nn.Module, call: Call, *, weights: bool = True) -> tuple[list[str], bool]:
    """Calls the replacement with what the original was given; without `weights`, it may return None in their place.

    Returns:
        The faults (none when structure, shapes and dtypes agree), and whether the output is bit-identical.
    """
    args, kwargs = copied(call.args), copied(call.kwargs)
    with torch.no_grad(), _buffers_kept(replacement), anatomy.evaluation(replacement), anatomy.caches_off(replacement):
        outcome = foreign.attempt(replacement, *args, **kwargs)
    if outcome.error is not None:
        given = ", ".join([_describe_value(a) for a in call.args] + list(call.kwargs))
        return [
            f"{name}: {type(replacement).__name__} fails on what the original takes ({given}): "
            f"{foreign.said(outcome.error)}"
        ], False
    wanted = call.output if weights else _without_weights(call.output, outcome.value)
    old, new = _describe_value(wanted), _describe_value(outcome.value)
    if old != new:
        return [
            f"{name}: the original returns {old}, but {type(replacement).__name__} returns {new}; "
            "return the same structure, shapes and dtypes"
        ], False
    if call.habits.get("inputs", False) and not _is_untouched((call.args, call.kwargs), (args, kwargs)):
        return [f"{name}: {type(replacement).__name__}: {_BROKEN['inputs']}"], False
    return [], are_equal(call.output, outcome.value)


def _without_weights(output: Any, found: Any) -> Any:
    """Returns what an attention returned without its weights, where another module returns None in their place."""
    pairs = isinstance(output, tuple) and isinstance(found, tuple) and len(output) == len(found) > 1
    return (output[0], None, *output[2:]) if pairs and found[1] is None else output


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Puts buffers back: what a module counts of calls that were only made to try it does not belong in it."""
    tables = [(own_buffers(inner), dict(own_buffers(inner))) for inner in module.modules()]
    values = [(b, b.detach().clone()) for _, before in tables for b in before.values() if b is not None]
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)
        for buffer, value in values:
            if not buffer.is_meta and not _are_same(buffer, value):
                buffer.data = value


_STATES = ("key_value_states", "encoder_hidden_states")  # what a module is given of an encoder, by transformers' names
_NUDGE = 1e-2  # of the mean size: seen in half precision too, and small beside what makes a router choose otherwise
_ALONE = {"gradient", "half_precision"}  # habits that are tried by further calls

_BROKEN = {
    "gradient": "no gradient reaches what it is given, so nothing below it could be trained; do not detach it, nor "
    "write in place into what a gradient needs",
    "inputs": "it writes into what it is given, which others read too; work on a copy",
    "half_precision": "in bfloat16 it does not return finite bfloat16, as the original does; give what it makes the "
    "dtype of what it is given",
}


def lost_habits(name: str, replacement: nn.Module, call: Call) -> dict[str, str]:
    """Returns what the original does (see `Call.habits`) and the replacement does not: a sentence by property."""
    if not _ALONE & set(call.habits):
        return {}
    found = _find_habits(replacement, call)
    lost = [key for key, kept in call.habits.items() if key in _ALONE and not _is_covering(found.get(key, False), kept)]
    if "gradient" in lost and not _is_cut_off(replacement, call, found["gradient"]):
        lost.remove("gradient")
    return {key: f"{name}: {type(replacement).__name__}: {_BROKEN[key]}" for key in lost}


def _is_cut_off(module: nn.Module, call: Call, reached: torch.Tensor | bool) -> bool:
    """Returns whether the module reads what no gradient reaches: a clamp at its bound, or a token that is left out by
    a router, has none either, but there a small change of what is given changes nothing."""
    wanted = call.habits["gradient"]
    if not isinstance(reached, torch.Tensor) or not bool(reached.any()) or not isinstance(wanted, torch.Tensor):
        return True
    missing = wanted & ~reached
    outputs = []
    with _buffers_kept(module), anatomy.evaluation(module), anatomy.caches_off(module), torch.no_grad():
        for size in (0.0, _NUDGE):
            args, kwargs = copied(call.args), copied(call.kwargs)
            begin = 0
            for source in _find_sources(args, kwargs):
                positions = source.shape[:-1].numel()
                here = missing[begin : begin + positions].view(*source.shape[:-1], 1).to(source.device)
                source.add_(size * source.abs().mean() * here)
                begin += positions
            outputs.append(foreign.attempt(module, *args, **kwargs))
    plain, nudged = outputs
    return plain.failed or nudged.failed or not are_equal(plain.value, nudged.value)


def _is_covering(found: Any, wanted: Any) -> bool:
    """Returns whether all that is wanted was found: a yes, or a yes at every position."""
    if isinstance(wanted, torch.Tensor):
        return isinstance(found, torch.Tensor) and bool((found | ~wanted).all())
    return not wanted or (bool(found.any()) if isinstance(found, torch.Tensor) else bool(found))


def _find_habits(module: nn.Module, call: Call) -> dict[str, Any]:
    with _buffers_kept(module), anatomy.evaluation(module), anatomy.caches_off(module):
        found = {"gradient": _lets_gradient_through(module, call)}
        if anatomy.main_dtype(module) in (torch.float32, None) and _find_floating(call.args, call.kwargs):
            found["half_precision"] = _works_in_half(module, call)
    return found


def _is_untouched(before: Any, after: Any) -> bool:
    """Returns whether the tensors in nested arguments still have the values that they had."""
    return all(_are_same(a, b) for a, b in zip(tensors_in(before), tensors_in(after), strict=True))


def _lets_gradient_through(module: nn.Module, call: Call) -> torch.Tensor | bool:
    """Returns where (along all axes but the last) the first floating argument gets a gradient that is not zero."""
    args, kwargs = copied(call.args), copied(call.kwargs)
    sources = _find_sources(args, kwargs)
    if not sources:
        return False
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            leaves = [t.requires_grad_(True) for t in sources]
            outcome = foreign.attempt(module, *args, **kwargs)
            first = next((t for t in tensors_in(outcome.value) if t.is_floating_point()), None)
            if first is None or not first.requires_grad:
                return False
            weights = torch.linspace(0.5, 1.5, first.numel(), device=first.device).view(first.shape).to(first.dtype)
            total = (first * weights).sum()
            passed = foreign.attempt(torch.autograd.grad, total, leaves, allow_unused=True)
            if passed.value is None:  # it failed: something that a gradient needs was written to in place
                return False
            found, *more = passed.value
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if found is None:
        return False
    seen = [found, *(torch.zeros_like(t) if g is None else g for t, g in zip(sources[1:], more, strict=True))]
    return torch.cat([(g != 0).any(-1).flatten() for g in seen])


def _find_sources(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns what a gradient should reach: the first floating argument, and the states of an encoder."""
    found = _find_floating(args, kwargs)
    others = [t for key, t in kwargs.items() if key in _STATES and isinstance(t, torch.Tensor) and t is not found[0]]
    return [*found[:1], *others]


def _works_in_half(module: nn.Module, call: Call) -> bool:
    """Tries a copy of the module in bfloat16; what it made itself may also stay as it is, if it is stated so."""
    args, kwargs = (_map_tensors(part, _cast_half) for part in (call.args, call.kwargs))
    configs = {id(v): v for m in module.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)}
    for cast in (_all_of_it, _first_children):
        twin = foreign.attempt(deepcopy, module, {key: copy(config) for key, config in configs.items()})
        if twin.value is None:
            return False
        with torch.no_grad():
            outcome = foreign.attempt(cast(twin.value), *copied(args), **copied(kwargs))
        found, kept = tensors_in(outcome.value), tensors_in(_without_weights(call.output, outcome.value))
        wanted = [torch.bfloat16 if t.is_floating_point() else t.dtype for t in kept]
        if not outcome.failed and [t.dtype for t in found] == wanted:
            return all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())
    return False


def _all_of_it(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16)


def _first_children(module: nn.Module) -> nn.Module:
    """Casts what has a dtype by default, as far as that can be told: the modules in it that are whole blocks."""
    for child in module.children():
        if any(True for _ in child.children()):
            child.to(torch.bfloat16)
    return module


def _cast_half(tensor: torch.Tensor) -> torch.Tensor:
    """Casts to bfloat16; the lowest float32, which masks hold, becomes the lowest there is, and no infinity."""
    if not tensor.is_floating_point():
        return tensor.clone()
    half, limits = tensor.to(torch.bfloat16), torch.finfo(torch.bfloat16)
    return half.where(half.isfinite() | ~tensor.isfinite(), half.clamp(limits.min, limits.max))


def _find_floating(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
    return [tensor for tensor in found if tensor.is_floating_point()]


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_describe_value(v) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return "None" if value is None else type(value).__name__


def are_equal(a: Any, b: Any) -> bool:
    """Returns whether all tensors in two nested values of one structure are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return _are_same(a, b)
    if isinstance(a, Mapping):
        return all(are_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return all(are_equal(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(are_equal(item, getattr(b, key, None)) for key, item in vars(a).items())
    return True


def _are_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether two tensors are equal; a number that is none (where a row is padding) is itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all()))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in a nested value, in order."""
    return list(_tensors_in(value))


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for item in vars(value).values():
            yield from _tensors_in(item)


def constructor(module_class: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a module's constructor by name, without `self`."""
    return _read_constructor(module_class)  # type: ignore[arg-type]  # torch types a module's hash by hand


@lru_cache(maxsize=16)
def _read_constructor(module_class: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    parameters = list(inspect.signature(module_class.__init__).parameters.values())[1:]
    return MappingProxyType({parameter.name: parameter for parameter in parameters})
