"""Replaces modules of a model in place and returns a record of every edit.

All or nothing: when any replacement is refused, the model is left as it was. What a replacement must fulfil is in
`contract.py`; what it receives is in `constructing.py`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.behaviour import calling
from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, cache_layers, operations
from solidify.model.extent import Extent
from solidify.surgery import constructing, contract, control, declaring, initial, layer_types, provenance, selection
from solidify.surgery.control import Control
from solidify.surgery.edit_record import Edit
from solidify.surgery.provenance import Original
from solidify.surgery.transaction import transaction
from solidify.system import foreign
from solidify.upstream.torch import own_buffers, own_modules, own_parameters
from solidify.weights import mapped, spilling, storable


def replace(
    model: PreTrainedModel,
    target: str | Sequence[str],
    module: type[nn.Module],
    *,
    arguments: Mapping[str, Any] | None = None,
    expect: str | None = None,
    count: int | None = None,
    weights: str | Path | None = None,
    declares: Mapping[str, bool] | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Replaces in place every module that `target` names by a `module`, and returns the edits.

    `target` is a module name as `named_modules()` prints it, or several; `*` stands for one dotted part, `**` for
    any number. Constructor parameters called `config` (of the innermost model that holds the module), `layer_idx` and
    `original` (the module that is replaced, still in place) are supplied, all others come from `arguments`. A method
    `adopt(original)` runs once here; `weights` (`.safetensors`, `.pth`) is loaded once here.

    The changed model keeps the behaviour of the one before it (`behaviour/properties.py`): no look-ahead, the same with
    and without a cache, no influence of padding, of other rows, of earlier calls or of chance, outputs recorded where
    they were. `declares`, or a class attribute of that name, says what it does not keep on purpose: `{"cache": False}`.

    `extent` says how much is looked at, and where new tensors wait; when it is left out, the model's size decides.

    Raises:
        SurgeryError: nothing is hit; another class than `expect` or another number than `count` is hit; modules
            overlap or are shared; the constructor's arguments do not fit; the weights do not fit; the replacement
            differs from the original in output structure, shape or dtype; the changed model does not run, or does not
            keep what it does not declare. The model is then as it was, as after any other exception.
    """
    names = selection.targets(model, target, expect, count)
    return _put_modules(
        model, names, module, arguments, weights, declaring.declared(module, declares), extent, shared=False
    )


