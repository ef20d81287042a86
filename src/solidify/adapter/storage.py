"""Adapters on disk: saved with the digests of the base they belong to, loaded strictly and on no other base."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig, PeftModel
from torch import nn

from solidify.adapter import (
    adapter_tensors,
    base_state,
    configured,
    expert_files,
    foreign_adapter,
    kinds,
    lookup,
    patterns,
    readback,
    together,
    trial,
    verbs,
)
from solidify.adapter import plan as planning
from solidify.adapter.adapters import release_originals, train_parameters, without_heads
from solidify.artifact import autos, cards, quantizing, stock
from solidify.behaviour import calling
from solidify.directory import manifest, packages, results, writing
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError, refuse
from solidify.findings import Finding
from solidify.model import quantized
from solidify.model.extent import Extent
from solidify.surgery.transaction import transaction
from solidify.system import console, files, foreign
from solidify.upstream.bitsandbytes import keep_as_quantized
from solidify.upstream.peft import put_on
from solidify.weights import checkpoint, format, hashing
from solidify.weights.format import TensorSource

WEIGHTS = configured.WEIGHTS


def save_adapter(
    model: PeftModel,
    directory: str | Path,
    *,
    name: str = "default",
    recipe: dict[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    found: Sequence[Finding] = (),
) -> Path:
    """Writes one adapter, with the digests of the artifact it belongs to; plain PEFT can load it too.

    Before the directory gets its name, the adapter is loaded again, on a fresh base, and compared with the model: its
    tensors, and the outputs unless the model is large. `recipe` and the numbers `measured` are kept in its manifest,
    and what the hub reads of them stands in its card (README.md). Of what was `found` of the training, findings that
    failed are kept too, and every later command says them.

    Raises:
        AdapterError: the model's base is not an artifact that stands where it was loaded from, or is no longer the one
            that was loaded; `name` is not an adapter of the model; a trained number is NaN or infinite; or what was
            written does not come back.
        ArtifactError: `directory` exists and is not ours.
    """
    directory = Path(directory)
    if name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {name!r}; it has: {', '.join(model.peft_config)}")
    if (fault := kinds.model_fault(model.peft_config[name])) is not None:
        raise AdapterError(f"the adapter {name!r} cannot be saved: {fault}")
    base = base_state.require(model)
    base_state.refuse_changed(model, base)
    trained = adapter_tensors.list_trained(model, name)
    state = adapter_tensors.in_base_dtype(
        adapter_tensors.held(model, name, trained["buffers"]), base_state.base_tensors(model)
    )
    refuse(
        AdapterError,
        "the adapter is not saved: training has diverged",
        adapter_tensors.find_not_finite(model, name, trained["buffers"]),
    )
    with writing.staged(directory, [base.directory]) as staging:
        digests = format.write_file(
            staging / WEIGHTS, [TensorSource.made(key, tensor) for key, tensor in state.items()]
        )
        configuration = _make_configuration(model, name, base.directory)
        configuration.save_pretrained(staging, auto_mapping_dict=configuration.auto_mapping)
        draft = Manifest(
            kind="adapter",
            base={
                **base.record.digest(),
                "path": str(base.directory),
                "relative": os.path.relpath(base.directory, directory.resolve()),
                **_quantization(model),
            },
            lineage=[cards.training_step(recipe, measured)],
            trained=trained,
            tensors=digests,
            headers={WEIGHTS: format.header_digest(staging / WEIGHTS)},
            versions=packages.current_versions(),
            recipe=recipe,
            failed=_collect_failed(model, name, base.record, found),
        )
        _write_card(staging, draft, base)
        replace(
            draft,
            files={name: hashing.digest_file(staging / name) for name in (manifest.ADAPTER_CONFIG, manifest.CARD)},
        ).write(staging)
        readback.refuse_lossy(
            model, name, staging, base, load_adapter, lambda m: _named_held(m, name, trained["buffers"])
        )
    return directory


def _collect_failed(model: PeftModel, name: str, base: Manifest, found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Returns what failed of the base, of the adapter that was loaded under this name, and now; each once."""
    tuner = model.base_model
    loaded = tuner.failed(name) if isinstance(tuner, verbs.LoraVerbs) else []
    return results.join_failed(base.failed, loaded, results.failed_of(found))


