"""Whether the model in memory still is the artifact that it came from: every tensor, module and setting, by name.

An adapter belongs to the weights that it was trained on. A model that has changed since it was loaded (an adapter was
merged into it, weights were edited, the vocabulary was resized, the artifact was replaced) is another base, and no
digest on disk would tell. Tensors that still are an unchanged part of the artifact's mapped files are not read again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import lookup, reading
from solidify.adapter.buffers import NAME as BUFFERS
from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.artifact import companions, loading, quantizing, stock, tensors
from solidify.directory import manifest, trust
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.model import anatomy, quantized
from solidify.system import console, files, foreign
from solidify.upstream.torch import own_buffers, own_parameters, unsaved_buffers
from solidify.upstream.transformers import REFERENCE, attention, set_attention
from solidify.weights import checkpoint

WORDS = {
    "configuration": "the configuration differs",
    "code": "the source code of the modules differs",
    "weights": "the weights differ",
}
_REMEDY = (
    "an adapter trained now would belong to a base that is saved nowhere. If an adapter was merged into the model, or "
    "its weights or modules were changed on purpose, write that down first (solidify.merge the adapter, or "
    "solidify.build the model), solidify.load the result, and train on it"
)
# Values of a configuration that trainers, tokenizers and PEFT set, and that change no hidden state.
_INCIDENTAL = {
    *(REFERENCE, "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "use_cache", "chunk_size_feed_forward"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "pretraining_tp", "tie_word_embeddings"),
    "quantization_config",  # what came of it is compared, tensor by tensor
}
_TOKENS = frozenset(name for name in _INCIDENTAL if name.endswith("_token_id"))
_LABELS = ("id2label", "label2id")  # their keys are anybody's words
_OF_TRAINING = ("dropout", "drop", "_coef", "_loss")  # endings of values that only count while a model trains
_NAMED = 6  # names in one sentence


@dataclass(frozen=True)
class Base:
    """What a model was loaded from, an artifact or a plain model: where it is, and its manifest."""

    directory: Path
    record: Manifest

    def tensors(self, plain: nn.Module) -> dict[str, str]:
        """Returns the digest of every tensor by its name in memory; a plain model's files may have other names."""
        if self.record.kind == "artifact" or not isinstance(plain, PreTrainedModel):
            return self.record.tensors
        return stock.digests_in_memory(self.directory, self.record, lambda: _build_skeleton(plain, self.directory))


def find(model: nn.Module) -> Base | None:
    """Returns the artifact, or plain model of ours, that the model was loaded from; None for anything else.

    Raises:
        AdapterError: its manifest cannot be read any more.
    """
    plain = lookup.plain_model(model)
    where = plain.config.name_or_path if isinstance(plain, PreTrainedModel) else None
    if not where or not files.is_file(Path(where) / manifest.NAME):
        return None
    try:
        record = manifest.read(Path(where))
    except ArtifactError as error:
        raise AdapterError(str(error)) from error
    return Base(Path(where).resolve(), record) if record.kind in manifest.MODELS else None


def with_digests(model: nn.Module, directory: Path, record: Manifest) -> Manifest:
    """Returns the manifest of a model's base, whose tensors have the names that they have in memory."""
    return replace(record, tensors=Base(directory, record).tensors(lookup.plain_model(model)))


def require(model: nn.Module, *, plain: bool = True) -> Base:
    """Returns the artifact, or, if it may be, the plain model on disk, that the model was loaded from.

    Raises:
        AdapterError: it was loaded from neither.
    """
    base = find(model) or (_find_plain(model) if plain else None)
    if base is None:
        inside = lookup.plain_model(model)
        where = inside.config.name_or_path if isinstance(inside, PreTrainedModel) else None
        raise AdapterError(
            f"the model's base ({where or 'made in memory'}) is not an artifact, so solidify could not tell later "
            "whether an adapter fits it; build a changed model and load it with solidify.load, or save a plain one "
            "with save_pretrained and load it with from_pretrained, and attach to that"
        )
    return base


def _find_plain(model: nn.Module) -> Base | None:
    """Returns the plain model's files, without a manifest, that a model was loaded from, if they are here and whole."""
    plain = lookup.plain_model(model)
    where = companions.directory_of(plain.config) if isinstance(plain, PreTrainedModel) else None
    return Base(where.resolve(), stock.described(where)) if where is not None and stock.is_plain(where) else None


