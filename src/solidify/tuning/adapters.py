"""Attach, save, load, switch and merge: five verbs over PEFT, each strict about names and about the base."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from solidify import console, places
from solidify.artifact import loading, manifest, tensors
from solidify.artifact.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.tuning import plan as planning
from solidify.tuning import standing
from solidify.tuning.parameters import NAME as PARAMETERS
from solidify.tuning.parameters import TrainedParameters
from solidify.tuning.plan import AdapterPlan

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def attach(
    model: PreTrainedModel,
    *,
    lora: Mapping[str, Any] | None = None,
    train: str | Sequence[str] = (),
    name: str = "default",
) -> PeftModel:
    """Puts a fresh adapter on the model, in place, and returns PEFT's model around it.

    `lora` holds PEFT's own fields; its `target_modules` (and `target_parameters`) are full names or patterns, as for
    surgery. `train` names modules or parameters that are trained in full. Either may be left out. The plan is printed
    (on stderr), and what PEFT then trains is compared with it by name.

    Raises:
        AdapterError: the declaration does not fit the model (see `solidify.tuning.plan`), or PEFT made something else
            trainable than was declared.
    """
    existing = standing.peft_model(model)
    if existing is not None and name in existing.peft_config:
        raise AdapterError(f"the model already has an adapter {name!r}; give the new one another name")
    wanted = planning.plan(model, lora, train)
    console.words.print(wanted.table())
    configuration = _configuration(model, lora, wanted)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)  # by which PEFT says that a name hit nothing
            peft_model = _inject(model, existing, configuration, name)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise AdapterError(f"PEFT refuses the adapter: {error}") from error
    _freeze_inside(peft_model, wanted, name)
    _train_parameters(peft_model, wanted.parameters, name)
    faults = planning.compare(peft_model, wanted)
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            faults.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if faults and existing is None:
        peft_model.unload()
    refuse(AdapterError, "PEFT did not do what was declared", faults)
    return peft_model


def _inject(model: Any, existing: PeftModel | None, configuration: LoraConfig, name: str) -> PeftModel:
    if existing is None:
        return get_peft_model(model, configuration, adapter_name=name)
    existing.add_adapter(name, configuration)
    existing.set_adapter(name)
    return existing


def _freeze_inside(model: PeftModel, wanted: AdapterPlan, adapter: str) -> None:
    """Freezes again, in the trained copies, what a module's own code had frozen: PEFT makes all of a copy trainable."""
    copies = [
        (f"{standing.canonical(model, path)}.{key}", parameter)
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for key, parameter in module.modules_to_save[adapter].named_parameters()
    ]
    trained = {id(parameter) for name, parameter in copies if name in wanted.full}  # tied copies have two names
    for _, parameter in copies:
        parameter.requires_grad_(id(parameter) in trained)


def _configuration(model: nn.Module, lora: Mapping[str, Any] | None, wanted: AdapterPlan) -> LoraConfig:
    fields = dict(lora or {})
    fields.pop("exclude_modules", None)
    try:
        return LoraConfig(
            **{
                **fields,
                # PEFT refuses an adapter without low-rank targets unless they are this private word (peft 0.21).
                "target_modules": _exact(wanted.lora_modules, model)
                or ([] if wanted.lora_parameters else DUMMY_TARGET_MODULES),
                "target_parameters": list(wanted.lora_parameters) or None,
                "modules_to_save": list(wanted.modules) or None,
                "task_type": fields.get("task_type") or _task_type(model),
                # A tied pair stays tied when one of them is trained, unless the user says otherwise.
                "ensure_weight_tying": fields.get("ensure_weight_tying", _trains_tied(model, wanted)),
            }
        )
    except (TypeError, ValueError) as error:
        raise AdapterError(f"LoRA: {error}") from error


def _trains_tied(model: nn.Module, wanted: AdapterPlan) -> bool:
    plain = standing.plain_model(model)
    tied = plain.all_tied_weights_keys if isinstance(plain, PreTrainedModel) else {}
    names = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    return any(module in names for module in (*wanted.modules, *wanted.lora_modules))


def _exact(names: Sequence[str], model: nn.Module) -> list[str] | str:
    """Returns names so that PEFT cannot read them as ends of longer ones: a list, or a regular expression."""
    everywhere = [place.name for place in standing.modules(model)]
    endings = tuple("." + name for name in names)
    if endings and any(name.endswith(endings) for name in everywhere):
        return "|".join(re.escape(name) for name in names)
    return list(names)


