"""Adapters on disk: saved with the digests of the base they belong to, loaded strictly and on no other base."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from solidify import places
from solidify.adapter import configured, kinds, standing
from solidify.adapter.adapters import train_parameters
from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.artifact import loading, manifest, tensors
from solidify.artifact.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.weights import format, hashing

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def save_adapter(
    model: PeftModel, directory: str | Path, *, name: str = "default", recipe: dict[str, Any] | None = None
) -> Path:
    """Writes one adapter, with the digests of the artifact it belongs to; plain PEFT can load it too.

    `recipe` is kept in its manifest.

    Raises:
        AdapterError: the model's base is not an artifact that stands where it was loaded from, or is no longer the one
            that was loaded; or `name` is not an adapter of the model.
        ArtifactError: `directory` exists and is not ours.
    """
    directory = Path(directory)
    if name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {name!r}; it has: {', '.join(model.peft_config)}")
    if (fault := kinds.model_fault(model.peft_config[name])) is not None:
        raise AdapterError(f"the adapter {name!r} cannot be saved: {fault}")
    base_directory, base = _base_of(model)
    with places.staged(directory) as staging:
        model.save_pretrained(staging, selected_adapters=[name], save_embedding_layers=False)
        if name != "default":  # PEFT puts adapters of other names into a directory of their own
            for file in (staging / name).iterdir():
                file.rename(staging / file.name)
            shutil.rmtree(staging / name)
        (staging / "README.md").unlink(missing_ok=True)
        keys = _keys_on_disk(model, _trained(model, name)["parameters"])
        state = {keys.get(k, k): t for k, t in safetensors.torch.load_file(staging / WEIGHTS).items()}
        state = _in_base_dtype(state, standing.plain_model(model))
        safetensors.torch.save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
        configuration = PeftConfig.from_pretrained(staging)
        configuration.base_model_name_or_path = str(base_directory)
        configuration.save_pretrained(staging)
        Manifest(
            kind="adapter",
            base={
                **base.digest(),
                "path": str(base_directory),
                "relative": os.path.relpath(base_directory, directory.resolve()),
            },
            trained=_trained(model, name),
            files={CONFIG: hashing.digest_bytes((staging / CONFIG).read_bytes())},
            tensors=tensors.digests(state.items()),
            headers={WEIGHTS: format.header_digest(staging / WEIGHTS)},
            versions=manifest.current_versions(),
            recipe=recipe,
        ).write(staging)
    return directory


def _trained(model: PeftModel, adapter: str) -> dict[str, list[str]]:
    """Names what one adapter trains: LoRA targets, everything trained in full, and the bare parameters among those."""
    holder = standing.trained_parameters(model)
    bare = holder.names(adapter) if holder is not None else []
    targets = {
        standing.canonical(model, path)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and adapter in module._all_available_adapter_names()
    }
    copies = {
        standing.canonical(model, path) + "." + key
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for key, _ in module.modules_to_save[adapter].named_parameters()
    }
    return {"lora": sorted(targets), "full": sorted(copies | set(bare)), "parameters": sorted(bare)}


def _base_of(model: nn.Module) -> tuple[Path, Manifest]:
    plain = standing.plain_model(model)
    where = plain.config._name_or_path if isinstance(plain, PreTrainedModel) else None
    record = manifest.read(Path(where)) if where and (Path(where) / manifest.NAME).is_file() else None
    if not where or record is None or record.kind != "artifact":
        raise AdapterError(
            f"the model's base ({where or 'made in memory'}) is not an artifact, so nothing could tell later whether "
            "the adapter fits; build it first and load it with solidify.load"
        )
    return Path(where).resolve(), record


def _keys_on_disk(model: PeftModel, names: Sequence[str]) -> dict[str, str]:
    """Maps the holder's keys of bare parameters to where PEFT's tree has them, so that plain PEFT loads them too."""
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    owners = {place.name: place.inner for place in standing.modules(model)}
    result = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        result[f"base_model.model.{PARAMETERS}.{name}"] = paths[id(owners[owner]._parameters[attribute])]
    return result


def _in_base_dtype(state: Mapping[str, torch.Tensor], plain: nn.Module) -> dict[str, torch.Tensor]:
    """Stores what is trained in full in the dtype of what it replaces (training may use float32 for bfloat16)."""
    own = dict(plain.state_dict(keep_vars=True))
    own |= {_plain_name(name): tensor for name, tensor in own.items()}
    result = {}
    for key, tensor in state.items():
        base = own.get(key.removeprefix("base_model.model."))
        result[key] = tensor if base is None else tensor.to(base.dtype)
    return result


def _plain_name(name: str) -> str:
    return re.sub(r"\.(original_module|base_layer)(?=\.)", "", name)


def load_adapter(
    model: nn.Module, directory: str | Path, *, name: str = "default", trainable: bool = False
) -> PeftModel:
    """Puts a trained adapter on its base, in place, and makes it the active one.

    `model` is the artifact's model, or a PeftModel that already carries other adapters of the same base.

    Raises:
        AdapterError: the adapter was trained on another base (the message says what differs), is incomplete or was
            changed, or `name` is taken.
    """
    directory = Path(directory).resolve()
    record = manifest.read(directory, "adapter")
    refuse(AdapterError, f"{directory} is not what was written", manifest.faults(directory, record, card=False))
    refuse_wrong_base(model, record, directory)
    existing = standing.peft_model(model)
    if existing is not None and name in existing.peft_config:
        raise AdapterError(f"the model already has an adapter {name!r}; give this one another name")
    configuration = configured.read(directory)
    configuration.inference_mode = not trainable
    if existing is None:
        peft_model = get_peft_model(model, configuration, adapter_name=name)
    else:
        peft_model = existing
        peft_model.add_adapter(name, configuration)
    state = safetensors.torch.load_file(directory / WEIGHTS)
    train_parameters(peft_model, record.trained["parameters"], name)
    keys = {on_disk: held for held, on_disk in _keys_on_disk(peft_model, record.trained["parameters"]).items()}
    refuse(AdapterError, f"{directory} does not fit the model", _key_faults(held(peft_model, name), state))
    set_peft_model_state_dict(
        peft_model, {keys.get(key, key): tensor for key, tensor in state.items()}, adapter_name=name
    )
    peft_model.set_adapter(name, inference_mode=not trainable)
    refuse(AdapterError, f"{directory} was not loaded completely", _load_faults(peft_model, state, name))
    return peft_model.train(trainable)


def _load_faults(model: PeftModel, state: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """Compares what the model now holds for this adapter, tensor by tensor, with what the file holds."""
    places = held(model, name)
    changed = [key for key, tensor in state.items() if not torch.equal(places[key].to(tensor.dtype).cpu(), tensor)]
    return [f"{key} differs after loading" for key in changed]


def held(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Returns the adapter's tensors in the model, the very parameters, by their keys on disk."""
    state = model.state_dict(keep_vars=True)
    found = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
    holder = standing.trained_parameters(model)
    keys = _keys_on_disk(model, holder.names(name) if holder is not None else [])
    return {keys.get(key, key): tensor for key, tensor in found.items()}


