"""Other values in the place of parameters and buffers, for the time of a measurement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def noise(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Returns other values for a new parameter or buffer: a branch that starts at zero hides what it computes.

    A buffer grows (some, such as variances, may not be negative), a parameter may do either.
    A buffer of zeros and ones is a mask, and stays. The noise depends on the name alone, so that it is the same in
    every process.
    """
    if not isinstance(parameter, nn.Parameter) and parameter.numel() > 1:
        found = set(parameter.detach().flatten()[:4096].tolist()) if parameter.numel() <= 2**24 else set()
        if found == {0.0, 1.0} and bool(((parameter == 0) | (parameter == 1)).all()):
            return parameter.detach().clone()
    generator = torch.Generator().manual_seed(sum(position * byte for position, byte in enumerate(name.encode(), 1)))
    fan = parameter.shape[-1] if parameter.ndim > 1 else 1
    drawn = torch.randn(parameter.shape, generator=generator) * 0.5 / max(fan, 1) ** 0.5
    drawn = drawn if isinstance(parameter, nn.Parameter) else drawn.abs()
    plain = parameter.detach().float() if parameter.element_size() == 1 else parameter.detach()  # float8 has no sums
    noisy: torch.Tensor = (plain + drawn.to(plain)).to(parameter.dtype)
    return noisy


@contextmanager
def substitute_values(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replaces the parameters and buffers of these names by values, under every name that each of them has.

    (`torch.func.functional_call` leaves a value behind in a module that has two names.)
    """
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    wanted = {id(own[name]): value for name, value in values.items()}
    tables: list[dict[str, Any]] = [table for m in model.modules() for table in (m._parameters, m._buffers)]
    entries = [(table, key, wanted.get(id(t), t)) for table in tables for key, t in table.items()]
    with substitute_entries(entries):
        yield


@contextmanager
def substitute_entries(entries: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Puts something else in some places of modules' tables, each given by its table, its name and what stands there
    while the block lasts."""
    before = [(table, key, table[key]) for table, key, _ in entries]
    try:
        for table, key, value in entries:
            table[key] = value
        yield
    finally:
        for table, key, value in before:
            table[key] = value
