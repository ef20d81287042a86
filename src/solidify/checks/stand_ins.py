"""Small products in the place of the large linear layers of a model: a call of it reads a few rows of their weights.

What is looked for when a model is called as servers call it (who calls the attention, what mixes positions, what is
called at all) hangs on what the modules do. What a plain `nn.Linear` does is known: it maps every position by itself,
and reads all of its inputs for every output. So does what stands in for it, with numbers of its own and of rank 16,
about as large as the layer's. No layer within a module of the user's is stood in for, unless a block of transformers
stands between them, none whose weight is read past it, and none at all where the model reads values: with its own
numbers it may do otherwise.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from solidify.system import foreign
from solidify.upstream.torch import TorchDispatchMode

_LARGE = 2**20  # bytes of a weight; to read less costs nothing
_RANK = 16
_STEP, _SPREAD = 7919, 2**16  # by which the numbers of one layer begin behind those of another, and in what range
_KNOWN = ("transformers", "torch")  # packages whose modules do with their layers no more than to call them
# What gives a tensor's values away and is no operation of torch's, which would have a tag: it reads the memory.
_OPENED = ("tolist", "numpy", "__array__", "__dlpack__", "__repr__", "__format__", "untyped_storage", "data_ptr")
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class OtherNumbersError(ValueError):
    """With the numbers of stand-ins a call tells nothing: it is not finite, or what the model does hangs on them.

    `layers` are those whose weight was read past them: with the numbers of their own it may tell something.
    """

    def __init__(self, reason: str, layers: Collection[nn.Linear] = ()) -> None:
        super().__init__(reason)
        self.layers = layers


@contextmanager
def standing_in(model: nn.Module, kept: Collection[nn.Module] = ()) -> Iterator[StandIns]:
    """Has large linear layers, but those `kept`, compute with other numbers in the block; yields what stands in.

    A layer of zeros keeps them: what it lets through is nothing. So does one that computes in a way of its own (a
    class that inherits from `nn.Linear`, a `forward` of the instance's). Biases are the layers' own.

    Raises:
        OtherNumbersError: within the block, where a product is not finite, or a module reads a value; and at its end,
            if there was one, which code of the user's may have caught, or if a weight was read past its layer.
    """
    layers = [layer for layer in _find_layers(model) if layer not in kept and _is_large(layer.weight)]
    made, threads = StandIns(layers, outer=_is_known_around(model)), torch.get_num_threads()
    if not layers:
        yield made
        return
    try:
        with ExitStack() as hooked:
            for layer, forward in zip(layers, _make_products(layers, made), strict=True):
                vars(layer)["forward"] = forward
            for module in model.modules():
                if type(module) is not nn.ModuleList:
                    hooked.callback(module.register_forward_pre_hook(made.enter, prepend=True).remove)
                    hooked.callback(module.register_forward_hook(made.leave, always_call=True).remove)
            hooked.callback(model.register_forward_hook(lambda *given: made.refuse_infinite(given[-1])).remove)
            torch.set_num_threads(1)  # what is left is so small that several threads would wait for each other
            with _Opened(made), _Operations(made):
                yield made
    finally:
        torch.set_num_threads(threads)
        for layer in layers:
            vars(layer).pop("forward", None)
    if made.refused or made.read:
        raise OtherNumbersError(made.refused or "what a module does hangs on a layer's weight", made.read)


class StandIns:
    """What stands in for so many layers of a model (`count`): with it no module may read a value.

    It refuses that, and notes which layers' weights are `read` past them.
    The `outer` one, if it is transformers' own, may read values: it does so of the masks that it is given.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, outer: bool) -> None:
        self.count = len(layers)
        self._layers = {layer.weight.data_ptr(): layer for layer in layers}
        self._begins = sorted(self._layers)
        self.read: set[nn.Linear] = set()
        self._depth, self._open, self._thread = 0, int(outer), threading.get_ident()
        self.allowed = False
        self.refused = ""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Lets a hook of ours read values, while the block lasts, within a module of the model."""
        before, self.allowed = self.allowed, True
        try:
            yield
        finally:
            self.allowed = before

    def enter(self, *_: Any) -> None:
        """Notes that a module begins, which must be in the thread whose operations are looked at."""
        if threading.get_ident() != self._thread:
            self.refuse("a module runs in another thread")
        self._depth += 1

    def leave(self, *_: Any) -> None:
        """Notes that one has ended."""
        self._depth -= 1

    @property
    def closed(self) -> bool:
        """Whether no value may be read now."""
        return self._depth > self._open and not self.allowed

    def refuse(self, reason: str) -> NoReturn:
        """Keeps the reason, for the case that its error is caught by what runs, and raises."""
        self.refused = self.refused or reason
        raise OtherNumbersError(reason)

    def refuse_infinite(self, found: Any) -> None:
        """Refuses a return that is infinite or no number."""
        with self.reading():
            for tensor in _list_parts(found):
                floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
                if floating and not math.isfinite(float(tensor.sum(dtype=torch.float32))):
                    self.refuse("what it returns is not finite")

    def note_weights(self, arguments: Iterable[Any]) -> None:
        """Notes what lies in the memory of a weight, by whatever name, among nested arguments; refuses sparse ones."""
        if not self._depth or self.allowed:
            return
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self.note_weights(argument)
            elif isinstance(argument, torch.Tensor) and argument.layout is not torch.strided:
                self.refuse("what a module does hangs on which values are zero")  # as a sparse tensor's size does
            elif isinstance(argument, torch.Tensor):
                self._note_weight(foreign.attempt(argument.data_ptr).value or 0)  # one around others has no memory

    def _note_weight(self, address: int) -> None:
        index = bisect(self._begins, address) - 1
        layer = self._layers[self._begins[index]] if index >= 0 else None
        if layer is not None and address < self._begins[index] + layer.weight.nbytes:
            self.read.add(layer)


class _Opened(TorchFunctionMode):
    """Refuses what gives the memory of a tensor away."""

    def __init__(self, stand_ins: StandIns) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Looks at one call of PyTorch."""
        if self._stand_ins.closed and getattr(func, "__name__", "") in _OPENED:
            self._stand_ins.refuse("what a module does hangs on a value")
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Refuses operations whose result is a number of Python's, or has a shape that hangs on values: torch tags them."""

    def __init__(self, stand_ins: StandIns) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._stand_ins = stand_ins

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Looks at one operation."""
        self._stand_ins.note_weights((*args, *(kwargs or {}).values()))
        if self._stand_ins.closed and _TAGS & {*func.tags} and not _picks_by_number(func, args):
            self._stand_ins.refuse("what a module does hangs on a value")
        return func(*args, **(kwargs or {}))


def _list_parts(found: Any) -> Iterable[Any]:
    """Lists what a call returned: one thing, several, or several by name, as a `ModelOutput` holds them."""
    if isinstance(found, torch.Tensor):
        return (found,)
    return found.values() if isinstance(found, Mapping) else found


def _picks_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Returns whether an operation takes elements by their numbers, so that its shape hangs on theirs alone."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _find_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """Yields plain linear layers, at whatever names they have, that no module of the user's holds."""
    kinds = {name: type(module).__module__.partition(".")[0] for name, module in _list_names(model)}
    names: dict[nn.Module, list[str]] = {}
    for name, module in _list_names(model):
        names.setdefault(module, []).append(name)
    for module, found in names.items():
        plain = type(module) is nn.Linear and "forward" not in vars(module)
        if plain and all(_find_holder(name, kinds) in _KNOWN for name in found):
            yield module  # type: ignore[misc]  # a Linear


def _list_names(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from model.named_modules(remove_duplicate=False)


def _is_known_around(model: nn.Module) -> bool:
    """Returns whether what a model does around its modules is known: its `forward`, and how each of them is called."""
    around = [type(model).forward, *(type(module).__call__ for module in model.modules())]
    return "forward" not in vars(model) and all(map(_is_of_known, around))


def _is_of_known(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] in _KNOWN


def _find_holder(name: str, kinds: Mapping[str, str]) -> str:
    """Returns the package of the module that holds one of this name: the first around it that is not torch's own."""
    while name:
        name = name.rpartition(".")[0]
        if kinds[name] != "torch":
            return kinds[name]
    return "torch"


def _is_large(weight: torch.Tensor) -> bool:
    if type(weight) is not nn.Parameter or weight.nbytes < _LARGE or not weight.is_floating_point():
        return False
    return weight.element_size() > 1 and not weight.is_meta and _has_values(weight)


def _has_values(weight: torch.Tensor) -> bool:
    """Returns whether any value is not zero: the first few tell, as a rule."""
    values = weight.detach()
    return bool(values[0, :1024].any()) or any(bool(rows.any()) for rows in torch.split(values, 64))


def _measure_size(weight: torch.Tensor) -> float:
    """Returns the root mean square of a weight at a few of its rows."""
    rows = weight.detach()[:: max(1, len(weight) // 4)].float()  # (four or five, in_features)
    return float(rows.square().mean().sqrt())


def _make_products(layers: list[nn.Linear], made: StandIns) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Yields what each layer computes instead, with numbers of which each begins elsewhere in one pool."""
    pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    longest = _RANK * max(size for layer in layers for size in layer.weight.shape) + _SPREAD
    for number, layer in enumerate(layers):
        kind = layer.weight.dtype, layer.weight.device
        if kind not in pools:
            drawn = torch.randn(longest, generator=torch.Generator().manual_seed(0))
            pools[kind] = drawn.to(*kind[::-1])
        yield _make_product(layer, pools[kind][number * _STEP % _SPREAD :], made)


def _make_product(layer: nn.Linear, numbers: torch.Tensor, made: StandIns) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes what a layer computes instead: its outputs have about the size of those with its own numbers."""
    inner = numbers[: _RANK * layer.in_features].view(_RANK, layer.in_features)
    outer = numbers[: _RANK * layer.out_features].view(layer.out_features, _RANK)
    size = _measure_size(layer.weight)
    size = size if size and math.isfinite(size) else layer.in_features**-0.5

    def forward(input: torch.Tensor) -> torch.Tensor:
        """Computes another product of the same shape."""
        few = functional.linear(input, inner) * size
        found: torch.Tensor = functional.linear(few, outer) * _RANK**-0.5
        found = found if layer.bias is None else found + layer.bias
        made.refuse_infinite(found)
        return found

    return forward