def _task_type(model: nn.Module) -> str | None:
    """Returns PEFT's task type for the model's head, so that PeftModel has its methods; None for other heads."""
    name = type(standing.plain_model(model)).__name__
    for ending, task in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
    ):
        if name.endswith(ending):
            return task
    return None


def _train_parameters(model: PeftModel, names: Sequence[str], adapter: str) -> None:
    """Gives the named bare parameters a version of their own for this adapter."""
    if not names:
        return
    owners = {place.name: place.inner for place in standing.modules(model)}
    wanted = {name: owners[name.rpartition(".")[0]] for name in names}
    holder = standing.trained_parameters(model)
    if holder is None:
        standing.plain_model(model).add_module(PARAMETERS, TrainedParameters(wanted, adapter))
    else:
        holder.update(adapter, owners=wanted)


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
            files={CONFIG: tensors.digest_bytes((staging / CONFIG).read_bytes())},
            tensors=tensors.digests(state.items()),
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
    if not where or not (Path(where) / manifest.NAME).is_file():
        raise AdapterError(
            f"the model's base ({where or 'made in memory'}) is not an artifact, so nothing could tell later whether "
            "the adapter fits; build it first and load it with solidify.load"
        )
    return Path(where).resolve(), manifest.read(Path(where), "artifact")


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
    refuse(AdapterError, f"{directory} is not what was written", manifest.faults(directory, record))
    refuse_wrong_base(model, record, directory)
    existing = standing.peft_model(model)
    if existing is not None and name in existing.peft_config:
        raise AdapterError(f"the model already has an adapter {name!r}; give this one another name")
    configuration = PeftConfig.from_pretrained(directory)
    configuration.inference_mode = not trainable
    if existing is None:
        peft_model = get_peft_model(model, configuration, adapter_name=name)
    else:
        peft_model = existing
        peft_model.add_adapter(name, configuration)
    state = safetensors.torch.load_file(directory / WEIGHTS)
    _train_parameters(peft_model, record.trained["parameters"], name)
    keys = {on_disk: held for held, on_disk in _keys_on_disk(peft_model, record.trained["parameters"]).items()}
    refuse(AdapterError, f"{directory} does not fit the model", _key_faults(_held(peft_model, name), state))
    set_peft_model_state_dict(
        peft_model, {keys.get(key, key): tensor for key, tensor in state.items()}, adapter_name=name
    )
    peft_model.set_adapter(name, inference_mode=not trainable)
    refuse(AdapterError, f"{directory} was not loaded completely", _load_faults(peft_model, state, name))
    return peft_model.train(trainable)


def _load_faults(model: PeftModel, state: Mapping[str, torch.Tensor], name: str) -> list[str]:
    """Compares what the model now holds for this adapter, tensor by tensor, with what the file holds."""
    held = _held(model, name)
    changed = [key for key, tensor in state.items() if not torch.equal(held[key].to(tensor.dtype).cpu(), tensor)]
    return [f"{key} differs after loading" for key in changed]


def _held(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Returns the adapter's tensors in the model, by their keys on disk."""
    held = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    holder = standing.trained_parameters(model)
    keys = _keys_on_disk(model, holder.names(name) if holder is not None else [])
    return {keys.get(key, key): tensor for key, tensor in held.items()}


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


def merge_in_memory(model: PeftModel) -> PreTrainedModel:
    """Folds the active adapter into its base, in place, and returns the plain model.

    Raises:
        AdapterError: a merged or trained tensor is not finite.
    """
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"the adapter cannot be merged: {error}") from error
    plain._modules.pop(PARAMETERS, None)
    broken = [n for n, t in plain.state_dict().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    refuse(AdapterError, "the merged model is not finite", [f"{name} holds NaN or infinity" for name in broken])
    return plain


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Runs the plain base while the block lasts: adapters disabled, and modules that have `bypass` bypassed."""
    peft_model = standing.peft_model(model)
    bypassing: list[Any] = [m for m in model.modules() if isinstance(vars(m).get("bypass"), bool)]
    before = [(module, module.bypass) for module in bypassing]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in bypassing:
        module.bypass = True
    try:
        if peft_model is None:
            yield
        else:
            with peft_model.disable_adapter():
                yield
    finally:
        for module, value in before:
            module.bypass = value
        for parameter, flag in trainable:  # enabling again, PEFT makes all of a trained copy trainable
            parameter.requires_grad_(flag)
