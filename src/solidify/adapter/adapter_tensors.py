"""The tensors of one adapter in a model, by their keys on disk, and the names of what it trains.

PEFT's tree of names is what is on disk, so that plain PEFT loads it too; parameters and buffers that are trained alone
stand elsewhere in memory (`parameters.py`, `buffers.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from solidify.adapter import lookup, together, tokens
from solidify.adapter.buffers import NAME as BUFFERS
from solidify.adapter.parameters import NAME as PARAMETERS


def held(model: PeftModel, name: str, buffers: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Returns the adapter's tensors in the model, the very ones, by their keys on disk.

    `buffers` names those of the plain model's buffers of which the adapter's version counts.
    """
    state = model.state_dict(keep_vars=True)
    found = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
    holder = lookup.trained_parameters(model)
    keys = _keys_on_disk(model, holder.names(name) if holder is not None else [], PARAMETERS, name)
    keys |= _keys_on_disk(model, buffers, BUFFERS, name)
    own = f"base_model.model.{BUFFERS}."
    return {keys.get(key, key): t for key, t in found.items() if key in keys or not key.startswith(own)}


def _keys_on_disk(model: PeftModel, names: Sequence[str], holder: str, adapter: str) -> dict[str, str]:
    """Maps a holder's keys of parameters or buffers to where PEFT's tree has them; plain PEFT then loads them too."""
    result = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        result[f"base_model.model.{holder}.{name}"] = f"{lookup.path_alone(model, owner, adapter)}.{attribute}"
    return result


def fill(
    model: PeftModel, state: Mapping[str, torch.Tensor], name: str, bare: Sequence[str], moved: Sequence[str]
) -> None:
    """Puts the tensors of a file into an adapter; buffers that the file does not hold stay the base's."""
    keys = {disk: held for held, disk in _keys_on_disk(model, bare, PARAMETERS, name).items()}
    keys |= {disk: held for held, disk in _keys_on_disk(model, moved, BUFFERS, name).items()}
    values = {keys.get(key, key): tensor for key, tensor in state.items()}
    set_peft_model_state_dict(model, values, adapter_name=name)


def in_base_dtype(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stores what is trained in full in the dtype of what it replaces (training may use float32 for bfloat16)."""
    result = {}
    for key, tensor in state.items():
        base = own.get(_plain_name(key.removeprefix("base_model.model.")))
        result[key] = tensor.detach() if base is None else tensor.detach().to(base.dtype)
    return result


def _plain_name(name: str) -> str:
    return re.sub(r"\.(original_module|base_layer)(?=\.)", "", name)


def find_not_finite(model: PeftModel, name: str, buffers: Sequence[str]) -> list[str]:
    """Names every tensor of an adapter that holds NaN or infinity, and how many of its numbers are."""
    faults = []
    for key, tensor in held(model, name, buffers).items():
        bad = int((~torch.isfinite(tensor.detach())).sum()) if tensor.is_floating_point() else 0
        if bad:
            what = key.removeprefix("base_model.model.")
            faults.append(f"{what} holds NaN or infinity ({bad} of {tensor.numel()} numbers)")
    return faults


def key_faults(held: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Compares names and shapes: PEFT passes over additional tensors and only warns of missing ones."""
    return [
        *(f"the file lacks {key}" for key in held if key not in state),
        *(f"the file holds {key}, which the model does not have" for key in state if key not in held),
        *(
            f"{key} has shape {list(tensor.shape)} in the file and {list(held[key].shape)} in the model"
            for key, tensor in state.items()
            if key in held and held[key].shape != tensor.shape
        ),
    ]


def load_faults(model: PeftModel, state: Mapping[str, torch.Tensor], name: str, buffers: Sequence[str]) -> list[str]:
    """Compares what the model now holds for this adapter, tensor by tensor, with what the file holds."""
    tensors = held(model, name, buffers)
    changed = [key for key, tensor in state.items() if not torch.equal(tensors[key].to(tensor.dtype).cpu(), tensor)]
    return [f"{key} differs after loading" for key in changed]


def list_trained(model: PeftModel, adapter: str) -> dict[str, list[str]]:
    """Names what one adapter trains: LoRA targets, everything trained in full, and the bare parameters among those.

    `tokens` are modules of which single rows are trained: adapter_config.json has the ids.
    """
    holder = lookup.trained_parameters(model)
    bare = holder.names(adapter) if holder is not None else []
    copies = {
        lookup.canonical(model, path) + "." + key
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for key in _of_copy(module.modules_to_save[adapter], module.original_module)
    }
    versions = lookup.trained_buffers(model)
    moved = list(versions.moved(adapter)) if versions is not None else []
    return {
        "lora": together.targets(model, adapter),
        "full": sorted({*copies, *bare, *moved}),
        "parameters": sorted(bare),
        "buffers": sorted(moved),
        **({"tokens": sorted(rows)} if (rows := tokens.trained(model, adapter)) else {}),
    }


def _of_copy(copy: nn.Module, original: nn.Module) -> Iterator[str]:
    """Yields the names of a trained copy's parameters, and of the buffers that moved."""
    yield from (name for name, _ in copy.named_parameters())
    saved, own = set(copy.state_dict()), dict(original.named_buffers())
    yield from (n for n, b in copy.named_buffers() if n in saved and n in own and not torch.equal(b, own[n]))