def _quantization(model: nn.Module) -> dict[str, str]:
    """Returns how the base is quantised on which an adapter was trained; nothing where it is not."""
    plain: Any = lookup.plain_model(model)
    if not quantized.is_quantized(plain):
        return {}
    return {"quantization": quantizing.record(plain.config.quantization_config)}


def _write_card(staging: Path, draft: Manifest, base: base_state.Base) -> None:
    """Writes the model card of an adapter that is being saved; PEFT's own would name the base by its path."""
    configuration = files.document(staging / manifest.ADAPTER_CONFIG)
    auto = autos.auto_class(base.directory)
    (staging / manifest.CARD).write_text(cards.adapter_card(draft, configuration, base.record, auto), encoding="utf-8")


def _make_configuration(model: PeftModel, name: str, base: Path) -> PeftConfig:
    """Returns an adapter's configuration as PEFT writes it: for use, on the artifact as it stands."""
    configuration = deepcopy(model.peft_config[name])
    configuration.base_model_name_or_path = str(base)
    configuration.inference_mode = True
    if configuration.task_type is None:
        head = type(lookup.plain_model(model))
        configuration.auto_mapping = {"base_model_class": head.__name__, "parent_library": head.__module__}
    return configuration


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    layout: str | None = None,
) -> PeftModel:
    """Puts a trained adapter on its base, in place, and makes it the active one.

    `model` is the artifact's model, or a PeftModel that already carries other adapters of the same base.

    An adapter that plain PEFT wrote (a trainer's `checkpoint-500`, too) is put on any model that all its tensors fit.
    Nothing tells on which weights it was trained; that this was not looked at is printed. Its experts may have the
    layout of another trainer (docs/expert_lora.md); which one was found is printed too. `layout` says it (`peft`,
    `grouped`) where the files do not tell.

    Raises:
        AdapterError: the adapter was trained on another base (the message says what differs), is incomplete or was
            changed, `name` is taken, or the layout of its experts is not known. The model is then as it was.
    """
    directory = Path(directory).resolve()
    keep_as_quantized(model)
    if foreign_adapter.is_one(directory):
        return _put_plain(model, directory, name, trainable=trainable, layout=layout)
    expert_files.refuse_layout(directory, layout)
    record = manifest.read(directory, "adapter", closed=False)
    with checkpoint.steady([directory / file for file in record.listed()]):
        refuse(AdapterError, f"{directory} is not what was written", manifest.faults(directory, record, card=False))
        return _put_on(model, directory, record, name, trainable=trainable)


def _put_on(model: nn.Module, directory: Path, record: Manifest, name: str, *, trainable: bool) -> PeftModel:
    """Puts an adapter, whose files were compared with its manifest, on a model."""
    together.refuse_taken(model, name)
    refuse_wrong_base(model, record, directory)
    base_state.refuse_changed(model, base_state.require(model))
    return _inject(model, directory, record, name, trainable=trainable)


def _put_plain(model: nn.Module, directory: Path, name: str, *, trainable: bool, layout: str | None) -> PeftModel:
    """Puts an adapter that plain PEFT wrote on a model, and says what nothing tells of it."""
    foreign_adapter.require_weights(directory)
    together.refuse_taken(model, name)
    if (base := base_state.find(model)) is not None:
        base_state.refuse_changed(model, base)
    with expert_files.in_own_layout(directory, model, layout) as own:
        record = foreign_adapter.describe(own.directory)
        found = _inject(model, own.directory, record, name, trainable=trainable, named=directory)
    console.words.print(foreign_adapter.unverified(directory, lookup.plain_model(model)))
    if own.words:
        console.words.print(f"{directory}: {own.words}")
    return found


