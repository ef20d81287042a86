"""Layers whose weight is read past them: by a module that holds them, while a model runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solidify.model import anatomy, probing
from solidify.system import foreign


def read_by_others(model: PreTrainedModel) -> list[str]:
    """Names the linear layers whose `weight` other modules read while the model runs, and may call the layer besides.

    So do the attention of torch and its encoder layers. What they read would be packed numbers, in the place of a
    matrix. The model may be on the meta device; if it does not run there, what it read until then is found.
    """
    linear = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    found: set[nn.Module] = set()

    made = foreign.attempt(probing.probe_inputs, model, run=anatomy.answer).value
    if made is not None:  # what was tried before, and failed, does not count
        with watching_reads(found, set()):
            foreign.attempt(anatomy.answer, model, made)
    return [name for module, name in linear.items() if module in found]


@contextmanager
def watching_reads(found: set[nn.Module], called: set[nn.Module]) -> Iterator[None]:
    """Collects the modules whose `weight` is read by another than themselves, and those that read it themselves.

    The second are those that are called. Hooks would tell that too, and would change what torch does.
    """
    plain = nn.Module.__getattr__

    def watched(self: nn.Module, name: str) -> Any:
        """Notes who reads a `weight`: the frame that asks for it is of a method of `self`, or of another's."""
        frame = inspect.currentframe()
        reader = frame.f_back if frame is not None else None
        if name == "weight" and reader is not None:
            (called if reader.f_locals.get("self") is self else found).add(self)
        return plain(self, name)

    nn.Module.__getattr__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__getattr__ = plain  # type: ignore[method-assign]