def refuse_changed(model: nn.Module, base: Base) -> None:
    """Refuses a model that is not, or not any more, the artifact that it was loaded from; remembers which it was.

    A model on the meta device has nothing to compare. Tensors that were loaded in another dtype are compared with the
    artifact's, cast to it; quantised ones with what the artifact's became when it was loaded.

    Raises:
        AdapterError: the model or the artifact has changed since; the message names all that differs.
    """
    plain = lookup.plain_model(model)
    if anatomy.is_meta(plain):
        return
    now, before = base.record.digest(), vars(plain).get(loading.ORIGIN)
    if before is not None and before != now:
        changed = [word for key, word in WORDS.items() if before[key] != now[key]]
        refuse(
            AdapterError,
            f"the artifact {base.directory} was replaced by another since the model was loaded, so an adapter of this "
            "model would be taken for one of the new artifact; load that, and train on it",
            changed,
        )
    faults = _merged_now(model) or [
        *_class_faults(plain, base),
        *_setting_faults(plain, base),
        *_tensor_faults(model, base),
    ]
    title = f"the model in memory is not the artifact {base.directory}, from which it was loaded; {_REMEDY}"
    refuse(AdapterError, title, faults)
    vars(plain)[loading.ORIGIN] = now


def _merged_now(model: nn.Module) -> list[str]:
    names = {
        name
        for module in lookup.plain_model(model).modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.merged_adapters
    }
    return [f"adapter {name!r} is merged into its weights now: call unmerge_adapter() first" for name in sorted(names)]


def _class_faults(plain: nn.Module, base: Base) -> list[str]:
    """Compares the class of every module with what the artifact's configuration builds, on the meta device."""
    config = files.document(base.directory / "config.json")
    if type(plain).__name__ not in config["architectures"]:
        return [f"the model's class is {type(plain).__name__}, and the artifact's is {config['architectures'][0]}"]
    built: Any = foreign.attempt(_build_skeleton, plain, base.directory)
    if built.value is None:
        return [f"the artifact's configuration cannot be built any more ({foreign.said(built.error)})"]
    expected = {name: type(module) for name, module in built.value.named_modules()}
    inner = {located.name: located.inner for located in lookup.modules(plain)}
    found = {name: type(module) for name, module in inner.items()}
    faults = [
        f"{name} is {found[name].__name__} in the model and {kind.__name__} in the artifact"
        for name, kind in expected.items()
        if name in found
        and _find_own_class(found[name]) is not _find_own_class(kind)
        and not _is_view(found[name], kind)
        and not (quantized.is_quantized(plain) and quantized.stands_for(inner[name], kind))
    ]
    faults += [f"{name} ({kind.__name__}) is not in the model" for name, kind in expected.items() if name not in found]
    extra = [f"{name} ({kind.__name__}) is not in the artifact" for name, kind in found.items() if name not in expected]
    return _list_few([*faults, *extra], "modules")


def _find_own_class(kind: type) -> type:
    """Returns a class; for one that torch derived for a single parametrized module (weight norm), what it derived from.

    (`torch.nn.utils.parametrize` names it so, and has no other mark of the class itself; torch 2.13.)
    """
    return kind.__bases__[0] if kind.__name__ == f"Parametrized{kind.__bases__[0].__name__}" else kind


def _is_view(found: type, kind: type) -> bool:
    """Returns whether a class is one that a library derived at run time to shard or quantize a module (FSDP)."""
    return issubclass(found, kind) and found.__name__.startswith("FSDP")


def _build_skeleton(plain: PreTrainedModel, directory: Path) -> PreTrainedModel:
    built: PreTrainedModel = loading.on_meta(type(plain), _stored_configuration(plain, directory))
    return built


def _stored_configuration(plain: PreTrainedModel, directory: Path) -> Any:
    config = type(plain.config).from_pretrained(directory)
    set_attention(config, attention(plain.config))
    return config


def _setting_faults(plain: nn.Module, base: Base) -> list[str]:
    """Compares the configuration with the artifact's, but for what trainers set and what changes no hidden state."""
    assert isinstance(plain, PreTrainedModel)
    read = foreign.attempt(_stored_configuration, plain, base.directory)
    if read.value is None:
        return []  # its class cannot read it; `_class_faults` has said so
    expected, found = files.flatten(read.value.to_dict()), files.flatten(deepcopy(plain.config).to_dict())
    differing = [key for key in {**expected, **found} if expected.get(key, None) != found.get(key, None)]
    return [
        f"config.{key} is {found.get(key)!r} in the model and {expected.get(key)!r} in the artifact"
        for key in differing
        if not _is_incidental(key, plain) and not _is_inferred(key, expected.get(key), found.get(key), plain)
    ]


def _is_incidental(key: str, plain: nn.Module) -> bool:
    """Returns whether a setting changes no output of the model; a token's id may (a classifier pools by it)."""
    parts = key.split(".")
    if parts[0] in _LABELS or parts[-1] in reading.settings_read(plain, _TOKENS):
        return False
    return bool(set(parts) & _INCIDENTAL) or key.endswith(_OF_TRAINING)


