"""New tensors go to a file as soon as they are made, and stay mapped from it: memory holds one module at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from safetensors import safe_open
from torch import nn

from solidify.weights import format, mapped
from solidify.weights.format import Shape, Supply

_SMALL = 2**20  # bytes
_directory: ContextVar[Path | None] = ContextVar("directory", default=None)


@contextmanager
def into(directory: Path) -> Iterator[None]:
    """While the block lasts, `spill` writes into a directory."""
    token = _directory.set(directory)
    try:
        yield
    finally:
        _directory.reset(token)


def spill(name: str, module: nn.Module, original: nn.Module) -> None:
    """Writes what a module at a place holds beside the tensors of the original to a file, and maps it from there.

    Nothing is done outside of `into`, nor for what is small.
    """
    directory = _directory.get()
    kept = {id(tensor) for tensor in original.state_dict(keep_vars=True).values()}
    state = {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    state = {key: tensor for key, tensor in state.items() if id(tensor) not in kept}
    if directory is None or sum(tensor.nbytes for tensor in state.values()) < _SMALL:
        return
    standing = mapped.places(state)
    own = {key: tensor for key, tensor in state.items() if key not in standing and tensor.device.type == "cpu"}
    own = {key: tensor for key, tensor in own.items() if tensor.numel()}
    if not own:
        return
    names = {id(tensor): key for key, tensor in reversed(own.items())}  # a shared tensor is written once
    path = directory / f"new-{len(list(directory.iterdir())):05d}.safetensors"
    format.write_file(path, [Supply.made(names[id(t)], t) for t in {id(t): t for t in own.values()}.values()])
    with safe_open(path, framework="pt") as file:
        for tensor in {id(t): t for t in own.values()}.values():
            before = Shape.of(tensor)
            tensor.data = file.get_tensor(names[id(tensor)])
            assert Shape.of(tensor) == before
