"""The plain model of a family, where its configuration and its classes build what the surgery has made.

Whether they do is found by building it: modules, shapes and numbers are compared, then a fresh process loads both.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import autos, cards, certificate, descent, loading
from solidify.directory import private
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, refuse
from solidify.exporting import comparison
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.surgery import ledger
from solidify.system import foreign
from solidify.upstream.torch import module_hooks
from solidify.upstream.transformers import REFERENCE

_HELD = "stock form holds the artifact's tensors"
_COMPUTED = "stock form computes what the artifact does"
_SURGICAL = ("surgery", "auto_map", "model_type", "architectures", REFERENCE)
_NAMED = 6  # modules in one sentence


def write(
    model: PreTrainedModel, directory: Path, record: Manifest, staging: Path
) -> tuple[dict[str, str], list[Finding]]:
    """Writes the plain model into a directory, in its family's hub layout, and compares it with the artifact.

    Raises:
        ArtifactError: the family cannot build it.
    """
    plain = _build(model, record, directory)
    plain.load_state_dict(model.state_dict(), assign=True, strict=True)
    plain.tie_weights()
    if plain.can_generate():
        plain.generation_config = model.generation_config
    with foreign.calling("transformers cannot write the plain model", ArtifactError):
        plain.save_pretrained(staging)
    digests = comparison.align_weights(staging)
    (staging / "README.md").write_text(_write_card(plain, record, staging), encoding="utf-8")
    return digests, _compare(directory, record, staging, plain, Extent.of(model))


def _build(model: PreTrainedModel, record: Manifest, directory: Path) -> PreTrainedModel:
    """Builds the family's class from the configuration as it is now, on the meta device.

    Raises:
        ArtifactError: it does not build the model at hand; the modules that it does not are named.
    """
    before = descent.trace(model)
    config = deepcopy(model.config)
    config.__class__ = type(before.config)
    for key in _SURGICAL:
        vars(config).pop(key, None)
    title = f"{directory} cannot be written in stock form, because {before.head.__name__} cannot express"
    strangers = [
        cls.__name__ for cls in (before.head, type(before.config)) if not cls.__module__.startswith("transformers.")
    ]
    refuse(ArtifactError, title, [f"{name}, which is code that came with the base" for name in strangers])
    faults = _find_new(record)
    if not faults:
        built = foreign.attempt(loading.on_meta, before.head, config, str(model.dtype).removeprefix("torch."))
        faults = [foreign.said(built.error)] if built.error is not None else _find_differences(model, built.value)
    refuse(ArtifactError, title, faults)
    assert built.value is not None
    plain: PreTrainedModel = built.value.eval()
    return plain


def _find_new(record: Manifest) -> list[str]:
    """Names the modules that surgery put in, those of repeated layers in one line."""
    groups: dict[tuple[str, str], int] = {}
    for name, edit in ledger.new_modules(record.edits).items():
        key = anatomy.fold([name])[0], edit["new_class"]
        groups[key] = groups.get(key, 0) + 1
    return [f"{name}{f' ({count} modules)' if count > 1 else ''}, a {kind}" for (name, kind), count in groups.items()]


def _find_differences(model: PreTrainedModel, built: PreTrainedModel | None) -> list[str]:
    """Names what the family's class builds otherwise than the model is: modules, shapes, numbers and hooks."""
    assert built is not None
    there, here = dict(built.named_modules()), dict(model.named_modules())
    faults = [f"{name}, which it does not build" for name in here if name not in there]
    faults += [f"the lack of {name}, which it builds" for name in there if name not in here]
    for name, module in here.items():
        if name not in there:
            continue
        if name and type(module) is not type(there[name]):
            faults.append(f"{name}, a {type(module).__name__}, where it builds a {type(there[name]).__name__}")
        faults += [f"{name or 'the model'}, which has {word}" for word in _describe_hooks(module)]
        faults += [
            f"{name}.{key} = {value!r}".lstrip(".") + f", where it has {vars(there[name])[key]!r}"
            for key, value in vars(module).items()
            if type(value) in (bool, int, float) and key != "training" and not key.startswith("_")
            if vars(there[name]).get(key, value) != value
        ]
    shapes = {name: list(tensor.shape) for name, tensor in built.state_dict().items()}
    faults += [
        f"{name} of shape {list(tensor.shape)}, where it has {shapes.get(name, 'none')}"
        for name, tensor in model.state_dict().items()
        if shapes.get(name) != list(tensor.shape)
    ]
    return [*faults[:_NAMED], *([f"{len(faults) - _NAMED} more"] if len(faults) > _NAMED else [])]


def _describe_hooks(module: nn.Module) -> list[str]:
    """Says what surgery's hooks on a module do; a plain model has none."""
    hooks = [hook for _, hook, _ in module_hooks(module)]
    return ["a mask of its own" if hasattr(hook, "solid_mask") else "a hook that surgery put there" for hook in hooks]


def _compare(directory: Path, record: Manifest, staging: Path, plain: PreTrainedModel, extent: Extent) -> list[Finding]:
    """Has a fresh process, without solidify and PEFT, load artifact and plain model, and compare all that they hold."""
    with private.copy(directory, record) as own:
        request = {
            "artifact": str(own),
            "auto": autos.own_class(own),
            "stock": str(staging),
            "head": type(plain).__name__,
            "inputs": str(own / certificate.NAME / "inputs.safetensors") if extent.whole else None,
        }
        answer = comparison.ask(request)
    return [
        answer.tensors_finding(_HELD, "tensors bit-identical, loaded without code of the artifact"),
        answer.outputs_finding(_COMPUTED),
    ]


def _write_card(plain: PreTrainedModel, record: Manifest, staging: Path) -> str:
    """Says what the model is made of, and how it is loaded."""
    told = cards.metadata("transformers", ["solidify"], record.base, autos.auto_class(staging), record)
    base = Path(str(record.base.get("model", ""))).name or "a base"
    steps = ", ".join(dict.fromkeys(edit["operation"] for edit in record.edits)) or "none"
    name = type(plain).__name__
    return (
        f"---\n{told}\n---\n\n# {base}, changed\n\nThe plain {name} of transformers, made of "
        f"{base} by surgery ({steps}). It needs no code of its own:\n\n```python\nfrom transformers import {name}\n\n"
        f'model = {name}.from_pretrained(".")\n```\n'
    )
