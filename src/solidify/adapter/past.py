"""Which layers' weights a model computes with past the layers: what is put around these has no effect there.

However a weight is read (`layer.weight`, `layer.parameters()`, a table of torch's), the graph of a pass ends in it. A
layer that is called gets a copy outside the graph for the time of the call; what still ends in the weight is past it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from solidify.behaviour import calling
from solidify.model import anatomy
from solidify.model.probing import Inputs
from solidify.system import foreign
from solidify.upstream.torch import TABLES, own_parameters
from solidify.weights.format import same_bits

MODES = {False: "in evaluation", True: "in training"}


def find(model: nn.Module, inputs: Inputs, layers: Mapping[str, Sequence[nn.Module]]) -> dict[str, str]:
    """Returns the layers whose parameters a pass ends in past them, by name, each with the mode in which it does.

    `layers` maps names to the modules that are called there: the layer last, and what is put around it. The model is as
    it was afterwards, but for what its code remembers in objects. A pass that fails says nothing.
    """
    found: dict[str, str] = {}
    holders: dict[int, list[nn.Module]] = {}
    for part in model.modules():
        for parameter in own_parameters(part).values():
            holders.setdefault(id(parameter), []).append(part)
    copies = copy_values(model)
    for mode, words in MODES.items():
        with ExitStack() as stack:
            stack.enter_context(kept(model, copies, training=mode))
            stack.enter_context(torch.enable_grad())
            leaves = {name: stack.enter_context(_called_outside(each, holders)) for name, each in layers.items()}
            output = foreign.attempt(model, **calling.copy_tensors(inputs)).value
            ends = set(_walk_graph(output))
        for name, identities in leaves.items():
            if identities & ends:
                found.setdefault(name, words)
    return found


Values = Sequence[tuple[nn.Parameter, torch.Tensor]]  # parameters, and copies of them


def copy_values(model: nn.Module) -> Values:
    """Copies the parameters of a small model: code that changes mode may write to them (an update is merged)."""
    return [(parameter, parameter.detach().clone()) for parameter in model.parameters()]


@contextmanager
def kept(model: nn.Module, copies: Values, *, training: bool = False) -> Iterator[None]:
    """Has a model run in one mode and without caches; gives it its attributes (modes are such) and buffers back.

    Random numbers are then as they were, and parameters where an attribute told of them: `copies` are their values.
    """
    with (
        _attributes_kept(model, copies),
        calling.buffers_kept(model),
        calling.chance_kept(),
        anatomy.caches_off(model),
    ):
        model.train(training)
        yield


@contextmanager
def _attributes_kept(model: nn.Module, copies: Values) -> Iterator[None]:
    before = [(part, dict(vars(part))) for part in model.modules()]
    try:
        yield
    finally:
        told = False
        for part, attributes in before:
            own = vars(part)
            told = told or any(own.get(key) is not value for key, value in attributes.items() if key != "training")
            own.update(attributes)
            for key in own.keys() - attributes.keys() - {*TABLES}:
                del own[key]
        if told:  # as `merged` does, in layers that merge by themselves: attributes and weights belong together
            for parameter, copy in copies:
                if not same_bits(parameter, copy):
                    parameter.data.copy_(copy)


@contextmanager
def _called_outside(modules: Sequence[nn.Module], holders: Mapping[int, Sequence[nn.Module]]) -> Iterator[set[int]]:
    """Has calls of a layer compute with copies outside the graph, and of others that hold a parameter of it (a tie).

    Gives the identities of its parameters.
    """
    layer = modules[-1]
    held = [p for p in own_parameters(layer).values() if p is not None and p.is_floating_point()]
    held = [] if isinstance(layer, nn.RNNBase) else [p for p in held if not p.is_inference()]
    identities = {id(parameter) for parameter in held}
    tied = {part for parameter in held for part in holders[id(parameter)] if part is not layer}
    learning = [parameter.requires_grad for parameter in held]
    with ExitStack() as stack:
        for part in (layer, *tied):
            stack.enter_context(_hooked(part, {*modules} if part is layer else {part}, identities))
        for parameter in held:
            parameter.requires_grad_(True)
        try:
            yield identities
        finally:
            for parameter, flag in zip(held, learning, strict=True):
                parameter.requires_grad_(flag)


@contextmanager
def _hooked(part: nn.Module, called: Collection[nn.Module], identities: set[int]) -> Iterator[None]:
    table: dict[str, Any] = own_parameters(part)  # copies stand in it for a call
    held = {key: parameter for key, parameter in table.items() if id(parameter) in identities}
    depth = 0

    def enter(*_: Any) -> None:
        """Puts copies into the layer, when the outermost call begins."""
        nonlocal depth
        depth += 1
        if depth == 1:
            table.update({key: parameter.detach() for key, parameter in held.items() if parameter is not None})

    def leave(*_: Any) -> None:
        """Puts the parameters back, when the outermost call ends."""
        nonlocal depth
        depth -= 1
        if depth == 0:
            table.update(held)

    def surround(own: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward for those who call it by its name, which runs no hooks."""

        @wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            """Calls the part's own between what the hooks do."""
            enter()
            try:
                return own(*args, **kwargs)
            finally:
                leave()

        return forward

    before = [(each, {k: v for k, v in vars(each).items() if k == "forward"}) for each in called]
    handles = [each.register_forward_pre_hook(enter, prepend=True) for each in called]
    handles += [each.register_forward_hook(leave, always_call=True) for each in called]
    for each in called:
        vars(each)["forward"] = surround(each.forward)
    try:
        yield
    finally:
        table.update(held)
        for handle in handles:
            handle.remove()
        for each, own in before:
            vars(each).pop("forward", None)
            vars(each).update(own)


def _walk_graph(output: Any) -> Iterator[int]:
    """Yields the identities of the tensors that the graph of an output ends in."""
    waiting = [tensor.grad_fn for tensor in walk_tensors(output)]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield id(leaf)
        waiting += [following for following, _ in node.next_functions]


def walk_tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of an output, whatever they are nested in."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from walk_tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from walk_tensors(each)
