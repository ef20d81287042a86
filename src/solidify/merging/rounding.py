"""What rounding does to a model, measured on it: modules return what they compute, moved by one unit or none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from solidify.upstream.torch import own_parameters

_MIXERS = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)  # odd numbers of 32 bits, one for each draw


def ulp(output: torch.Tensor, terms: int) -> torch.Tensor:
    """Returns how far rounding moves every number of a module's output, each a sum of `terms` products.

    Sums are kept in float32: in sixteen lanes, of n products, with half a unit each time, evenly to both sides.
    """
    eps = torch.finfo(output.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(terms) / 8
    return eps * torch.maximum(output.abs(), output.abs().mean())


def terms(module: nn.Module) -> int:
    """Returns of how many products a number is a sum that a module returns, as far as its parameters' shapes tell."""
    sizes = [
        p.shape[-1] if p.ndim == 3 else p[0].numel()
        for p in own_parameters(module).values()
        if p is not None and p.ndim
    ]
    return max(sizes, default=1)


@contextmanager
def moved(model: nn.Module, draw: int) -> Iterator[None]:
    """While the block lasts, what every innermost module returns is moved by -1, 0 or 1 unit in the last place.

    Which of the three is read from the number's own last bits, so that it is the same when a pass is computed again
    (checkpointing), and no random number is drawn.
    """
    inner = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [m.register_forward_hook(partial(_move_output, terms(m), _MIXERS[draw % len(_MIXERS)])) for m in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _move_output(count: int, mixer: int, _module: nn.Module, _given: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(_move_output(count, mixer, _module, _given, part) for part in output)
    if not isinstance(output, torch.Tensor) or not output.is_floating_point() or not output.numel():
        return output
    seen = output.detach()
    positions = torch.arange(seen.numel(), device=seen.device).view(seen.shape)  # the output's shape
    bits = seen.float().contiguous().view(torch.int32)  # the output's shape
    mixed = (bits.long() + positions) * mixer
    steps = (mixed >> 16) % 3 - 1
    return output + (steps * ulp(seen, count)).to(output.dtype)
