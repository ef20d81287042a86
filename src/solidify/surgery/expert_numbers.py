"""The numbers of an MoE block: those that a module holds, or reads from its configuration whenever it runs
(`self.config.top_k_experts`), and tables of them."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

_CONFIG = "config"


def list_numbers(module: nn.Module) -> dict[str, int]:
    """Returns the whole numbers of a module by the path of the attribute, those of its configuration that it reads."""
    found = {key: value for key, value in vars(module).items() if type(value) is int}
    config, kind = vars(module).get(_CONFIG), cast(Any, type(module))
    if isinstance(config, PreTrainedConfig):
        read = {key: getattr(config, key, None) for key in sorted(_find_read(kind))}
        found |= {f"{_CONFIG}.{key}": value for key, value in read.items() if type(value) is int}
    return found


def find_shared(paths: Mapping[str, Any]) -> list[str]:
    """Returns those of some paths of numbers that stand in a configuration, and so in that of every block."""
    return [path for path in paths if _CONFIG in path.split(".")[:-1]]


def find_tables(block: nn.Module, size: int, per_token: set[int]) -> dict[str, int]:
    """Returns the tables of a block by which experts are looked up: path -> how many a row names.

    A table holds whole numbers of the block's `size` experts, as many in a row as the block says that a token gets.
    """
    found = {}
    for path, tensor in (*block.named_parameters(), *block.named_buffers()):
        whole = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
        if not whole or tensor.ndim != 2 or tensor.shape[1] not in per_token:
            continue
        if tensor.is_meta or (int(tensor.min()) >= 0 and int(tensor.max()) < size):
            found[path] = tensor.shape[1]
    return found


@lru_cache(maxsize=4096)
def _find_read(kind: Any) -> frozenset[str]:
    """Returns what the methods of a class of modules read from `self.config`, its constructor's apart."""
    found = set[str]()
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(base).items():
            function = inspect.unwrap(value) if callable(value) else None
            if name != "__init__" and inspect.isfunction(function):
                names = [instruction.argval for instruction in dis.get_instructions(function)]
                found |= {key for owner, key in pairwise(names) if owner == _CONFIG and isinstance(key, str)}
    return frozenset(found)
