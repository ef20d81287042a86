"""Liger's functions by family, and the switches that each has.

`TESTED` is the minor version that they were read and tried in: `liger_kernel/transformers/monkey_patch.py`, whose table
by family is not part of its public names.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping

TESTED = "0.8"
MODULE = "liger_kernel.transformers.monkey_patch"  # imported when it is asked for: it needs Triton
UNDOCUMENTED = {"transformers.monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN": "which function serves which family"}


def functions() -> Mapping[str, Callable[..., None]]:
    """Returns the function that swaps kernels into a model of each family, by `model_type`."""
    table: Mapping[str, Callable[..., None]] = importlib.import_module(MODULE).MODEL_TYPE_TO_APPLY_LIGER_FN
    return table


def switches(table: Mapping[str, Callable[..., None]], family: str) -> dict[str, bool]:
    """Returns the family's switches and their defaults.

    Families made of two (a text model in a vision model) hand on what they do not name: theirs are all there are.
    """
    parameters = inspect.signature(table[family]).parameters.values()
    own = {p.name: p.default for p in parameters if isinstance(p.default, bool)}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        every = (p for function in table.values() for p in inspect.signature(function).parameters.values())
        own = {**{p.name: p.default for p in every if p.default is True}, **own}
    return own
