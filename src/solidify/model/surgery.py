"""Replaces modules of a model in place and returns a record of every edit.

All or nothing: when any replacement is refused, the model is left as it was. What a replacement must fulfil is in
`contract.py`; what it receives is bound by name (`config`, `layer_idx`, `original`, then `arguments`).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, contract, initial, operations, probing
from solidify.weights import mapped, spilling

SUPPLIED = ("config", "layer_idx", "original")


@runtime_checkable
class Adopting(Protocol):
    """A replacement that takes weights over from the module it replaces, once, at surgery."""

    def adopt(self, original: nn.Module) -> None:
        """Copies what it wants to keep."""


@runtime_checkable
class Bypassing(Protocol):
    """A replacement that computes exactly what the original computed while `bypass` is True."""

    bypass: bool


@dataclass(frozen=True)
class Edit:
    """What was done at one place.

    `operation` is `replace`, `share` (one new module at several places), `rearrange` (layers inserted or removed) or
    `add`; `settings` is what the last two need besides. `tensors` maps every tensor at the place, by its new name, to
    the tensor that it equals bit for bit, by its old one, or to None where it is new; `dropped` names old tensors that
    live on nowhere. Names are full. `frozen` names, relative to the module, the parameters that it froze itself while
    it left others trainable.
    """

    name: str
    old_class: str
    module_class: type[nn.Module] | None = field(repr=False)
    arguments: dict[str, Any]
    supplied: tuple[str, ...]
    tensors: dict[str, str | None] = field(repr=False)
    dropped: tuple[str, ...]
    frozen: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    probed: bool
    identical: bool
    bypass: bool
    operation: str = "replace"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def new_class(self) -> str:
        """The class name of what stands there now."""
        return self.module_class.__name__ if self.module_class is not None else self.old_class

    def document(self) -> dict[str, Any]:
        """Returns the record as plain values for a manifest or a report."""
        return {
            "operation": self.operation,
            "name": self.name,
            "old_class": self.old_class,
            "new_class": self.new_class,
            "arguments": self.arguments,
            "settings": self.settings,
            "new": sorted(n for n, origin in self.tensors.items() if origin is None),
            "kept": {n: origin for n, origin in self.tensors.items() if origin is not None},
            "dropped": sorted(self.dropped),
            "frozen": list(self.frozen),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "probed": self.probed,
            "identical": self.identical,
            "bypass": self.bypass,
        }


def replace(
    model: PreTrainedModel,
    target: str | Sequence[str],
    module: type[nn.Module],
    *,
    arguments: Mapping[str, Any] | None = None,
    expect: str | None = None,
    count: int | None = None,
    weights: str | Path | None = None,
) -> list[Edit]:
    """Replaces in place every module that `target` names by a `module`, and returns the edits.

    `target` is a module name as `named_modules()` prints it, or several; `*` stands for one dotted part, `**` for
    any number. Constructor parameters called `config` (of the innermost model that holds the place), `layer_idx` and
    `original` (the module that is replaced, still in place) are supplied, all others come from `arguments`. A method
    `adopt(original)` runs once here; `weights` (`.safetensors`, `.pth`) is loaded once here.

    Raises:
        SurgeryError: nothing is hit; another class than `expect` or another number than `count` is hit; places
            overlap or are shared; the constructor's arguments do not fit; the weights do not fit; the replacement
            differs from the original in output structure, shape or dtype, or looks ahead where the model does not.
            The model is then as it was.
    """
    return _put(model, targets(model, target, expect, count), module, arguments, weights, shared=False)


def share(
    model: PreTrainedModel,
    target: str | Sequence[str],
    module: type[nn.Module],
    *,
    arguments: Mapping[str, Any] | None = None,
    expect: str | None = None,
    count: int | None = None,
    weights: str | Path | None = None,
) -> list[Edit]:
    """Puts one and the same new module at every place that `target` names; its weights stay tied, on disk once.

    It is built for the first place (and adopts from what stands there); otherwise as `replace`.

    Raises:
        SurgeryError: as `replace`.
    """
    return _put(model, targets(model, target, expect, count), module, arguments, weights, shared=True)


def _put(
    model: PreTrainedModel,
    names: Sequence[str],
    module: type[nn.Module],
    arguments: Mapping[str, Any] | None,
    weights: str | Path | None,
    *,
    shared: bool,
) -> list[Edit]:
    arguments = dict(arguments or {})
    refuse(SurgeryError, f"{_called(module)} cannot be built as asked", constructor_faults(module, arguments))
    large = anatomy.large(model)
    probed = first_of_each_kind(model, names) if large else dict.fromkeys(names, "")
    inputs = None if anatomy.is_meta(model) else (probing.few_inputs if large else probing.probe_inputs)(model)
    probe = None if inputs is None else contract.record(model, list(probed), inputs, partly=large)
    state = initial.read(weights) if weights is not None else None
    originals = {name: model.get_submodule(name) for name in names}
    edits: list[Edit] = []
    faults: list[str] = []
    built: dict[str, nn.Module] = {}
    for name, original in originals.items():
        first = next(iter(built.values()), None)
        new = first if shared and first is not None else _build(model, name, original, module, arguments)
        if state is not None:
            faults += initial.load(name, new, original, state, names)
        found, edit = _examine(name, original, new, arguments, probe, shared)
        faults += found
        edits.append(edit)
        built[name] = new
        if large:
            spilling.spill(name, new, original)
            mapped.release([original, new])
    refuse(SurgeryError, f"{module.__name__} cannot stand where it was asked to stand", faults)
    for name, new in built.items():
        model.set_submodule(name, new, strict=True)
    verify_places(model, built)
    forget_capture_hooks(model)
    if inputs is not None:
        _run_or_undo(model, inputs, originals, _called(module), list(probed) if large else None)
    return _as_the_first_of_their_kind(edits, originals) if large else edits


def first_of_each_kind(model: PreTrainedModel, names: Sequence[str]) -> dict[str, Any]:
    """Returns the first of all places whose modules are of one class and hold tensors of the same names and shapes."""
    kinds: dict[Any, str] = {}
    for name in names:
        kinds.setdefault(_kind(model.get_submodule(name)), name)
    return {name: kind for kind, name in kinds.items()}


def _kind(module: nn.Module) -> Any:
    return type(module), tuple((key, tuple(t.shape), t.dtype) for key, t in module.state_dict(keep_vars=True).items())


def _as_the_first_of_their_kind(edits: Sequence[Edit], originals: Mapping[str, nn.Module]) -> list[Edit]:
    """Gives edits that were not probed what was found where one of their kind was."""
    found = {_kind(originals[edit.name]): edit for edit in edits if edit.probed}
    result = []
    for edit in edits:
        first = found.get(_kind(originals[edit.name]), edit)
        result.append(dataclasses.replace(edit, identical=first.identical, bypass=first.bypass))
    return result


def _run_or_undo(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    originals: Mapping[str, nn.Module],
    called: str,
    until: Sequence[str] | None,
) -> None:
    """Runs the changed model once (`until` some modules were called); a model may ask more of a module than a call."""
    try:
        if until is None:
            anatomy.run(model, inputs)
        else:
            contract.record(model, until, inputs, partly=True)
    except contract.CALL_ERRORS as error:
        for name, original in originals.items():
            model.set_submodule(name, original, strict=True)
        forget_capture_hooks(model)
        raise SurgeryError(
            f"with {called} in place the model does not run: {type(error).__name__}: {error}; it may read an attribute "
            "of the module that it replaced (as `.weight`): give the new module one"
        ) from error


def targets(model: PreTrainedModel, target: str | Sequence[str], expect: str | None, count: int | None) -> list[str]:
    """Resolves the target patterns and refuses every way in which they can mean something else."""
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"surgery is done on a transformers model, but this is a {type(model).__name__}")
    modules = {name: m for name, m in model.named_modules() if name}
    everywhere = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    hits = anatomy.match(target, everywhere)
    faults = [
        f"{pattern!r} names no module; {anatomy.suggestions(pattern, modules)}"
        for pattern, found in hits.items()
        if not found
    ]
    names = [name for found in hits.values() for name in found]
    faults += [f"{name} is hit by two patterns" for name in sorted({n for n in names if names.count(n) > 1})]
    names = list(dict.fromkeys(names))
    for name in names:
        module = model.get_submodule(name)
        twins = [n for n in everywhere if model.get_submodule(n) is module and n != name]
        if twins:
            faults.append(f"{name} is the same module as {', '.join(twins)}; replacing one of them parts them")
        inside = next((outer for outer in names if name.startswith(outer + ".")), None)
        if inside:
            faults.append(f"{name} lies inside {inside}, which is replaced too; name one of them")
        if expect is not None and type(module).__name__ != expect:
            faults.append(f"{name} is a {type(module).__name__}, but {expect} was expected")
    if count is not None and names and len(names) != count:
        faults.append(f"{len(names)} modules are hit, but {count} were expected: {', '.join(names[:8])}")
    refuse(SurgeryError, "the surgery's target does not fit the model", faults)
    return names


def constructor_faults(
    module: type[nn.Module], arguments: Mapping[str, Any], *, without: Sequence[str] = ()
) -> list[str]:
    """Compares a constructor with the arguments it would get; `without` names what cannot be supplied here."""
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        return [f"it is a {type(module).__name__}, not a class of torch.nn.Module"]
    parameters = contract.constructor(module)
    faults = []
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {
        name: p
        for name, p in parameters.items()
        if p.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    for name in arguments:
        if name in SUPPLIED:
            faults.append(f"the argument {name!r} is supplied by solidify; remove it from `arguments`")
        elif name not in named and not open_ended:
            takes = ", ".join(n for n in named if n not in SUPPLIED) or "none"
            faults.append(f"it takes no argument {name!r}; it takes: {takes}")
    for name, parameter in named.items():
        if name in without and parameter.default is inspect.Parameter.empty:
            faults.append(f"its argument {name!r} cannot be supplied where nothing stood before")
        elif parameter.default is inspect.Parameter.empty and name not in arguments and name not in SUPPLIED:
            faults.append(f"its argument {name!r} has no default; give it in `arguments`")
    try:
        json.dumps(arguments)
    except (TypeError, ValueError) as error:
        faults.append(f"`arguments` must be plain values that a config.json can hold ({error})")
    return faults


def _called(module: Any) -> str:
    return getattr(module, "__name__", None) or repr(module)


def supplied_to(module: type[nn.Module]) -> list[str]:
    """Returns which of a constructor's parameters come from the model."""
    return [key for key in SUPPLIED if key in contract.constructor(module)]


