"""Which low-rank updates have no effect, though the weights that they are for have one.

A weight may be read past its layer in ways that no graph shows: by `.data`, without gradients, as numbers. So each
update gets random factors for a while. One that gets no gradient, and moves no output, is compared with the same change
of the weight itself: what that moves computes with the weight past the layer. If nothing moves, nothing is known: no
token is routed there, a gate is zero, a tower has no input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import Cache

from solidify.adapter import lookup, past
from solidify.behaviour import calling, values
from solidify.system import foreign
from solidify.upstream.peft import layer_adapters
from solidify.upstream.torch import own_parameters

Inputs = Mapping[str, Any]  # tensors, and, of a single step, a cache

_TEXT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


class _Change(NamedTuple):
    """Another parameter for one place of a module's table."""

    table: dict[str, nn.Parameter | None]
    key: str
    value: nn.Parameter


@dataclass(frozen=True)
class _Update:
    """An adapter's low-rank update: its target's name, and other factors, by which it is another one."""

    name: str
    layer: LoraLayer
    adapter: str
    factors: tuple[_Change, ...]

    def weight(self) -> list[_Change]:
        """Returns the weight with what the other factors add to it; nothing where it is packed, or no parameter."""
        inner = lookup.original(self.layer)
        table, key = own_parameters(inner), getattr(self.layer, "parameter_name", "weight")
        plain = table.get(key)
        if plain is None or not plain.is_floating_point():
            return []
        with torch.no_grad(), values.substitute_entries(self.factors):
            delta = foreign.attempt(self.layer.get_delta_weight, self.adapter).value
        if delta is None or delta.shape != plain.shape:
            return []
        changed = nn.Parameter((plain.detach() + delta).to(plain.dtype), plain.requires_grad)
        vars(changed).update(vars(plain))
        return [_Change(table, key, changed)]


@dataclass(frozen=True)
class _Trial:
    """Runs of one model with the same inputs and random numbers, in one mode."""

    model: nn.Module
    copies: past.Values
    inputs: Inputs
    words: str
    training: bool = False
    gradients: bool = True

    def answer(self, changes: Sequence[_Change], leaves: Sequence[nn.Parameter] = ()) -> _Answer | None:
        """Runs the model with changes; None where it fails."""
        kept = past.kept(self.model, self.copies, training=self.training)
        with kept, values.substitute_entries(changes), torch.set_grad_enabled(self.gradients):
            for module in self.model.modules():
                if isinstance(module, LoraLayer) and self.training:
                    module.lora_dropout.eval()  # the weight itself has none
            run = foreign.attempt(lambda: self.model(**_copy_inputs(self.inputs)))
            if run.failed:
                return None
            outputs = list(past.walk_tensors(run.value))
            reached = foreign.attempt(_reach, outputs, leaves).value if leaves else None
        return _Answer([tensor.detach() for tensor in outputs], reached or set())

    def judge(self, updates: Sequence[_Update]) -> tuple[set[str], set[str]]:
        """Returns the names of the updates that move the output, and of those that do not while their weights do."""
        quiet = self.answer([])
        if quiet is None:
            return set(), set()

        def moves(changes: Sequence[_Change]) -> bool:
            other = self.answer(changes) if changes else None
            return other is not None and not other.equals(quiet)

        moving = _find_moving(updates, lambda group: moves([c for each in group for c in each.factors]))
        rest = [each for each in updates if each.name not in moving]
        passed = _find_moving(rest, lambda group: moves([c for each in group for c in each.weight()]))
        again = self.answer([]) if passed else None
        return moving, passed if again is not None and again.equals(quiet) else set()


@dataclass(frozen=True)
class _Answer:
    """The tensors that a model returned, and the identities of the parameters that got a gradient from them."""

    outputs: Sequence[torch.Tensor]
    reached: set[int]

    def equals(self, other: _Answer) -> bool:
        """Returns whether all tensors hold the same numbers; one that is none equals itself."""
        return len(self.outputs) == len(other.outputs) and all(map(_same_tensor, self.outputs, other.outputs))


