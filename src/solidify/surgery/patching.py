"""From what differs in a patched model to edits that make it again, tried before they are believed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.surgery import control
from solidify.surgery.comparing import held_faults, part_faults
from solidify.surgery.constructing import frozen
from solidify.surgery.describing import assemble, describe, encode
from solidify.surgery.differing import Change, Differences
from solidify.surgery.edit_record import Edit
from solidify.surgery.encoding import Classes
from solidify.surgery.provenance import Original
from solidify.system import foreign


def propose(
    model: PreTrainedModel,
    original: PreTrainedModel,
    found: Differences,
    arguments: dict[str, Mapping[str, Any]],
    declares: Mapping[str, bool] | None,
) -> tuple[list[Edit], list[str]]:
    """Returns an edit for every change, and why some cannot be described."""
    edits, faults = [], list[str]()
    names = list(found.changes)
    given = {name: each for pattern, each in arguments.items() for name in anatomy.match([pattern], names)[pattern]}
    faults += [
        f"arguments names {pattern!r}, and the patched modules are {', '.join(names[:4]) or 'none'}"
        for pattern in arguments
        if not anatomy.match([pattern], names)[pattern]
    ]
    there = dict(original.named_modules(remove_duplicate=False))
    for name, change in found.changes.items():
        if name not in there:
            faults.append(f"{name} is not in the base: set the configuration of the base alike before it is loaded")
            continue
        classes = Classes(nested=True)
        tree = _describe(name, model.get_submodule(name), change, there[name], given.get(name), classes)
        faults += classes.faults
        edits.append(_record(name, model.get_submodule(name), there[name], tree, classes, dict(declares or {})))
    return edits, faults


def _describe(
    name: str,
    module: nn.Module,
    change: Change,
    original: nn.Module,
    given: Mapping[str, Any] | None,
    classes: Classes,
) -> dict[str, Any]:
    tree = describe(name, module, given, classes, original) if change.new else {"supplied": "original"}
    attributes = {key: encode(f"{name}.{key}", value, classes) for key, value in change.attributes.items()}
    said = {
        "attributes": attributes,
        "methods": {key: classes.number(function) for key, function in change.methods.items()},
        "functions": {key: classes.number(function) for key, function in change.functions.items()},
        "hooks": [
            {"register": register, "function": classes.number(function), "with_kwargs": with_kwargs}
            for register, function, with_kwargs in change.hooks
        ],
    }
    return {**tree, **{key: value for key, value in said.items() if value}}


def _record(
    name: str, new: nn.Module, old: nn.Module, tree: dict[str, Any], classes: Classes, declares: dict[str, bool]
) -> Edit:
    before = Original.of(old, with_values=Extent.of(old).whole)
    tensors, dropped, unknown = before.ledger(name, new, {})
    if "supplied" in tree:  # the very module, whose values may be others by now
        tensors, dropped, unknown = {key: key for key in tensors}, (), ()
    return Edit(
        name=name,
        old_class=before.kind,
        module_class=type(new),
        arguments=tree,
        supplied=(),
        tensors=tensors,
        dropped=dropped,
        frozen=frozen(new),
        parameters_before=before.parameters,
        parameters_after=anatomy.count(new.parameters()),
        probed=False,
        identical=False,
        bypass=False,
        operation="patch",
        declares=declares,
        unknown=unknown,
        further=tuple(classes.found),
    )


def describe_edit(edit: Edit) -> str:
    """Says what an edit makes of a module, in a few words."""
    tree, classes = edit.arguments, edit.further
    words = []
    if "supplied" not in tree:
        supplied = [key for key, value in tree.get("arguments", {}).items() if _is_supplied(value)]
        plain = [f"{k}={v!r}" for k, v in tree.get("arguments", {}).items() if not isinstance(v, (dict, list))]
        words.append(f"{edit.new_class}({', '.join([*supplied, *plain])})")
    words += [f"{key}={value!r}" for key, value in tree.get("attributes", {}).items()]
    for key, number in {**tree.get("methods", {}), **tree.get("functions", {})}.items():
        words.append(f"{key} is {classes[number].__name__} of {classes[number].__module__}")
    words += [f"hook {classes[hook['function']].__name__}" for hook in tree.get("hooks", [])]
    return ", ".join(words)


def _is_supplied(value: Any) -> bool:
    return isinstance(value, dict) and "supplied" in value


def try_again(model: PreTrainedModel, plain: PreTrainedModel, edits: Sequence[Edit]) -> list[str]:
    """Makes the edits on what the model's class builds, on the meta device; returns where it is not the model."""
    for edit in edits:
        kinds = {str(number): each for number, each in enumerate(edit.further)}
        entry = {"classes": list(kinds), "arguments": edit.arguments}
        with torch.device("meta"):
            made = foreign.attempt(assemble, plain, [edit.name], entry, kinds)
        if made.error is not None:
            return [
                f"{edit.name}: {edit.new_class} cannot be made again ({foreign.said(made.error)}); say what its "
                f"constructor was given: arguments={{{edit.name!r}: {{...}}}}"
            ]
    faults = list[str]()
    for edit in edits:
        parts = model.get_submodule(edit.name), plain.get_submodule(edit.name)
        faults += [*part_faults(*parts, edit.name), *held_faults(*parts, edit.name).values()]
    return [f"{fault} when it is made again" for fault in faults[:8]]


def judge(
    model: PreTrainedModel, original: PreTrainedModel, edits: list[Edit], declares: dict[str, bool], extent: Extent
) -> tuple[list[Edit], list[str]]:
    """Compares how the patched model behaves with its base; returns the edits with that, and what they do not keep."""
    fresh = [name for edit in edits for name, origin in edit.tensors.items() if origin is None]
    try:
        before = control.take(original, [edit.name for edit in edits], extent)
        judged = control.judge(model, before, what="the patch", fresh=fresh, declared=declares, identical=False)
    except SurgeryError as error:
        return edits, [str(error)]
    lost = {**declares, **dict.fromkeys(sorted(judged.lost), False)}
    said: dict[str, Any] = {"control": before.distances, "declares": lost}
    return [dataclasses.replace(edit, **said) for edit in edits], judged.faults