def _build(
    model: PreTrainedModel,
    name: str,
    original: nn.Module,
    module: type[nn.Module],
    arguments: Mapping[str, Any],
) -> nn.Module:
    """Constructs the replacement for one place; its mode, device and dtype follow the original."""
    supplied = supplied_to(module)
    if "layer_idx" in supplied and operations.layer_index(model, name) is None:
        raise SurgeryError(f"{name} has no number in its name, so there is no layer_idx for {module.__name__}")
    modes = [(m, m.training) for m in original.modules()]
    reference = anatomy.any_tensor(original)
    try:
        with reference.device if reference is not None and reference.is_meta else torch.device("cpu"):
            new = operations.construct(model, name, module, supplied, dict(arguments))
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise SurgeryError(
            f"{module.__name__} could not be built for {name}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(new, nn.Module):
        raise SurgeryError(f"{module.__name__} made a {type(new).__name__} for {name}, not a torch.nn.Module")
    if isinstance(new, Adopting):
        with torch.no_grad():
            new.adopt(original)
    _follow(new, original)
    for inner, training in modes:
        inner.training = training
    return new


def _follow(new: nn.Module, original: nn.Module) -> None:
    """Gives the replacement's own tensors the original's device and main dtype, and its own modules its mode."""
    kept = {id(t) for t in (*original.parameters(), *original.buffers())}
    own = {id(m) for m in original.modules()}
    dtype = anatomy.main_dtype(original)
    reference = anatomy.any_tensor(original)
    for module in new.modules():
        if id(module) in own:
            continue
        module.training = original.training
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and reference is not None and id(tensor) not in kept:
                tensor.data = tensor.data.to(
                    device=reference.device, dtype=dtype if tensor.is_floating_point() else tensor.dtype
                )


def _examine(
    name: str,
    original: nn.Module,
    new: nn.Module,
    arguments: Mapping[str, Any],
    probe: contract.Probe | None,
    shared: bool,
) -> tuple[list[str], Edit]:
    """Probes one replacement and writes its record."""
    faults: list[str] = []
    call = probe.calls.get(name) if probe is not None else None
    identical, bypass = False, False
    if call is not None and probe is not None:
        faults, identical = contract.compare(name, new, call)
        if not faults:
            faults += contract.looks_ahead(name, original, new, call, probe.causal)
        if not faults and isinstance(new, Bypassing) and not shared:  # one module cannot be several originals
            bypass = _bypass_is_exact(name, new, call, faults)
    tensors, dropped = _ledger(name, original, new)
    edit = Edit(
        name=name,
        old_class=type(original).__name__,
        module_class=type(new),
        arguments=dict(arguments),
        supplied=tuple(supplied_to(type(new))),
        tensors=tensors,
        dropped=dropped,
        frozen=frozen(new),
        parameters_before=anatomy.count(original.parameters()),
        parameters_after=anatomy.count(new.parameters()),
        probed=call is not None,
        identical=identical,
        bypass=bypass,
        operation="share" if shared else "replace",
    )
    return faults, edit


def frozen(new: nn.Module) -> tuple[str, ...]:
    """Returns the parameters that a module froze itself while it left others trainable."""
    names = tuple(name for name, parameter in new.named_parameters() if not parameter.requires_grad)
    return names if any(parameter.requires_grad for parameter in new.parameters()) else ()


def _bypass_is_exact(name: str, new: nn.Module, call: contract.Call, faults: list[str]) -> bool:
    assert isinstance(new, Bypassing)
    before, new.bypass = new.bypass, True
    try:
        _, exact = contract.compare(name, new, call)
    finally:
        new.bypass = before
    if not exact:
        faults.append(f"{name}: {type(new).__name__} has `bypass`, but with it the output is not the original's")
    return exact


def _ledger(name: str, original: nn.Module, new: nn.Module) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Finds for every tensor of the replacement the tensor of the original that it equals bit for bit."""
    old = original.state_dict(keep_vars=True)
    tensors: dict[str, str | None] = {}
    for key, tensor in new.state_dict(keep_vars=True).items():
        candidates = [key, *(k for k in old if key.endswith("." + k)), *old]
        origin = next((k for k in candidates if k in old and _same(old[k], tensor)), None)
        tensors[f"{name}.{key}"] = None if origin is None else f"{name}.{origin}"
    used = {origin for origin in tensors.values() if origin is not None}
    return tensors, tuple(f"{name}.{key}" for key in old if f"{name}.{key}" not in used)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a is b:
        return True
    if a.is_meta or b.is_meta or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # A constant tensor (a fresh bias of zeros, say) equals every other such: that is no sign of descent.
    return torch.equal(a, b) and a.numel() > 1 and bool((a != a.reshape(-1)[0]).any())


def verify_places(model: PreTrainedModel, built: Mapping[str, nn.Module]) -> None:
    """Makes sure by identity that each replacement stands at its name and that no child has a dotted name."""
    faults = [
        f"{name} does not hold its replacement" for name, new in built.items() if model.get_submodule(name) is not new
    ]
    faults += [
        f"{owner or 'the model'} has a child with the dotted name {child!r}"
        for owner, module in model.named_modules()
        for child in module._modules
        if "." in child
    ]
    refuse(SurgeryError, "the model is not what the surgery should have made it", faults)


def forget_capture_hooks(model: PreTrainedModel) -> None:
    """Removes transformers' output-capturing hooks, so that it installs them anew and finds the new modules.

    Private in transformers 5.23 (`utils/output_capturing.py`): hooks are installed once, lazily, and a flag on the
    model says so; without this, the router logits of replaced blocks would be missing after any earlier forward that
    asked for them.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
                del module._forward_hooks[key]
        if "_output_capturing_hooks_installed" in vars(module):
            module._output_capturing_hooks_installed = False
