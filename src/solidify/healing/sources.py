"""Where the calls of the unmodified base come from: the whole base in memory, or one layer of it at a time.

Both give the same bits, because a layer computes the same from the same numbers, whoever hands them to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import HealingError, refuse
from solidify.healing import matching
from solidify.healing.activations import Activations
from solidify.healing.matching import Call, LeftError, Unit
from solidify.model import anatomy
from solidify.surgery import contract
from solidify.system import foreign
from solidify.weights import mapped

Batch = Mapping[str, torch.Tensor]


class WholeBase:
    """The whole base in memory: one pass gives the calls of all units."""

    def __init__(self, base: PreTrainedModel, batches: Sequence[Batch], at: str, *, behind: nn.Module | None) -> None:
        """With `behind`, the changed model, units are given what they are given there, behind what has learned."""
        self.base, self.batches, self.at, self.behind = base, batches, at, behind

    def calls(self, index: int, units: Sequence[Unit]) -> dict[str, Call]:
        """Returns the calls of units for one batch."""
        batch = self.batches[index]
        seen = _watch_run(self.base, batch, units, self.at)
        found = {unit.name: _make_call(unit, seen[unit.name], self.at) for unit in units}
        if self.behind is None:
            return found
        ours = _watch_run(self.behind, batch, units, self.at)
        return {name: _given_elsewhere(call, ours[name]) for name, call in found.items()}


class LayerStream:
    """One layer of a model at a time: it reads what the layer before it returned from a file.

    The model runs with all layers passing on what they are given, but one; so each layer gets masks and positions from
    the family's own code. `number` is the current layer's, `read` what the one before it returned (None: it is the
    first). `behind` is the changed model's stream, where units are given what they are given there.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[str], batches: Sequence[Batch], at: str) -> None:
        """`layers` are the full names of the layers, in order."""
        self.model, self.layers, self.batches, self.at = model, list(layers), batches, at
        self.number = 0
        self.read: Activations | None = None
        self.behind: LayerStream | None = None
        self._returns_tuple = False

    def calls(self, index: int, units: Sequence[Unit]) -> dict[str, Call]:
        """Returns the calls of units within the current layer for one batch."""
        seen = self._watch(index, units)
        found = {unit.name: _make_call(unit, seen[unit.name], self.at) for unit in units}
        if self.behind is None:
            return found
        ours = self.behind._watch(index, units)
        return {name: _given_elsewhere(call, ours[name]) for name, call in found.items()}

    def _watch(self, index: int, units: Sequence[Unit]) -> dict[str, matching.Watch]:
        with ExitStack() as stack:
            seen = {}
            for unit in units:
                module = self.model.get_submodule(unit.name)
                seen[unit.name] = stack.enter_context(matching.watching(module, unit.name, self.at, given=True))
            self.run(index)
        return seen

    def run(self, index: int) -> torch.Tensor:
        """Runs the current layer on one batch and returns what it returns first (batch_size, sequence_length, ...)."""
        layer = self.model.get_submodule(self.layers[self.number])
        given = self.read.get(index) if self.read is not None else None
        output: list[torch.Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            """Gives the layer what the one before it returned."""
            if given is None:
                return None
            if args:
                return (given, *args[1:]), kwargs
            return args, {**kwargs, _first_name(layer): given}

        def after(_module: nn.Module, _args: Any, result: Any) -> None:
            """Keeps what the layer returns, and leaves the model."""
            self._returns_tuple = isinstance(result, tuple)
            output.append(contract.tensors_in(result)[0].clone())
            raise LeftError

        hooks = [
            layer.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
            layer.register_forward_hook(after),
        ]
        try:
            with self._passing():
                run_until_left(self.model, self.batches[index])
        finally:
            for hook in hooks:
                hook.remove()
        return output[0]

    def shape_outputs(self, first: torch.Tensor) -> list[tuple[int, ...]]:
        """Returns the shape of what the current layer returns for every batch, of what it returned for the first one.

        Raises:
            HealingError: that is not one row for each token.
        """
        tokens = [next(t for t in batch.values() if t.ndim == 2).shape for batch in self.batches]
        if first.shape[:2] != tokens[0]:
            raise HealingError(
                f"{self.layers[self.number]} returns {list(first.shape)} for tokens {list(tokens[0])}; call with "
                "stream=False"
            )
        return [(*shape, *first.shape[2:]) for shape in tokens]

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """While the block lasts, lets earlier layers return what they are given, in the structure that layers have."""
        as_tuple = self._returns_tuple

        def passing(*args: Any, **kwargs: Any) -> Any:
            """Returns the first of what it is given."""
            hidden = args[0] if args else next(iter(kwargs.values()))
            return (hidden,) if as_tuple else hidden

        modules = [self.model.get_submodule(name) for name in self.layers[: self.number]]
        before = [(module, vars(module).get("forward")) for module in modules]
        for module in modules:
            vars(module)["forward"] = passing
        try:
            yield
        finally:
            for module, own in before:
                del vars(module)["forward"]
                if own is not None:
                    vars(module)["forward"] = own

    def refuse_unstreamable(self, whose: str = "this family") -> None:
        """Runs the whole model once on few tokens, layer by layer given back, and as a stream, and compares.

        Raises:
            HealingError: a layer is given something else than what the one before it returned, or something that the
                layers before it made beside that; such a model learns with the whole of it in memory.
        """
        batch = few_tokens(self.batches[0])
        whole = _follow_layers(self.model, self.layers, batch)
        with mapped.released(self.model):  # what layers left for each other is of other tokens now
            run_until_left(self.model, {**batch, "input_ids": batch["input_ids"].flip(1)})
        own = LayerStream(self.model, self.layers, [batch], self.at)
        faults = []
        for number, name in reversed(list(enumerate(self.layers))):  # else an earlier layer leaves it anew
            own.number, own._returns_tuple = number, whole[number - 1].is_tuple
            own.read = Activations.of([whole[number - 1].output]) if number else None
            with _keeping_given(self.model.get_submodule(name)) as given, mapped.released(self.model):
                found = foreign.attempt(own.run, 0)
            if not given or not contract.are_equal((whole[number].args, whole[number].kwargs), given[0]):
                faults.append(f"{name} is given more by the layers before it than what the last of them returns")
            elif found.error is not None or not contract.are_equal(whole[number].output, found.value):
                faults.append(f"{name} reads something that the layers before it leave beside what they return")
        refuse(HealingError, f"{whose} cannot be streamed layer by layer; call with stream=False", faults[::-1][:3])


@dataclass(frozen=True)
class _LayerCall:
    """What a layer was given, the first tensor that it returned, and whether it returned a tuple."""

    args: Any
    kwargs: Any
    output: torch.Tensor
    is_tuple: bool


def _follow_layers(base: PreTrainedModel, layers: Sequence[str], batch: Batch) -> list[_LayerCall]:
    """Runs the base as it is; returns the call of every layer."""
    found: list[_LayerCall] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Notes the layer's call."""
        first = contract.tensors_in(output)[0].clone()
        found.append(_LayerCall(contract.copied(args), contract.copied(kwargs), first, isinstance(output, tuple)))

    hooks = [base.get_submodule(name).register_forward_hook(keep, with_kwargs=True) for name in layers]
    try:
        with mapped.released(base):
            run_until_left(base, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if len(found) != len(layers):
        raise HealingError("the base does not run its layers one after the other; align it with stream=False")
    return found


@contextmanager
def _keeping_given(module: nn.Module) -> Iterator[list[Any]]:
    given: list[Any] = []
    hook = module.register_forward_hook(
        lambda _m, args, kwargs, _o: given.append((contract.copied(args), contract.copied(kwargs))),
        with_kwargs=True,
    )
    try:
        yield given
    finally:
        hook.remove()


def _first_name(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


def _watch_run(model: nn.Module, batch: Batch, units: Sequence[Unit], at: str) -> dict[str, matching.Watch]:
    """Runs a model until all units were called."""
    waiting = {unit.name for unit in units}

    def called(name: str) -> Any:
        """Makes a hook that leaves the model after the last unit."""

        def after(*_: Any) -> None:
            """Notes the call."""
            waiting.discard(name)
            if not waiting:
                raise LeftError

        return after

    with ExitStack() as stack:
        seen = {}
        for unit in units:
            module = model.get_submodule(unit.name)
            seen[unit.name] = stack.enter_context(matching.watching(module, unit.name, at, given=True))
            stack.callback(module.register_forward_hook(called(unit.name)).remove)
        run_until_left(model, batch)
    return seen


def order_of_calls(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[str]:
    """Returns the names in the order in which the model calls the modules.

    Raises:
        HealingError: one is not called, or several times in a pass.
    """
    called: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name in names
    ]
    try:
        with mapped.released(model):
            run_until_left(model, few_tokens(batch))
    finally:
        for hook in hooks:
            hook.remove()
    faults = [
        f"{name} is called {called.count(name)} times in one pass of the base, and not once; leave it to distillation"
        for name in names
        if called.count(name) != 1
    ]
    refuse(HealingError, "the modules cannot be aligned", faults[:4])
    return called


def few_tokens(batch: Batch) -> dict[str, torch.Tensor]:
    """Returns the first tokens of a batch's first row that has any."""
    mask = matching.attended(batch)
    row, start = (0, 0) if mask is None else (int(number) for number in mask.nonzero()[0])
    return {key: tensor[row : row + 1, start : start + 8] for key, tensor in batch.items()}


def run_until_left(model: nn.Module, batch: Batch) -> None:
    """Runs a model without a cache, without gradients, in evaluation mode, until a hook leaves it or to its end.

    What it computes does not depend on earlier calls, which are not the same for the whole model and for a layer.
    """
    arguments = {key: tensor for key, tensor in batch.items() if key != "labels"}
    if "use_cache" in calling.takes(model):
        arguments["use_cache"] = False  # type: ignore[assignment]
    called = foreign.calling("the model does not run on the batches", HealingError)
    unmoved = anatomy.forgetting(model)
    with torch.no_grad(), unmoved, anatomy.evaluation(model), anatomy.caches_off(model), called, suppress(LeftError):
        model(**arguments)


def _make_call(unit: Unit, watch: matching.Watch, at: str) -> Call:
    target = matching.require(watch, unit.name, at, "module in the base")
    if watch.given is None:
        raise HealingError(f"{unit.name} was not called by the base")
    return Call(*watch.given, target.detach().clone())


def _given_elsewhere(call: Call, ours: matching.Watch) -> Call:
    """Returns the base's target with what the unit is given in the changed model."""
    assert ours.given is not None
    return Call(*ours.given, call.target)