def share(
    model: PreTrainedModel,
    target: str | Sequence[str],
    module: type[nn.Module],
    *,
    arguments: Mapping[str, Any] | None = None,
    expect: str | None = None,
    count: int | None = None,
    weights: str | Path | None = None,
    declares: Mapping[str, bool] | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Puts one and the same new module at every module name that `target` hits; its weights stay tied, on disk once.

    It is built for the first of them (and adopts from the module there); otherwise as `replace`.

    Raises:
        SurgeryError: as `replace`.
    """
    names = selection.targets(model, target, expect, count)
    return _put_modules(
        model, names, module, arguments, weights, declaring.declared(module, declares), extent, shared=True
    )


def _put_modules(
    model: PreTrainedModel,
    names: Sequence[str],
    module: type[nn.Module],
    arguments: Mapping[str, Any] | None,
    weights: str | Path | None,
    declares: Mapping[str, bool],
    extent: Extent | None,
    *,
    shared: bool,
) -> list[Edit]:
    arguments = dict(arguments or {})
    refuse(SurgeryError, f"{_find_called(module)} cannot be built as asked", constructing.faults(module, arguments))
    declares = {**layer_types.lost(module), **declares}
    extent = Extent.given(extent, model)
    before = control.take(model, names, extent)  # a new module is built only afterwards
    values = initial.read(weights) if weights is not None else None
    with transaction(model, extent, changes=names) as started:
        new = _Replacing(model, module, arguments, before, values, declares, extent, shared)
        edits = new.build(names, started.values)
        started.refuse_altered(module)
        title = f"{module.__name__} cannot be used there"
        refuse(SurgeryError, title, new.faults + layer_types.unnumbered(new.built))
        recorded = operations.recorders(model)
        for name, replacement in new.built.items():
            operations.stand_in(model.get_submodule(name), replacement)
            model.set_submodule(name, replacement, strict=True)
        verify_places(model, new.built)
        settings = layer_types.settings(model, names, module)
        operations.assign(model.config, settings.get("after", {}))
        cache_layers.settle(model)
        records = operations.record_again(model, recorded, list(new.built))
        fresh = [name for edit in edits for name, origin in edit.tensors.items() if origin is None]
        identical = all(edit.identical for edit in edits if edit.probed) and any(edit.probed for edit in edits)
        judged = control.judge(model, before, what=module.__name__, fresh=fresh, declared=declares, identical=identical)
        refuse(SurgeryError, title, judged.faults + new.say_overwritten(edits))
        declares = {**declares, **dict.fromkeys(sorted(judged.lost), False)}
        operations.withhold(model, {key for key, kept in declares.items() if not kept})
    said: dict[str, Any] = {"records": records, "control": before.distances, "declares": declares, "settings": settings}
    edits = [dataclasses.replace(edit, **said) for edit in edits]
    return _as_the_first_of_their_kind(edits, new.originals) if not extent.whole else edits


class _Replacing:
    """Builds the replacements of one change, examines each by itself and writes its record; gathers `faults`."""

    def __init__(
        self,
        model: PreTrainedModel,
        module: type[nn.Module],
        arguments: dict[str, Any],
        before: Control,
        weights: dict[str, torch.Tensor] | None,
        declares: Mapping[str, bool],
        extent: Extent,
        shared: bool,
    ) -> None:
        self.model, self.module, self.arguments, self.before = model, module, arguments, before
        self.weights, self.declares, self.extent, self.shared = weights, declares, extent, shared
        self.faults: list[str] = []
        self.built: dict[str, nn.Module] = {}
        self.originals: dict[str, tuple[nn.Module, object]] = {}
        self.olds: dict[str, Original] = {}
        self.descents: dict[object, dict[str, str] | None] = {}

    def build(self, names: Sequence[str], copies: Mapping[int, torch.Tensor]) -> list[Edit]:
        """Builds a replacement for every module name; the model still holds the originals, `copies` their values."""
        edits = []
        for name in names:
            original = self.model.get_submodule(name)
            self.originals[name] = (original, control.kind_of(original))
            old = self.olds[name] = Original.of(original, with_values=self.extent.whole, copies=copies)
            first = next(iter(self.built.values()), None)
            new = first if self.shared and first is not None else _build_replacement(self.model, name, original, self)
            if self.weights is not None:
                self.faults += initial.load(name, new, original, self.weights, names)
            if unstorable := storable.say_first_unstorable(name, new, filled=not anatomy.is_meta(self.model)):
                raise SurgeryError(f"{self.module.__name__} cannot be used there: {unstorable}")
            with calling.buffers_kept(self.model):  # a forward may count in another module's
                edits.append(self._examine_replacement(name, old, new))
            self.built[name] = new
            if not self.extent.whole:
                kept = original.state_dict(keep_vars=True).values()
                spilling.spill(name, new, kept, self.extent.spill)
                mapped.release([original, new])
        return edits

    def _examine_replacement(self, name: str, old: Original, new: nn.Module) -> Edit:
        """Probes one replacement and writes its record."""
        call = self.before.calls.get(name)
        identical, bypass = False, False
        if call is not None:
            faults, identical = contract.compare(name, new, call, weights=self.declares.get("attentions") is not False)
            if not faults:
                lost = contract.lost_habits(name, new, call)
                faults += [
                    f"{words}; or, if it is meant, declare {{{key}: false}}"
                    for key, words in lost.items()
                    if self.declares.get(key) is not False
                ]
            if (
                not faults and isinstance(new, constructing.Bypassing) and not self.shared
            ):  # one module cannot be several originals
                bypass = _bypass_is_exact(name, new, call, faults)
            self.faults += faults
        traced = self._trace_tensors(name, old, new)
        tensors, dropped, unknown = old.ledger(name, new, traced)
        return Edit(
            name=name,
            old_class=old.kind,
            module_class=type(new),
            arguments=dict(self.arguments),
            supplied=tuple(constructing.supplied_to(type(new))),
            tensors=tensors,
            dropped=dropped,
            frozen=constructing.frozen(new),
            parameters_before=old.parameters,
            parameters_after=anatomy.count(new.parameters()),
            probed=call is not None,
            identical=identical,
            bypass=bypass,
            operation="share" if self.shared else "replace",
            declares=dict(self.declares),
            unknown=unknown,
        )

    def say_overwritten(self, edits: Sequence[Edit]) -> list[str]:
        """Says which tensors that were found to be the original's have other values since, as only a forward writes."""
        return [
            f"{new} is {origin} of the original, but was written to when the module ran; have `forward` work on a copy"
            for edit in edits
            for new, origin in self.olds[edit.name].find_overwritten(edit.name, self.built[edit.name], edit.tensors)
        ]

    def _trace_tensors(self, name: str, old: Original, new: nn.Module) -> dict[str, str] | None:
        """Returns which tensors of the original the new module took over; None where that cannot be told."""
        if self.weights is not None or (self.shared and self.built):
            return {}
        if not old.open_questions(new):
            return {}
        original, kind = self.originals[name]
        supplied = constructing.supplied_to(self.module)
        key = (kind, operations.layer_index(self.model, name) if "layer_idx" in supplied else None)
        if key not in self.descents:
            self.descents[key] = provenance.trace(original, lambda stand_in: self._build_again(name, stand_in))
        return self.descents[key]

    def _build_again(self, name: str, stand_in: nn.Module) -> nn.Module:
        """Builds the replacement for one module name once more, for another module than the one that has it."""
        give: dict[str, Any] = {
            "config": copy.deepcopy(operations.enclosing_config(self.model, name)),
            "layer_idx": operations.layer_index(self.model, name),
            "original": stand_in,
        }
        with constructing.under(self.model.dtype), torch.device("cpu"), torch.no_grad():
            new = self.module(
                **{key: give[key] for key in constructing.supplied_to(self.module)}, **copy.deepcopy(self.arguments)
            )
            if isinstance(new, constructing.Adopting):
                new.adopt(stand_in)
        return new


def _as_the_first_of_their_kind(edits: Sequence[Edit], originals: Mapping[str, tuple[nn.Module, object]]) -> list[Edit]:
    """Gives edits that were not probed what was found where one of their kind was."""
    found = {originals[edit.name][1]: edit for edit in edits if edit.probed}
    result = []
    for edit in edits:
        first = found.get(originals[edit.name][1], edit)
        result.append(dataclasses.replace(edit, identical=first.identical, bypass=first.bypass))
    return result


def _build_replacement(model: PreTrainedModel, name: str, original: nn.Module, asked: _Replacing) -> nn.Module:
    """Constructs the replacement for one module; its mode and device follow the original.

    It is made under the model's dtype, as when it is loaded: a dtype that its constructor states stays.
    """
    module = asked.module
    supplied = constructing.supplied_to(module)
    if "layer_idx" in supplied and operations.layer_index(model, name) is None:
        raise SurgeryError(f"{name} has no number in its name, so there is no layer_idx for {module.__name__}")
    modes = calling.training_modes(original.modules())
    own = {id(m) for m in original.modules()}
    reference = anatomy.any_tensor(original)
    device = reference.device if reference is not None else model.device
    kept = {id(t) for t in (*original.parameters(), *original.buffers())}
    with constructing.under(model.dtype), foreign.calling(f"{module.__name__} could not be built for {name}"):
        with device if device.type == "meta" else torch.device("cpu"):
            new = operations.construct(model, name, module, supplied, asked.arguments)
        if isinstance(new, constructing.Adopting):
            with torch.no_grad():
                new.adopt(original)
    if not isinstance(new, nn.Module):
        raise SurgeryError(f"{module.__name__} made {type(new).__name__} for {name}, not a torch.nn.Module")
    for inner in [m for m in new.modules() if id(m) not in own]:
        inner.training = original.training
        for tensor in (*own_parameters(inner).values(), *own_buffers(inner).values()):
            if tensor is not None and id(tensor) not in kept and not tensor.is_meta:
                tensor.data = tensor.data.to(device)
    calling.put_training_modes(modes)
    return new


def _bypass_is_exact(name: str, new: nn.Module, call: contract.Call, faults: list[str]) -> bool:
    assert isinstance(new, constructing.Bypassing)
    before, new.bypass = new.bypass, True
    try:
        _, exact = contract.compare(name, new, call)
    finally:
        new.bypass = before
    if not exact:
        faults.append(f"{name}: {type(new).__name__} has `bypass`, but with it the output is not the original's")
    return exact


def verify_places(model: PreTrainedModel, built: Mapping[str, nn.Module]) -> None:
    """Makes sure by identity that each replacement stands at its name and that no child has a dotted name."""
    faults = [
        f"{name} does not hold its replacement" for name, new in built.items() if model.get_submodule(name) is not new
    ]
    faults += [
        f"{owner or 'the model'} has a child with the dotted name {child!r}"
        for owner, module in model.named_modules()
        for child in own_modules(module)
        if "." in child
    ]
    refuse(SurgeryError, "the model is not what the surgery should have made it", faults)


def _find_called(module: Any) -> str:
    return getattr(module, "__name__", None) or repr(module)
