"""Can B stand where A stood? Shown by a probe: same inputs, same structure, shape and dtype, no look ahead.

The original module's real calls are recorded during one forward pass of the model; the replacement is then called
with them. Nothing is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from solidify.model import anatomy

# Sequence inputs by which look-ahead is tested, with the stream that they feed.
_STREAMS = ("input_ids", "decoder_input_ids")

# What calling a foreign module with recorded arguments may raise.
CALL_ERRORS = (
    TypeError,
    ValueError,
    RuntimeError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Call:
    """One recorded call of a module: what it was given, and what it gave back."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Probe:
    """What one forward pass of the untouched model showed.

    `calls` holds the first call of every module asked for (modules that were never called are missing), `causal` the
    (batch_size, sequence_length) of the streams in which no position sees a later one.
    """

    calls: dict[str, Call]
    causal: tuple[tuple[int, int], ...]


class _EnoughError(Exception):
    """Ends a forward pass of which the rest is of no interest."""


def record(
    model: PreTrainedModel, names: Sequence[str], inputs: Mapping[str, torch.Tensor], *, partly: bool = False
) -> Probe:
    """Runs the model on `inputs` and returns what each named module was given and gave back.

    With `partly`, the model is left as soon as all of them were called. Which streams are causal is not known then, and
    all are taken to be; the original module is the control.
    """
    given: dict[str, tuple[Any, Any]] = {}
    calls: dict[str, Call] = {}

    def before(name: str) -> Any:
        """Makes a hook that copies what the module is given."""

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.setdefault(name, (_copy(args), _copy(kwargs)))

        return keep

    def after(name: str) -> Any:
        """Makes a hook that copies what the module gives back."""

        def keep(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            calls.setdefault(name, Call(*given[name], _copy(output)))
            if partly and len(calls) == len(names):
                raise _EnoughError

        return keep

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        logits = anatomy.run(model, inputs)
    except _EnoughError:
        return Probe(calls, tuple((len(inputs[k]), inputs[k].shape[1]) for k in _STREAMS if k in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return Probe(calls, _causal_streams(model, inputs, logits))


def _copy(value: Any) -> Any:
    """Copies the tensors in nested arguments, because a model may go on to change them in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copy(item) for item in value)
    return deepcopy(value) if isinstance(value, Cache) else value


def _causal_streams(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], logits: torch.Tensor
) -> tuple[tuple[int, int], ...]:
    """Changes the last token of each stream and looks whether any earlier position of the output moves."""
    streams = []
    for key in _STREAMS:
        if key not in inputs:
            continue
        tokens = inputs[key]
        if logits.ndim != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape):
            continue
        changed = tokens.clone()
        changed[:, -1] = torch.where(tokens[:, -1] > 3, tokens[:, -1] - 1, tokens[:, -1] + 1)
        moved = anatomy.run(model, {**inputs, key: changed})
        if _distance(moved[:, :-1], logits[:, :-1]) <= _rounding(logits):
            streams.append((int(tokens.shape[0]), int(tokens.shape[1])))
    return tuple(streams)


def compare(name: str, replacement: nn.Module, call: Call) -> tuple[list[str], bool]:
    """Calls the replacement with what the original was given.

    Returns:
        The faults (none when structure, shapes and dtypes agree), and whether the output is bit-identical.
    """
    with torch.no_grad(), anatomy.evaluation(replacement):
        try:
            output = replacement(*_copy(call.args), **_copy(call.kwargs))
        except CALL_ERRORS as error:
            given = ", ".join([_describe(a) for a in call.args] + list(call.kwargs))
            return [
                f"{name}: {type(replacement).__name__} fails on what the original takes ({given}): "
                f"{type(error).__name__}: {error}"
            ], False
    old, new = _describe(call.output), _describe(output)
    if old != new:
        return [
            f"{name}: the original returns {old}, but {type(replacement).__name__} returns {new}; "
            "return the same structure, shapes and dtypes"
        ], False
    return [], _equal(call.output, output)


def looks_ahead(
    name: str, original: nn.Module, replacement: nn.Module, call: Call, causal: Sequence[tuple[int, int]]
) -> list[str]:
    """Tells whether an earlier position of the replacement's output depends on the last position of its input.

    The original module, under the same change, is the control. The replacement is tried as it stands and once more
    with random values in its own parameters, because a new branch that starts at zero hides what it mixes.
    """
    place = _sequence_argument(call, causal)
    if place is None:
        return []
    shape, changed = place
    own = {id(p) for p in original.parameters()}
    fresh = {n: p for n, p in replacement.named_parameters() if id(p) not in own and p.is_floating_point()}
    generator = torch.Generator().manual_seed(0)
    noisy = {n: p + torch.randn(p.shape, generator=generator).to(p) * 0.5 for n, p in fresh.items()}
    with torch.no_grad(), anatomy.evaluation(original), anatomy.evaluation(replacement):
        control = _leak(original, {}, call, changed, shape)
        for weights, when in (({}, ""), (noisy, ", once its own parameters are not at their start")):
            leak = _leak(replacement, weights, call, changed, shape)
            if leak is not None and control is not None and leak[0] > max(4 * control[0], leak[1]):
                return [
                    f"{name}: the model is causal, but {type(replacement).__name__} looks ahead{when}: a change of "
                    f"the last position moves earlier outputs by {leak[0]:.3g}; mask or shift what it mixes"
                ]
    return []


def _leak(
    module: nn.Module, weights: dict[str, torch.Tensor], call: Call, changed: Call, shape: tuple[int, int]
) -> tuple[float, float] | None:
    """Returns how far earlier outputs moved and what rounding may move, or None where nothing can be compared."""
    try:
        before = torch.func.functional_call(module, weights, _copy(call.args), _copy(call.kwargs))
        after = torch.func.functional_call(module, weights, _copy(changed.args), _copy(changed.kwargs))
    except CALL_ERRORS:
        return None
    first, second = _first_tensor(before), _first_tensor(after)
    if first is None or second is None:
        return None
    first, second = _by_position(first, shape), _by_position(second, shape)
    if first is None or second is None or not torch.isfinite(first).all():
        return None
    return _distance(first[:, :-1], second[:, :-1]), _rounding(first)


def _sequence_argument(call: Call, causal: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], Call] | None:
    """Finds the first floating tensor that runs along a causal stream and returns the call with its end changed."""
    generator = torch.Generator().manual_seed(1)
    arguments = [(None, i, a) for i, a in enumerate(call.args)] + [(k, None, a) for k, a in call.kwargs.items()]
    for key, index, value in arguments:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        for shape in causal:
            rows = _by_position(value, shape)
            if rows is None:
                continue
            noise = torch.randn(rows[:, -1].shape, generator=generator).to(rows)
            rows = rows.clone()
            rows[:, -1] += 3 * noise * rows.float().std().to(rows).clamp(min=1e-2)
            other = rows.reshape(value.shape)
            if key is not None:
                return shape, Call(call.args, {**call.kwargs, key: other}, None)
            args = tuple(other if i == index else a for i, a in enumerate(call.args))
            return shape, Call(args, call.kwargs, None)
    return None


def _by_position(tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor | None:
    """Views a tensor as (batch_size, sequence_length, ...), also when both are flattened into one; else None."""
    if tensor.ndim >= 3 and tuple(tensor.shape[:2]) == shape:
        return tensor
    if tensor.ndim >= 2 and tensor.shape[0] == shape[0] * shape[1]:
        return tensor.reshape(*shape, *tensor.shape[1:])
    return None


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max()) if a.numel() else 0.0


def _rounding(tensor: torch.Tensor) -> float:
    """What another order of summation may change: some units in the last place of the largest value.

    Half precision is rounded once at the end of sums that are made in float32, so there it is 2 units and not 32.
    """
    scale = float(tensor.float().abs().max()) if tensor.numel() else 0.0
    units = 32 if tensor.dtype in (torch.float32, torch.float64) else 2
    return units * torch.finfo(tensor.dtype).eps * max(scale, 1e-3)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(_describe(v) for v in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return "None" if value is None else type(value).__name__


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return True


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Returns the tensors in a nested value, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


def _first_tensor(value: Any) -> torch.Tensor | None:
    return next(iter(tensors_in(value)), None)


def constructor(module_class: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a module's constructor by name, without `self`."""
    parameters = list(inspect.signature(module_class.__init__).parameters.values())[1:]
    return {parameter.name: parameter for parameter in parameters}