def _key_faults(held: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Compares names and shapes: PEFT passes over additional tensors and only warns of missing ones."""
    return [
        *(f"the file lacks {key}" for key in held if key not in state),
        *(f"the file holds {key}, for which the model has no place" for key in state if key not in held),
        *(
            f"{key} has shape {list(tensor.shape)} in the file and {list(held[key].shape)} in the model"
            for key, tensor in state.items()
            if key in held and held[key].shape != tensor.shape
        ),
    ]


def refuse_wrong_base(model: nn.Module, record: Manifest, directory: Path) -> None:
    """Raises AdapterError with what differs when the model is not the artifact that the adapter was trained on."""
    try:
        base_directory, base = _base_of(model)
    except ArtifactError as error:
        raise AdapterError(str(error)) from error
    found = base.digest()
    words = {
        "configuration": "its configuration is another",
        "code": "its modules' source is another",
        "weights": "its weights are others",
    }
    faults = [word for key, word in words.items() if record.base.get(key) != found[key]]
    refuse(
        AdapterError,
        f"the adapter {directory} was trained on another base than {base_directory} "
        f"(it was trained on {record.base.get('path')})",
        faults,
    )


def load(
    directory: str | Path,
    adapter: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Loads an artifact, and an adapter on it when one is named; digests are verified before any code runs.

    Raises:
        ArtifactError, AdapterError: as `load_artifact` and `load_adapter`.
    """
    model = loading.load_artifact(directory, trust_remote_code=trust_remote_code, **options)
    return model if adapter is None else load_adapter(model, adapter)


def find_base(record: Manifest, adapter: Path) -> Path:
    """Returns the directory of the artifact that an adapter belongs to, as its manifest says.

    Raises:
        AdapterError: it is at neither of the recorded places.
    """
    tried: list[Path] = [Path(record.base["path"]), (adapter / record.base.get("relative", ".")).resolve()]
    for candidate in tried:
        if (candidate / manifest.NAME).is_file() and manifest.read(candidate).kind == "artifact":
            return candidate
    raise AdapterError(
        f"the base of {adapter} is not at {' nor at '.join(dict.fromkeys(map(str, tried)))}; say where it is (--base)"
    )
