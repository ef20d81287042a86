"""New tensors go to a file as soon as they are made, and stay mapped from it: memory holds one module at a time."""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from solidify.system import disk
from solidify.weights import format, mapped
from solidify.weights.format import Shape, TensorSource

_SMALL = 2**20  # bytes


def directory_for(owner: object) -> Path:
    """Returns a new directory for temporary files, which is removed when `owner` goes, or with the process."""
    stack, process = ExitStack(), os.getpid()
    directory = stack.enter_context(disk.temporary())
    weakref.finalize(owner, lambda: stack.close() if os.getpid() == process else None)  # a fork's end is not ours
    return directory


def spill(name: str, module: nn.Module, kept: Iterable[torch.Tensor], directory: Path | None) -> None:
    """Writes what the module `name` holds beside the `kept` tensors to a file in `directory`, and maps it from there.

    Nothing is done without a directory, nor for what is small.
    """
    kept_ids = {id(tensor) for tensor in kept}
    state = {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    state = {key: tensor for key, tensor in state.items() if id(tensor) not in kept_ids}
    if directory is None or sum(tensor.nbytes for tensor in state.values()) < _SMALL:
        return
    standing = mapped.file_regions(state)
    own = {key: tensor for key, tensor in state.items() if key not in standing and tensor.device.type == "cpu"}
    own = {key: tensor for key, tensor in own.items() if tensor.numel()}
    if not own:
        return
    names = {id(tensor): key for key, tensor in reversed(own.items())}  # a shared tensor is written once
    path = directory / f"new-{uuid.uuid4().hex}.safetensors"
    format.write_file(path, [TensorSource.made(names[id(t)], t) for t in {id(t): t for t in own.values()}.values()])
    with safe_open(path, framework="pt") as file:
        for tensor in {id(t): t for t in own.values()}.values():
            before = Shape.of(tensor)
            tensor.data = file.get_tensor(names[id(tensor)])
            assert Shape.of(tensor) == before
