"""Small products in the place of the large linear layers of a model, so that a call of it reads none of their weights.

What is looked for when a model is called as servers call it (who calls the attention, what mixes positions, what is
called at all) hangs on what the modules do. What a plain `nn.Linear` does is known: it maps every position by itself,
and reads all of its inputs for every output. So does what stands in for it, with numbers of its own and of rank 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

_LARGE = 2**20  # bytes of a weight; to read less costs nothing
_RANK = 16
_STEP, _SPREAD = 7919, 2**16  # by which the numbers of one layer begin behind those of another, and in what range


class NotFiniteError(ValueError):
    """A product became infinite or no number with the numbers of stand-ins; with the model's own it may not."""


@contextmanager
def standing_in(model: nn.Module) -> Iterator[int]:
    """Lets large linear layers compute with other numbers while the block lasts; yields how many do.

    A layer of zeros keeps them: what it lets through is nothing. So does one that computes in a way of its own (a
    class that inherits from `nn.Linear`, a `forward` of the instance's). Biases are the layers' own.

    Raises:
        NotFiniteError: within the block, where a product is not finite.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m) and _is_large(m.weight)]
    pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
    longest = _RANK * max((size for layer in layers for size in layer.weight.shape), default=0) + _SPREAD
    for number, layer in enumerate(layers):
        kind = layer.weight.dtype, layer.weight.device
        if kind not in pools:
            drawn = torch.randn(longest, generator=torch.Generator().manual_seed(0))
            pools[kind] = drawn.to(*kind[::-1])
        vars(layer)["forward"] = _make_product(layer, pools[kind][number * _STEP % _SPREAD :])
    threads = torch.get_num_threads()
    if layers:
        torch.set_num_threads(1)  # what is left is so small that several threads would wait for each other
    try:
        yield len(layers)
    finally:
        torch.set_num_threads(threads)
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_large(weight: torch.Tensor) -> bool:
    if type(weight) is not nn.Parameter or weight.nbytes < _LARGE or not weight.is_floating_point():
        return False
    return weight.element_size() > 1 and not weight.is_meta and _has_values(weight)


def _has_values(weight: torch.Tensor) -> bool:
    """Returns whether any value is not zero: the first few tell, as a rule."""
    values = weight.detach()
    return bool(values[0, :1024].any()) or any(bool(rows.any()) for rows in torch.split(values, 64))


def _make_product(layer: nn.Linear, numbers: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes what a layer computes instead: its outputs have about the size of its inputs."""
    inner = numbers[: _RANK * layer.in_features].view(_RANK, layer.in_features)
    outer = numbers[: _RANK * layer.out_features].view(layer.out_features, _RANK)

    def forward(input: torch.Tensor) -> torch.Tensor:
        """Computes another product of the same shape."""
        few = functional.linear(input, inner) * layer.in_features**-0.5
        found: torch.Tensor = functional.linear(few, outer) * _RANK**-0.5
        found = found if layer.bias is None else found + layer.bias
        if not math.isfinite(float(found.sum(dtype=torch.float32))):
            raise NotFiniteError("a linear layer gives what is not finite")
        return found

    return forward