def _is_inferred(key: str, stored: Any, found: Any, plain: PreTrainedModel) -> bool:
    """Returns whether a setting is what a classifier's loss writes down itself, from the labels, where none is set."""
    kinds = ["regression"] if plain.config.num_labels == 1 else ["single_label", "multi_label"]
    return key == "problem_type" and stored is None and str(found).removesuffix("_classification") in kinds


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the plain model's own parameters and persistent buffers by their names there, whatever is active.

    The tensors are the very ones; one that has several names is there under each.
    """
    wrapped = lookup.peft_model(model)
    if wrapped is None:
        plain = lookup.plain_model(model)
        state = dict(plain.state_dict(keep_vars=True))
        return state if not quantized.is_quantized(plain) else _without_scales(plain, state)
    found = {name: t for kind, name, t in _yield_held(wrapped) if kind == "base"}
    found |= lookup.set_aside(wrapped)
    return found


def _without_scales(plain: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leaves what stands beside packed weights out of a state: it is a part of them."""
    holders = {name.rpartition(".")[0]: module for name, module in quantizing.packed_parameters(plain)}
    own = {id(t) for t in (*plain.parameters(), *plain.buffers())}
    return {name: t for name, t in state.items() if id(t) in own or not _stands_in(name, holders)}


def _stands_in(name: str, holders: Collection[str]) -> bool:
    return any(name[: match.start()] in holders for match in re.finditer(r"\.", name))


def packed_faults(model: nn.Module) -> dict[str, bool]:
    """Says of every packed parameter of the base in a quantised model whether it is another than when it was loaded.

    A model that solidify did not load is compared with the artifact, loaded and quantised the same way once more.
    """
    plain: Any = lookup.plain_model(model)
    if not quantized.is_quantized(plain):
        return {}
    expected = quantizing.remembered(plain)
    if expected is None:
        base = require(model)
        options = quantizing.as_loaded(plain)
        with torch.random.fork_rng(), console.silence(), trust.permitting(trust.fingerprint(base.record)):
            fresh = stock.load(base.directory, dtype=plain.dtype, **options)
        expected = quantizing.remembered(fresh) or {}
    found = {
        f"{name}.{key}": quantizing.digest(module, key)
        for name, module in lookup.owners(plain)
        for key, parameter in own_parameters(module).items()
        if parameter is not None and quantized.is_packed(parameter)
    }
    return {name: expected.get(name) != found.get(name) for name in {**expected, **found}}


def _yield_held(model: PeftModel) -> Iterator[tuple[str, str, torch.Tensor]]:
    versions = lookup.versions(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if {PARAMETERS, BUFFERS} & set(path.split(".")):
            continue
        lost = unsaved_buffers(module)
        own = {**own_parameters(module), **{k: b for k, b in own_buffers(module).items() if k not in lost}}
        for key, tensor in own.items():
            if tensor is not None and id(tensor) not in versions:
                kind, name = lookup.named(model, f"{path}.{key}" if path else key)
                yield kind, name, tensor


def _tensor_faults(model: nn.Module, base: Base) -> list[str]:
    """Compares every tensor of the base with its digest in the artifact."""
    packed, held = packed_faults(model), base_tensors(model)
    found = {name: tensor for name, tensor in held.items() if name not in packed}
    recorded = base.tensors(lookup.plain_model(model))
    expected = {name: digest for name, digest in recorded.items() if name not in packed}
    same = {id(found[name]) for name in expected if name in found}
    digests = tensors.digests_where_they_stand({n: t for n, t in found.items() if n in expected or id(t) not in same})
    changed = [name for name, digest in expected.items() if name in digests and digests[name] != digest]
    changed = [name for name in changed if not _is_cast(found[name], name, base)]
    ties = lookup.ties(model)
    extra = [
        name
        for name, digest in digests.items()
        if name not in expected and digest not in [expected.get(other) for other in ties.get(name, ())]
    ]
    faults = [f"{name} is not in the model" for name in expected if name not in found]
    faults += [f"{name} is not what the artifact's was quantised to" for name, differs in packed.items() if differs]
    faults += [_describe_difference(name, found[name], base) for name in changed]
    faults += [f"{name} is not in the artifact" for name in extra]
    return _list_few(faults, f"of {len(base.record.tensors)} tensors")


def _list_few(faults: list[str], what: str) -> list[str]:
    if len(faults) <= _NAMED:
        return faults
    return [*faults[:_NAMED], f"and {len(faults) - _NAMED} more ({len(faults)} {what} differ)"]


def _read_entry(base: Base, name: str) -> Any:
    return checkpoint.read(base.directory).entries.get(name)


def _is_cast(tensor: torch.Tensor, name: str, base: Base) -> bool:
    """Returns whether a tensor is the artifact's in another dtype, as it was loaded."""
    entry = _read_entry(base, name)
    if entry is None or entry.shape.dtype == tensor.dtype or entry.shape.sizes != tuple(tensor.shape):
        return False
    stored = entry.read()
    return tensors.digest(stored) == base.record.tensors.get(name) and torch.equal(
        stored.to(tensor.dtype), tensor.cpu()
    )


def _describe_difference(name: str, tensor: torch.Tensor, base: Base) -> str:
    entry = _read_entry(base, name)
    if entry is not None and entry.shape.sizes != tuple(tensor.shape):
        return f"{name} has shape {list(tensor.shape)} in the model and {list(entry.shape.sizes)} in the artifact"
    return f"{name} has other values than in the artifact"
