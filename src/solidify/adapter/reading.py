"""Which settings of its configuration a model reads again whenever it runs, found in its code."""

from __future__ import annotations

import dis
from collections.abc import Collection, Iterator
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_LIBRARY = ("torch.", "transformers.modeling_utils", "transformers.generation", "peft.")
_BESIDE = ("__init__", "prepare_inputs_for_generation", "generate")  # made once, or never run for an output


def settings_read(model: nn.Module, names: Collection[str]) -> set[str]:
    """Returns those of some settings' names that the code of the model's modules reads when it runs.

    A module's own attribute of that name (`self.pad_token_id`) was made with it and follows no configuration.
    """
    wanted = frozenset(names)
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    return {
        name
        for kind in kinds
        if not f"{kind.__module__}.".startswith(_LIBRARY)
        for name in _find_names_in(kind, wanted)
    }


@lru_cache(maxsize=4096)
def _find_names_in(kind: type, names: frozenset[str]) -> frozenset[str]:
    methods = [v for key, v in vars(kind).items() if not key.startswith(_BESIDE)]
    unwrapped = [getattr(m, "__func__", m) for m in methods]
    functions = [f for m in unwrapped for f in _yield_wrapped(m)]
    return frozenset(
        name for f in functions for code in _yield_codes(f.__code__) for name in _yield_read_names(code, names)
    )


def _yield_wrapped(method: Any) -> Iterator[FunctionType]:
    """Yields a function and what its decorators hide."""
    while isinstance(method, FunctionType):
        yield method
        method = getattr(method, "__wrapped__", None)


def _yield_codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _yield_codes(constant)


def _yield_read_names(code: CodeType, names: frozenset[str]) -> Iterator[str]:
    before: Any = None
    for step in dis.get_instructions(code):
        is_name = step.opname == "LOAD_CONST" or (step.opname in _ATTRIBUTES and before != "self")
        if is_name and isinstance(step.argval, str) and step.argval in names:
            yield step.argval
        before = step.argval


_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
