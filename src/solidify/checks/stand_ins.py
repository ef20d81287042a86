"""Small products in the place of the large linear layers of a model: a call of it reads a few rows of their weights.

What is looked for when a model is called as servers call it (who calls the attention, what mixes positions, what is
called at all) hangs on what the modules do. What a plain `nn.Linear` does is known: it maps every position by itself,
and reads all of its inputs for every output. So does what stands in for it, with numbers of its own and of rank 16,
about as large as the layer's. No layer within a module of the user's is stood in for, unless a block of transformers
stands between them, and none where the model reads values to decide what it does: with its own numbers it may decide
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LARGE = 2**20  # bytes of a weight; to read less costs nothing
_RANK = 16
_STEP, _SPREAD = 7919, 2**16  # by which the numbers of one layer begin behind those of another, and in what range
_KNOWN = ("transformers", "torch")  # packages whose modules do with their layers no more than to call them
_READERS = ("__bool__", "__int__", "__float__", "__index__", "__array__", "item", "tolist", "numpy", "nonzero", "equal")
_active: list[_Values] = []


class OtherNumbersError(ValueError):
    """With the numbers of stand-ins a call tells nothing: it is not finite, or what the model does hangs on them."""


@contextmanager
def standing_in(model: nn.Module) -> Iterator[int]:
    """Lets large linear layers compute with other numbers while the block lasts; yields how many do.

    A layer of zeros keeps them: what it lets through is nothing. So does one that computes in a way of its own (a
    class that inherits from `nn.Linear`, a `forward` of the instance's). Biases are the layers' own.

    Raises:
        OtherNumbersError: within the block, where a product is not finite, or a module reads a value.
    """
    layers = [layer for layer in _find_layers(model) if _is_large(layer.weight)]
    pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    longest = _RANK * max((size for layer in layers for size in layer.weight.shape), default=0) + _SPREAD
    values = _Values()
    for number, layer in enumerate(layers):
        kind = layer.weight.dtype, layer.weight.device
        if kind not in pools:
            drawn = torch.randn(longest, generator=torch.Generator().manual_seed(0))
            pools[kind] = drawn.to(*kind[::-1])
        vars(layer)["forward"] = _make_product(layer, pools[kind][number * _STEP % _SPREAD :])
    inner = [m for m in model.modules() if m is not model and not isinstance(m, nn.ModuleList)] if layers else []
    handles = [m.register_forward_pre_hook(values.enter) for m in inner]
    handles += [m.register_forward_hook(values.leave, always_call=True) for m in inner]
    handles += [model.register_forward_hook(_refuse_infinite)] if layers else []
    threads = torch.get_num_threads()
    if layers:
        torch.set_num_threads(1)  # what is left is so small that several threads would wait for each other
    try:
        _active.append(values)
        with values:
            yield len(layers)
    finally:
        _active.remove(values)
        torch.set_num_threads(threads)
        for layer in layers:
            vars(layer).pop("forward", None)
        for handle in handles:
            handle.remove()


@contextmanager
def reading() -> Iterator[None]:
    """Lets a hook of ours read values, while the block lasts, within a module of a model with stand-ins."""
    before = [(values, values.allowed) for values in _active]
    for values, _ in before:
        values.allowed = True
    try:
        yield
    finally:
        for values, allowed in before:
            values.allowed = allowed


class _Values(TorchFunctionMode):
    """Refuses that a module within the model reads a value: the model itself does, of the masks that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self.allowed = False

    def enter(self, *_: Any) -> None:
        """Notes that a module begins."""
        self._depth += 1

    def leave(self, *_: Any) -> None:
        """Notes that one has ended."""
        self._depth -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Looks at one call of PyTorch."""
        if self._depth and not self.allowed and getattr(func, "__name__", "") in _READERS:
            raise OtherNumbersError("what a module does hangs on a value")
        return func(*args, **(kwargs or {}))


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


def _refuse_infinite(_module: nn.Module, _given: Any, found: Any) -> None:
    """Refuses a return that is infinite or no number, also as a hook of the whole model."""
    for tensor in (found,) if isinstance(found, torch.Tensor) else found:
        floating = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        if floating and not math.isfinite(float(tensor.sum(dtype=torch.float32))):
            raise OtherNumbersError("what it returns is not finite")


def _make_product(layer: nn.Linear, numbers: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
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
        with reading():
            _refuse_infinite(layer, input, found)
        return found

    return forward