def _inject(
    model: nn.Module, directory: Path, record: Manifest, name: str, *, trainable: bool, named: Path | None = None
) -> PeftModel:
    """Has PEFT put an adapter on a model, fills it, and compares; all or nothing. `named` is what errors call it."""
    named = named or directory
    existing = lookup.peft_model(model)
    configuration = configured.read(directory, model)
    base = base_state.find(model) if record.base else None  # by digests; PEFT would warn that its path is another
    configuration.base_model_name_or_path = str(base.directory) if base is not None else None
    configuration.inference_mode = not trainable
    configuration.task_type = without_heads(configuration.task_type)
    bare, moved = record.trained["parameters"], record.trained.get("buffers", [])
    probe = trial.inputs(model)
    trial.refuse_read_past(model, record.trained["lora"], probe)
    with calling.chance_kept_at_failure(), transaction(existing if existing is not None else model, Extent.of(model)):
        puts = foreign.calling(f"PEFT refuses the adapter {named}", AdapterError)
        with puts, patterns.without_false_alarms(configuration):
            if existing is None:
                peft_model = put_on(model, configuration, name)
            else:
                rows = record.trained.get("tokens", [])
                copied = configuration.modules_to_save or ()
                together.refuse_overlaps(existing, record.trained["lora"], copied, bare, rows)
                peft_model = existing
                peft_model.add_adapter(name, configuration)
        verbs.take_over(peft_model, frozen=planning.frozen_at_surgery(peft_model))
        state = safetensors.torch.load_file(directory / WEIGHTS)
        train_parameters(peft_model, bare, name)
        refuse(
            AdapterError,
            f"{named} does not fit the model",
            adapter_tensors.key_faults(adapter_tensors.held(peft_model, name, moved), state),
        )
        adapter_tensors.fill(peft_model, state, name, bare, moved)
        peft_model.set_adapter(name, inference_mode=not trainable)
        refuse(
            AdapterError,
            f"{named} was not loaded completely",
            adapter_tensors.load_faults(peft_model, state, name, moved),
        )
        trial.refuse_without_effect(peft_model, name, probe)
    peft_model.base_model.note_failed(name, record.failed)
    release_originals(peft_model)
    return peft_model.train(trainable)


def _named_held(model: PeftModel, name: str, buffers: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter in the model that it is from, or in the one on which it was loaded alone."""
    return adapter_tensors.held(model, name if name in model.peft_config else "default", buffers)


def refuse_wrong_base(model: nn.Module, record: Manifest, directory: Path) -> None:
    """Raises AdapterError with what differs when the model is not the artifact that the adapter was trained on."""
    of_artifact = record.base.get("code") != hashing.digest_values({})
    base = base_state.require(model, plain=not of_artifact)
    found = base.record.digest()
    faults = [word for key, word in base_state.WORDS.items() if record.base.get(key) != found[key]]
    refuse(
        AdapterError,
        f"the adapter {directory} was trained on another base than {base.directory} "
        f"(it was trained on {record.base.get('path')})",
        faults,
    )


def load_with_adapter(
    directory: str | Path,
    adapter: str | Path,
    *,
    trust_remote_code: bool = False,
    quantization: quantizing.Asked | None = None,
    keep: str | Sequence[str] = (),
    layout: str | None = None,
    **options: Any,
) -> PeftModel:
    """Loads an artifact or a plain model, and an adapter on it, as `solidify.load` says.

    Raises:
        ArtifactError, AdapterError, ModelError: as `solidify.load`.
    """
    if quantization is not None:
        keep = [*([keep] if isinstance(keep, str) else keep), *_trained_apart(Path(adapter))]
    asked: dict[str, Any] = {"trust_remote_code": trust_remote_code, "quantization": quantization, "keep": keep}
    return load_adapter(stock.load(directory, **asked, **options), adapter, layout=layout)


def _trained_apart(adapter: Path) -> list[str]:
    """Names the parameters of the base that an adapter replaces, or changes itself: no packed one can stand there."""
    if foreign_adapter.is_one(adapter):
        return foreign_adapter.list_apart(adapter)
    trained = manifest.read(adapter.resolve(), "adapter", closed=False).trained
    updated = [name for name in trained["lora"] if name.rpartition(".")[2] in ("weight", "bias")]
    return [name for name in (*trained["full"], *updated) if name not in trained.get("buffers", [])]


def find_base(record: Manifest, adapter: Path) -> Path:
    """Returns the directory of the artifact that an adapter belongs to, as its manifest says.

    Raises:
        AdapterError: it is at neither of the recorded paths.
    """
    tried: list[Path] = [Path(record.base["path"]), (adapter / record.base.get("relative", ".")).resolve()]
    for candidate in tried:
        held = files.is_file(candidate / manifest.NAME)
        if (held and manifest.read(candidate, closed=False).kind in manifest.MODELS) or stock.is_plain(candidate):
            return candidate
    raise AdapterError(
        f"the base of {adapter} is not at {' nor at '.join(dict.fromkeys(map(str, tried)))}; say where it is (--base)"
    )
