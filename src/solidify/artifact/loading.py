"""From disk to memory: a base model as transformers gives it, or an artifact whose digests were verified first."""

from __future__ import annotations

import errno
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ADAPTER_CONFIG_NAME

from solidify.artifact import autos, companions, conversion, quantizing
from solidify.artifact.conversion import Scratch
from solidify.artifact.preparing import has_file, open_artifact, read_processor, read_tokenizer, require_packages
from solidify.artifact.preparing import load_processor as load_processor
from solidify.artifact.preparing import load_tokenizer as load_tokenizer
from solidify.artifact.preparing import tokenizer_in as tokenizer_in
from solidify.directory import manifest, private, trust
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, ModelError, SolidifyError, refuse
from solidify.source import ownership
from solidify.surgery import ledger
from solidify.system import files, foreign
from solidify.upstream.bitsandbytes import keep_as_quantized
from solidify.upstream.transformers import implementations, without_conversion
from solidify.weights import checkpoint
from solidify.weights.hashing import digest_bytes

ORIGIN = "_artifact_digest"  # attribute of a loaded model: the digest of the artifact that it was loaded from


_PERMIT = (
    "read it, and to run it give --trust-remote-code (in Python trust_remote_code=True, in a recipe "
    "base.trust_remote_code: true)"
)


@dataclass(frozen=True)
class BaseModel:
    """A pretrained model, its tokenizer (None where it has none) and where both came from.

    `processor` is what prepares more than text, or other things (images, sound): None where the tokenizer is all.
    """

    model: PreTrainedModel
    tokenizer: Any
    origin: dict[str, Any]
    processor: Any = None


