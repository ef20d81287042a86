"""Which Auto classes can serve a changed model: its own head, the part without a head, the same part with other heads.

Found out by building the family's classes on the meta device from the configuration before surgery; no family is known
by name.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from solidify.artifact.descent import Ancestor
from solidify.directory import trust
from solidify.errors import ArtifactError
from solidify.system import files, foreign
from solidify.upstream.transformers import classes_by_configuration, is_auto_model, names_by_family

# A class may stand under several Auto classes (BART's is one for conditional generation, and one that fills masks):
# first what its head is made for. What no one names comes after these, by name, and what was only trained so last.
_FIRST = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForMultimodalLM",
    "AutoModelForMaskedLM",
)
_LAST = ("AutoModelForPreTraining", "AutoModelWithLMHead")
OTHER_HEADS = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification")


@dataclass(frozen=True)
class Family:
    """`heads` are the Auto classes of the model's own class, `backbone` its part without a head (None where that cannot
    stand alone; the class itself where it has no head), `unpooled` whether that must be built without a pooling layer.

    `others` are other heads on the same backbone, by Auto class. `prefix` is what tensor names have more with a head
    than without, `ties` what the family itself ties: a tensor's name to that of the one it is the same as.
    """

    heads: list[str]
    backbone: type[PreTrainedModel] | None
    unpooled: bool
    others: dict[str, type[PreTrainedModel]]
    prefix: str
    ties: dict[str, str]

    @property
    def classes(self) -> list[type[PreTrainedModel]]:
        """All classes beside the model's own."""
        return [*([self.backbone] if self.backbone else []), *self.others.values()]


def own_class(directory: Path) -> str:
    """Returns the Auto class by which an artifact's own head is loaded.

    Raises:
        ArtifactError: its configuration names none.
    """
    config = files.document(directory / "config.json")
    heads, leading = config.get("architectures"), config.get("auto_map")
    if isinstance(heads, list) and isinstance(leading, dict):
        named = [
            str(auto)
            for auto, reference in leading.items()
            if isinstance(reference, str) and reference.rpartition(".")[2] == next(iter(heads), None)
            if is_auto_class(auto)
        ]
        if named:  # that of a task says more than AutoModel
            return next((auto for auto in named if auto != "AutoModel"), named[0])
    raise ArtifactError(f"{directory / 'config.json'} names no Auto class for the model's own class ({heads!r})")


def auto_class(directory: Path) -> str:
    """Returns the Auto class by which a model is loaded, an artifact or a plain one; AutoModel where nothing tells."""
    if (own := foreign.attempt(own_class, directory).value) is not None:
        return own
    heads = files.document(directory / "config.json").get("architectures")
    name = next(iter(heads), None) if isinstance(heads, list) else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    return _find_autos(kind)[0] if isinstance(kind, type) and _find_autos(kind) else "AutoModel"


def _find_autos(cls: type) -> list[str]:
    """Returns the Auto classes that lead to a class of transformers: first the one that says most of what it is for."""
    found = [name for name, auto in vars(modeling_auto).items() if is_auto_model(auto) and _is_mapping(name, cls)]
    order = {**{name: place for place, name in enumerate(_FIRST)}, **dict.fromkeys(_LAST, len(_FIRST) + 1)}
    return sorted(found, key=lambda name: (order.get(name, len(_FIRST)), name))


def is_auto_class(name: object) -> bool:
    """Returns whether a name from a file is that of one of transformers' Auto classes for models."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return is_auto_model(found)


def find(before: Ancestor) -> Family:
    """Finds what can serve a model.

    Raises:
        ArtifactError: no Auto class maps to the model's class.
    """
    with trust.never_asking():
        return _find_family(before)


def _find_family(before: Ancestor) -> Family:
    heads = _collect_heads(before)
    with torch.device("meta"):
        whole = before.head(before.config)
    inner: Any = whole.base_model
    alone, unpooled = (inner, False) if inner is whole else _build_alone(before, inner)
    if alone is None:
        return Family(heads, None, False, {}, "", whole.all_tied_weights_keys)
    prefix = "" if inner is whole else whole.base_model_prefix + "."
    others = _find_others(before, inner) if _is_mapping("AutoModel", type(inner)) else {}
    heads = [name for name in heads if name != "AutoModel"]
    return Family(heads, type(inner), unpooled, others, prefix, whole.all_tied_weights_keys)


def _collect_heads(before: Ancestor) -> list[str]:
    """Returns the Auto classes that lead to the model's own class, or to the class of transformers it descends from."""
    remote = vars(before.config).get("auto_map") or {}
    named = [auto for auto, reference in remote.items() if str(reference).rpartition(".")[2] == before.head.__name__]
    if named:
        return sorted(named)
    for cls in before.head.__mro__:
        if names := _find_autos(cls):
            return names
    raise ArtifactError(f"no Auto class of transformers maps to {before.head.__name__}, so nobody could load it")


def _is_mapping(auto: str, cls: type) -> bool:
    """Returns whether an Auto class leads to a class of transformers, for whichever configuration.

    Asked by configuration, families are missed whose head is listed under the configuration of a part.
    """
    table: Any = classes_by_configuration(getattr(modeling_auto, auto))
    if table is None or not cls.__module__.startswith("transformers."):
        return False
    return any(cls.__name__ in ((n,) if isinstance(n, str) else n) for n in names_by_family(table))


def _list_mapped(auto: str, before: Ancestor) -> tuple[type, ...]:
    """Returns the classes that an Auto class has for the model's configuration."""
    table: Any = classes_by_configuration(getattr(modeling_auto, auto))
    for kind in type(before.config).__mro__:
        if kind in table:
            mapped = table[kind]
            return mapped if isinstance(mapped, tuple) else (mapped,)
    return ()


def _build_alone(before: Ancestor, inner: Any) -> tuple[Any, bool]:
    """Builds the part without a head by itself: None where AutoModel would build another class, or the same with
    tensors that the model with its head does not have."""
    if not isinstance(inner, PreTrainedModel):
        return None, False
    if before.head.__module__.startswith("transformers.") and not _is_mapping("AutoModel", type(inner)):
        return None, False
    poolable = "add_pooling_layer" in inspect.signature(type(inner).__init__).parameters
    for options in ({}, {"add_pooling_layer": False}) if poolable else ({},):
        alone = _build_class(type(inner), before, **options)
        if alone is None:
            continue
        if set(alone.state_dict()) == set(inner.state_dict()):
            return alone, bool(options)
    return None, False


def _build_class(cls: Any, before: Ancestor, **options: Any) -> Any:
    """Builds a class on the meta device; None where it was written for other configurations than the one at hand."""
    with torch.device("meta"):
        return foreign.attempt(cls, before.config, **options).value


def _find_others(before: Ancestor, inner: PreTrainedModel) -> dict[str, type[PreTrainedModel]]:
    """Finds other heads that stand on a part of the same class and hold all of its tensors."""
    found = {}
    for auto in OTHER_HEADS:
        for cls in _list_mapped(auto, before):
            if cls is before.head or cls is type(inner):
                continue
            other = _build_class(cls, before)
            if other is None:
                continue
            part = other.base_model
            if type(part) is type(inner) and part is not other and set(inner.state_dict()) <= set(part.state_dict()):
                found[auto] = cls
                break
    return found