def find(model: PeftModel, adapter: str, inputs: Inputs) -> tuple[dict[str, str], list[str]]:
    """Returns the targets of an adapter's updates that have no effect, by name, each with the mode in which.

    Returns also the names of those of which the inputs show nothing, as their weights have no effect either. The model
    is as it was afterwards, but for what its code remembers in objects. A pass that fails says nothing.
    """
    updates = list(_find_updates(model, adapter))
    if not updates:
        return {}, []
    plain = lookup.plain_model(model)
    noise = [change for each in updates for change in each.factors]
    leaves = [change.value for change in noise]
    passed: dict[str, str] = {}
    seen: set[str] = set()
    evaluated = None
    for trial in _list_trials(plain, inputs):
        answer = trial.answer(noise, leaves if trial.gradients else ())
        if answer is None:
            continue
        if not trial.gradients and evaluated is not None and answer.equals(evaluated):
            continue  # as with gradients
        evaluated = answer
        reached = {each.name for each in updates if any(id(c.value) in answer.reached for c in each.factors)}
        rest = [each for each in updates if each.name not in reached]
        moving, without = trial.judge(rest) if rest else (set(), set())
        seen |= reached | moving
        passed = {**dict.fromkeys(sorted(without), trial.words), **passed}
    return passed, [each.name for each in updates if each.name not in seen and each.name not in passed]


def _list_trials(plain: nn.Module, inputs: Inputs) -> Iterator[_Trial]:
    copies = past.copy_values(plain)
    step = _make_step(plain, copies, inputs)
    for words, given in (("in evaluation", inputs), ("in a single step over a cache", step)):
        if given is not None:
            yield _Trial(plain, copies, given, words)
            yield _Trial(plain, copies, given, f"{words}, without gradients", gradients=False)
    yield _Trial(plain, copies, inputs, "in training", training=True)


def _make_step(plain: nn.Module, copies: past.Values, inputs: Inputs) -> Inputs | None:
    """Makes the last position of the first row, over a cache of those before it, as generation asks for it; None where
    the inputs are no text, or the model returns no cache of keys and values."""
    tokens = inputs.get("input_ids")
    if tokens is None or tokens.ndim != 2 or tokens.shape[1] < 2 or not {*inputs} <= {*_TEXT}:
        return None
    row = {key: value[:1] for key, value in inputs.items()}
    with past.kept(plain, copies), torch.no_grad():
        before = {key: value[:, :-1] for key, value in row.items()}
        cache = getattr(foreign.attempt(plain, **before, use_cache=True).value, "past_key_values", None)
    last = {key: value if key == "attention_mask" else value[:, -1:] for key, value in row.items()}
    return {**last, "past_key_values": cache, "use_cache": True} if isinstance(cache, Cache) else None


def _copy_inputs(inputs: Inputs) -> dict[str, Any]:
    """Copies tensors and caches, into which a model writes; what code of the user's put into a cache may forbid it."""
    return {
        key: copy.deepcopy(value) if isinstance(value, Cache) else value
        for key, value in calling.copy_tensors(inputs).items()
    }


def _find_updates(model: PeftModel, adapter: str) -> Iterator[_Update]:
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in layer_adapters(module):
            continue
        factors = [
            _Change(table, key, nn.Parameter(values.noise(f"{path}.{inside}.{key}", parameter), requires_grad=True))
            for inside, part in module.named_modules()
            if not inside.startswith("base_layer")
            for table in [own_parameters(part)]
            for key, parameter in table.items()
            if parameter is not None and adapter in (*inside.split("."), key)
        ]
        yield _Update(lookup.named(model, f"{path}.lora_A")[1], module, adapter, tuple(factors))


def _find_moving(updates: Sequence[_Update], moves: Callable[[Sequence[_Update]], bool]) -> set[str]:
    """Returns the names of the updates that move something, alone; halves of a group that moves are looked at."""
    if not updates or not moves(updates):
        return set()
    if len(updates) == 1:
        return {updates[0].name}
    middle = len(updates) // 2
    return _find_moving(updates[:middle], moves) | _find_moving(updates[middle:], moves)


def _reach(outputs: Sequence[torch.Tensor], leaves: Sequence[nn.Parameter]) -> set[int]:
    """Returns the identities of the leaves to which a random combination of the outputs gives a gradient."""
    ends = [tensor for tensor in outputs if tensor.requires_grad]
    found = torch.autograd.grad(ends, leaves, [torch.randn_like(end) for end in ends], allow_unused=True)
    return {id(leaf) for leaf, g in zip(leaves, found, strict=True) if g is not None and bool((g != 0).any())}


def _same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())