def load_base(
    reference: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    scratch: Scratch | None = None,
    quantized: bool = False,
    options: Mapping[str, Any] | None = None,
) -> BaseModel:
    """Loads a pretrained model from a hub id, a directory or an artifact, with the head that its configuration names.

    With `device="meta"` nothing is read but the configuration. The class is one of transformers', or, with
    `trust_remote_code`, one that the model brings itself. With `scratch`, a large model that is not stored as it stands
    in memory is converted there, tensor by tensor, and mapped from there. One whose files are quantised is taken only
    with `quantized`: what is made of it (surgery) needs the base's own numbers, a teacher does not. `options` are
    transformers' own.

    Raises:
        ModelError: there is no such model, its class is not known, its code may not run, its files are quantised, or
            not every tensor of its class was found in them.
        ArtifactError: it is an artifact that was changed since it was written.
    """
    _refuse_unknown(dtype)
    if not reference.strip():
        raise ModelError("the name of the model is empty; give a hub id, a directory, an artifact, or builtin:NAME")
    if reference.startswith((os.sep, ".", "~")) and not files.is_directory(reference):
        raise ModelError(
            f"the base {reference[:300]!r} cannot be loaded: there is no such directory; name one that holds a model, "
            "or a hub id"
        )
    if (kind := manifest.kind(Path(reference))) == "artifact":
        return _artifact_as_base(Path(reference), dtype, device, trust_remote_code)
    if kind == "adapter":
        raise ModelError(
            f"{reference} is an adapter, not a model; name a hub id, the directory of a model or an artifact (the one "
            "that the adapter was trained on, for example), or builtin:NAME"
        )
    if kind is not None:
        record = _refuse_changed(Path(reference), "stock")
        trust.require(record, Path(reference), trust_remote_code)
        trust_remote_code = trust_remote_code or bool(record.code)
    manifest.refuse_run(Path(reference))
    words: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    if files.is_directory(reference):
        files.document(Path(reference) / "config.json", ModelError)
    try:
        with nullcontext() if trust_remote_code else trust.never_asking():
            model, info, name = _read_model(reference, dtype, device, words, scratch, quantized, options or {})
    except Exception as error:
        if isinstance(error, SolidifyError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        said = foreign.said(error).removeprefix("OSError: ").removeprefix("ValueError: ")
        if not trust_remote_code and "trust_remote_code" in said:  # a configuration or a class of its own
            said = f"it brings code of its own; {_PERMIT}"
        raise ModelError(f"the base {reference!r} cannot be loaded: {said[:400]}") from error
    refuse(
        ModelError,
        f"the base {reference!r} is incomplete; its class would fill in random values",
        [f"{kind}: {', '.join(sorted(map(str, names))[:6])}" for kind, names in info.items() if names],
    )
    origin = {
        "model": reference,
        "revision": _find_commit(reference, revision) or revision,
        "class": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        **companions.rights(model.config),
    }
    processor = read_processor(reference, revision, trust_remote_code=trust_remote_code, needed=device != "meta")
    tokenizer = read_tokenizer(reference, revision, trust_remote_code=trust_remote_code)
    if quantized:
        keep_as_quantized(model)
    return BaseModel(model.eval(), tokenizer, origin, processor)


def _read_model(
    reference: str,
    dtype: str | None,
    device: str,
    options: dict[str, Any],
    scratch: Scratch | None,
    quantized: bool,
    more: Mapping[str, Any],
) -> tuple[PreTrainedModel, dict[str, Any], str]:
    """Returns a pretrained model, what transformers says that its files lack or have more, and the class's name."""
    trusted = options["trust_remote_code"]
    if has_file(reference, ADAPTER_CONFIG_NAME, options["revision"]):
        raise ModelError(
            f"the base {reference!r} holds an adapter too ({ADAPTER_CONFIG_NAME}), which transformers would put on it; "
            "merge that first (`solidify merge`), or remove the file"
        )
    config = AutoConfig.from_pretrained(reference, **options)
    if not quantized:
        quantizing.refuse_quantized(config, reference)
    named = config.architectures if isinstance(config.architectures, list) else []
    name = next((each for each in named if isinstance(each, str)), "")
    head = _find_head(reference, config, name, trusted)
    if not trusted:
        _refuse_kernels(reference, config)
    if device == "meta":
        return on_meta(head, config, dtype, trust_remote_code=trusted), {}, name
    where = conversion.converted(reference, head, config, dtype, options, scratch) if scratch else reference
    with without_conversion() if where != reference else nullcontext():
        model, info = head.from_pretrained(
            where,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{"dtype": dtype or "auto", **options, **more},
        )  # what is mismatched is in `info`, and refused by the caller
    model.config.name_or_path = reference
    return model, info, name


def _refuse_unknown(dtype: str | None) -> None:
    found = getattr(torch, dtype, None) if dtype is not None else torch.float32
    if not isinstance(found, torch.dtype):
        raise ModelError(f"the dtype is {dtype!r}, which torch does not know; write float32, bfloat16 or float16")
    if not found.is_floating_point:
        raise ModelError(
            f"the dtype is {dtype!r}, which is not a floating-point type; write float32, bfloat16 or float16"
        )


def _find_commit(reference: str, revision: str | None) -> str | None:
    """Returns the commit of the hub that a base was taken from; None for a directory."""
    if files.is_directory(reference):
        return None
    cached = try_to_load_from_cache(reference, "config.json", revision=revision or "main")
    return Path(cached).parent.name if isinstance(cached, str) else None


def _find_head(reference: str, config: Any, name: str, trust_remote_code: bool) -> Any:
    """Returns what loads the class that the configuration names: the class, or the Auto class that leads to it."""
    remote = vars(config).get("auto_map")
    for auto, class_reference in remote.items() if isinstance(remote, dict) else ():
        if str(class_reference).rpartition(".")[2] == name and autos.is_auto_class(auto):
            if not trust_remote_code:
                raise ModelError(f"the base {reference!r} has the class {name}, which is its own code; {_PERMIT}")
            return getattr(transformers, auto)
    head = getattr(transformers, name, None)
    if not (isinstance(head, type) and issubclass(head, PreTrainedModel)):
        raise ModelError(
            f"the base {reference!r} has {f'the class {name}' if name else 'no class name'}, which is not a model "
            "class of transformers"
        )
    if inspect.getattr_static(head, "__init__") is inspect.getattr_static(PreTrainedModel, "__init__"):
        raise ModelError(
            f"the base {reference!r} has the class {name}, which is a base class that models are derived from, not a "
            "model"
        )
    return head


def _refuse_kernels(reference: str, config: Any) -> None:
    """Refuses a base whose configuration names a repository as what computes: its code would be fetched and run."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            _refuse_kernels(reference, value)
    for kind, value in implementations(config):
        if any("/" in word for word in trust.texts(value)):
            raise ModelError(f"the base {reference!r} has {value!r} compute ({kind}), which is its own code; {_PERMIT}")


def on_meta(head: Any, config: Any, dtype: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model on the meta device, by its class, or by an Auto class, whose code runs if that is allowed."""
    with torch.device("meta"):
        if issubclass(head, PreTrainedModel):
            model: PreTrainedModel = head(config)
        else:
            model = head.from_config(config, trust_remote_code=trust_remote_code)
    return model.to(getattr(torch, dtype) if dtype else config.dtype or torch.float32)


def _refuse_changed(directory: Path, kind: str) -> Manifest:
    """Refuses a directory of ours whose files, but for its weights, are not what was written; returns its manifest."""
    record = manifest.read(directory, kind)
    faults = manifest.faults(directory, record, card=False, weights=False)
    refuse(ArtifactError, f"{directory} is not what was written", faults)
    return record


def _artifact_as_base(directory: Path, dtype: str | None, device: str, trust_remote_code: bool) -> BaseModel:
    options: dict[str, Any] = {"device_map": "meta"} if device == "meta" else {}
    options |= {"dtype": getattr(torch, dtype)} if dtype else {}
    return _load_with_companions(directory.resolve(), options, trust_remote_code, needed=device != "meta")


def load_for_looking(directory: Path) -> BaseModel:
    """Loads an artifact, whose code may run, with its tokenizer and what of its processor can be loaded.

    Raises:
        ArtifactError: as `load_artifact`.
    """
    return _load_with_companions(directory.resolve(), {}, trust_remote_code=False, needed=False)


def _load_with_companions(
    directory: Path, options: dict[str, Any], trust_remote_code: bool, *, needed: bool
) -> BaseModel:
    with open_artifact(directory, trust_remote_code) as (record, own):
        model = _load_model(directory, record, own, options)
        processor = read_processor(str(own), None, trust_remote_code=True, needed=needed)
        tokenizer = read_tokenizer(str(own), None, trust_remote_code=True)
        for thing in (processor, tokenizer):
            private.point_back(thing, own, directory)
    return BaseModel(model, tokenizer, record.base, processor)


def load_artifact(
    directory: str | Path,
    *,
    trust_remote_code: bool = False,
    quantization: quantizing.Asked | None = None,
    keep: str | Sequence[str] = (),
    **options: Any,
) -> PreTrainedModel:
    """Loads an artifact as the model it was, in evaluation mode.

    Code, configuration and every tensor are compared with the manifest before any of the code runs. `options` go to
    transformers' `from_pretrained` verbatim. With `quantization` (`nf4`, `int8`, or the fields of one of transformers'
    quantization configs) the base's linear layers are quantised as they are loaded; what surgery made new, the head,
    and what `keep` names (modules, parameters, patterns) stay in their dtype.

    Raises:
        ArtifactError: the directory is no artifact, something in it is not what was written, its code was not built
            on this machine and `trust_remote_code` is not given, or transformers would run other code than its own.
        ModelError: it cannot be quantised as asked.
    """
    directory = Path(directory).resolve()
    quantizing.refuse_contradictory(quantization, keep, options)
    if manifest.read(directory, manifest.MODELS).kind == "stock":
        return _load_stock(
            directory, trust_remote_code=trust_remote_code, quantization=quantization, keep=keep, **options
        )
    with open_artifact(directory, trust_remote_code) as (record, own):
        kept: dict[str, str] = {}
        if quantization is not None:
            kept, options = _choose_quantized(_build_skeleton(own), record.edits, quantization, keep, options)
        model = _load_model(directory, record, own, options)
        if "quantization_config" in options:
            quantizing.note(model, kept, directory)
        return model


def _choose_quantized(
    skeleton: PreTrainedModel,
    edits: Sequence[Mapping[str, Any]],
    quantization: quantizing.Asked,
    keep: str | Sequence[str],
    options: dict[str, Any],
) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns what is not quantised, and why; and the options of transformers that quantise the rest."""
    kept = quantizing.plain(skeleton, edits, keep)
    config = quantizing.resolve(quantization, skeleton, edits, keep, quantizing.asked_dtype(options))
    return kept, {**options, "quantization_config": config}


def _build_skeleton(own: Path) -> PreTrainedModel:
    """Builds the model of an artifact on the meta device, from a private copy whose code may run."""
    with foreign.calling("the model cannot be made", ArtifactError):
        config = AutoConfig.from_pretrained(own, trust_remote_code=True)
        return on_meta(getattr(transformers, autos.own_class(own)), config, trust_remote_code=True)


def load_plain(
    directory: Path,
    *,
    trust_remote_code: bool,
    quantization: quantizing.Asked | None = None,
    keep: str | Sequence[str] = (),
    packed: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Loads a plain model of transformers; quantised as `load_artifact` says, or `packed` as its files are.

    Raises:
        ModelError: as `load_base`; or it cannot be quantised as asked.
    """
    quantizing.refuse_contradictory(quantization, keep, options)
    if packed:
        given = options.pop("quantization_config", None)
        stored = files.document(directory / "config.json", ModelError).get("quantization_config")
        if quantization is not None or (given is not None and json.loads(quantizing.record(given)) != stored):
            raise ModelError(f"the weights of {directory} are packed as they stand; leave out how to quantise them")
    kept: dict[str, str] = {}
    if quantization is not None:
        skeleton = load_base(str(directory), device="meta", trust_remote_code=trust_remote_code).model
        kept, options = _choose_quantized(skeleton, (), quantization, keep, options)
    model = load_base(str(directory), trust_remote_code=trust_remote_code, quantized=packed, options=options).model
    if packed:
        quantizing.remember(model)
    if "quantization_config" in options:
        quantizing.note(model, kept, directory)
    return model


def _load_stock(directory: Path, **asked: Any) -> PreTrainedModel:
    """Loads a plain model whose manifest is ours: nothing but transformers' own code runs, unless that is allowed."""
    record = manifest.read(directory, "stock")
    with checkpoint.steady([directory / name for name in record.headers]):
        refuse(ArtifactError, f"{directory} is not what was written", manifest.faults(directory, record, card=False))
        require_packages(record, directory)
        packed = bool(record.lineage) and record.lineage[-1].get("form") in quantizing.WORDS
        model = load_plain(directory, packed=packed, **asked)
    vars(model)[ORIGIN] = record.digest()
    return model


def _load_model(directory: Path, record: Manifest, own: Path, options: dict[str, Any]) -> PreTrainedModel:
    """Loads the model of an artifact from a private copy of it."""
    auto = autos.own_class(own)
    with foreign.calling(f"the model of {directory} cannot be loaded", ArtifactError):
        model, info = getattr(transformers, auto).from_pretrained(
            own, trust_remote_code=True, output_loading_info=True, **options
        )
    faults = [f"{kind}: {', '.join(sorted(map(str, names))[:6])}" for kind, names in info.items() if names]
    refuse(ArtifactError, f"{directory} was not loaded completely", faults + _foreign_code(model, record))
    private.point_back(model, own, directory)
    vars(model)[ORIGIN] = record.digest()
    found: PreTrainedModel = model.eval()
    return found


def _foreign_code(model: PreTrainedModel, record: Manifest) -> list[str]:
    """Compares the source that really runs with the manifest: transformers prefers registered and cached classes."""
    faults = []
    edited = set(ledger.new_modules(record.edits))
    classes = {type(model)} | {type(model.get_submodule(name)) for name in edited if _has_module(model, name)}
    for cls in classes:
        path = Path(inspect.getsourcefile(cls) or "")
        text = path.read_bytes() if path.is_file() else b""
        if record.code.get(path.name) == digest_bytes(text):
            continue
        if cls is type(model) or not _comes_from_outside(cls, record):  # what the artifact's code imports from there
            faults.append(
                f"{cls.__name__} runs from {cls.__module__}, which is not the artifact's code; another class is "
                "registered or cached under its name: load it in a process of its own"
            )
    return faults


def _comes_from_outside(cls: type, record: Manifest) -> bool:
    """Returns whether a class is one of torch's, of transformers', or of a package that the artifact requires."""
    if cls.__module__.split(".")[0] in ownership.ALWAYS:
        return True
    owner = ownership.outside(cls.__module__, ownership.surroundings(()))
    return owner is not None and owner[0] in record.requirements


def _has_module(model: PreTrainedModel, name: str) -> bool:
    return any(name == module_name for module_name, _ in model.named_modules())
