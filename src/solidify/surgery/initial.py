"""Initial weights of a new module, from a file: read without running code, and used to the last tensor."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.system import files, foreign


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """Reads initial weights from a safetensors or, tensors only, a torch file."""
    path = Path(path)
    if not os.path.exists(path):
        raise SurgeryError(f"the weights {path} do not exist")
    files.require_regular(path, SurgeryError)
    with foreign.calling(f"the weights {path} cannot be read", SurgeryError):
        if path.suffix == ".safetensors":
            loaded: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
            return loaded
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise SurgeryError(
                f"the weights {path} hold more than tensors, and reading them would run code; save a plain state_dict"
            ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise SurgeryError(f"the weights {path} hold no state_dict (names and tensors)")
    return state


def load(
    name: str, new: nn.Module, original: nn.Module, state: dict[str, torch.Tensor], names: Sequence[str]
) -> list[str]:
    """Loads initial weights strictly: every tensor of the file is used, every new tensor of the module is given."""
    if all(any(key.startswith(n + ".") for n in names) for key in state):
        state = {key.removeprefix(name + "."): t for key, t in state.items() if key.startswith(name + ".")}
    kept = {id(t) for t in (*original.parameters(), *original.buffers())}
    own = new.state_dict(keep_vars=True)
    faults = [f"{name}: the weights hold {key!r}, which {type(new).__name__} lacks" for key in state if key not in own]
    for key, tensor in own.items():
        if key not in state:
            if id(tensor) not in kept:
                faults.append(f"{name}: the weights lack {key!r}")
        elif state[key].shape != tensor.shape:
            faults.append(
                f"{name}: {key!r} has shape {list(state[key].shape)} in the weights, but {type(new).__name__} "
                f"needs {list(tensor.shape)}"
            )
    if not faults and not anatomy.is_meta(new):
        new.load_state_dict(state, strict=False)
    return faults
