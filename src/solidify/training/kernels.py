"""Liger's kernels at run time: switched on for what is still the base's own, counted, checked, and written nowhere.

The recipe line is transformers' own (`training: {use_liger_kernel: true, liger_kernel_config: {...}}`). transformers
looks the kernels up by `model_type`, which an artifact has of its own, and Liger then does nothing and says so at a
level that nobody reads. Here Liger's function for the base's family works on a model of the base's class on the meta
device; what it changed there is put on those modules of the artifact that have the same name, are of the same
class, and hold and lie in nothing else. So a module that surgery put in is never overwritten, PEFT's wrappers do not
matter, and what Liger swaps for the whole process (rotary embeddings, torch's cross entropy, the classes that later
models are made of) is taken back at once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import is_liger_kernel_available

from solidify.adapter import lookup
from solidify.artifact import descent, loading
from solidify.errors import ObjectiveError, refuse
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.objective.objective import Objective
from solidify.upstream import liger
from solidify.upstream.torch import TABLES
from solidify.upstream.transformers_training import ACT2FN

FUSED = "fused_linear_cross_entropy"
TOLERANCES = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-2,
}  # of a loss, relative

_TITLE = "training.use_liger_kernel"


@dataclass(frozen=True)
class _Choice:
    """What is wrong; what would be swapped (module by name, what to put on it), and what not, with the reason."""

    faults: list[str]
    swaps: dict[str, tuple[nn.Module, dict[str, Any]]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


class Switched:
    """The kernels of one model while they are on.

    `swapped` names the modules by class, `left` what kept its own forward and why; `off` takes everything back. Some
    kernels leave gradients where they kept what they need, so a graph serves one backward pass: never retain it.
    """

    def __init__(self, swaps: Mapping[str, tuple[nn.Module, dict[str, Any]]], left: Mapping[str, str]) -> None:
        self.left = dict(left)
        self.swapped: dict[str, list[str]] = {}
        self._swaps = list(swaps.values())
        self._before = [dict(vars(module)) for module, _ in self._swaps]
        for name, (module, _) in swaps.items():
            self.swapped.setdefault(type(module).__name__, []).append(name)
        self.on()

    @property
    def counts(self) -> dict[str, int]:
        """How many modules of each class run a kernel."""
        return {cls: len(names) for cls, names in self.swapped.items()}

    def on(self) -> None:
        """Lets the kernels run, in place."""
        for module, attributes in self._swaps:
            vars(module).update({key: _bind_method(value, module) for key, value in attributes.items()})

    def off(self) -> None:
        """Gives every module its own forward and attributes again, in place."""
        for (module, attributes), before in zip(self._swaps, self._before, strict=True):
            for key in attributes:
                vars(module).pop(key, None)
                if key in before:
                    vars(module)[key] = before[key]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Runs the block without the kernels."""
        self.off()
        try:
            yield
        finally:
            self.on()

    def finding(self) -> Finding:
        """Says what was swapped and what was left."""
        counted = ", ".join(f"{count} {cls}" for cls, count in self.counts.items())
        names: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            names.setdefault(reason, []).append(name)
        kept = "".join(f"; left: {', '.join(anatomy.fold(each))} ({reason})" for reason, each in names.items())
        on = all(
            _same_code(vars(module).get(key), value)
            for module, attributes in self._swaps
            for key, value in attributes.items()
        )
        return Finding("kernels are on", on, f"Liger's forward in {counted}{kept}")

    def verify(self, loss: Callable[[], torch.Tensor], dtype: torch.dtype = torch.float32) -> Finding:
        """Computes a loss with and without the kernels, on the same random numbers and without a graph.

        It must be called where the kernels can run. It finds what the swap itself cannot see: an activation, a bias
        or a scaling of logits that the kernel does not have.

        Raises:
            ObjectiveError: the two differ by more than `TOLERANCES` of the dtype that is computed in.
        """
        with torch.random.fork_rng(), torch.no_grad():
            fused = float(loss())
        with torch.random.fork_rng(), torch.no_grad(), self.suspended():
            plain = float(loss())
        apart = abs(fused - plain) / max(abs(plain), 1e-12)
        if not apart <= TOLERANCES[dtype]:
            raise ObjectiveError(
                f"with Liger's kernels the loss is {fused:.6g}, without them {plain:.6g}: they do not compute what "
                "this model computes; leave use_liger_kernel out, or switch kernels off one by one in "
                "liger_kernel_config"
            )
        return Finding("kernels compute the same loss", True, f"{fused:.6g}, without them {plain:.6g}")


def refuse_unusable(arguments: TrainingArguments, model: nn.Module, objective: Objective) -> None:
    """Does nothing unless `use_liger_kernel` is set.

    Raises:
        ObjectiveError: no accelerator, no package, a family that Liger lacks, a switch that the family does not have
            or that would reach beyond this model, a fused loss where a term needs what it never makes, or nothing in
            the model that could be swapped.
    """
    if not arguments.use_liger_kernel:
        return
    faults = []
    if arguments.device.type in ("cpu", "mps"):
        faults.append(
            f"kernels are Triton programs, and Triton has no compiler for the device of this training "
            f"({arguments.device.type}); leave the line out here"
        )
    if not is_liger_kernel_available() or importlib.util.find_spec("triton") is None:
        faults.append("a package is missing: pip install liger-kernel (it needs triton)")
    else:
        if (arguments.liger_kernel_config or {}).get(FUSED):
            faults += [f"liger_kernel_config.{FUSED}: {why}" for why in _explain_unfusable(arguments, objective)]
        faults += _choose_kernels(model, settings(arguments, objective), objective).faults
    refuse(ObjectiveError, _TITLE, faults)


def settings(arguments: TrainingArguments, objective: Objective) -> dict[str, bool]:
    """Returns `liger_kernel_config`, with the fused loss off where the objective or the trainer needs logits."""
    asked = dict(arguments.liger_kernel_config or {})
    return {**asked, FUSED: False} if _explain_unfusable(arguments, objective) else asked


def taken_over(arguments: TrainingArguments) -> TrainingArguments:
    """Returns a copy for the trainer, with which transformers swaps nothing itself.

    It would swap again, for the whole process, and pass `skip_logits` to forwards that do not know it.
    """
    mine = copy.copy(arguments)
    mine.use_liger_kernel = False
    return mine


def switch_on(model: nn.Module, config: Mapping[str, bool], objective: Objective) -> Switched:
    """Switches Liger's kernels on, in place, where the model is still what its base was.

    `config` holds Liger's switches by name; one that is not named has Liger's default for the family. Modules into
    which a term of the objective looks keep their own forward.

    Raises:
        ObjectiveError: see `refuse_unusable`, without what concerns the trainer.
    """
    choice = _choose_kernels(model, config, objective)
    refuse(ObjectiveError, _TITLE, choice.faults)
    return Switched(choice.swaps, choice.left)


def family(model: nn.Module) -> str:
    """Returns the model_type of the base under all surgery; empty where its class is not one of transformers'."""
    before = descent.trace(_find_plain(model))
    if not before.head.__module__.startswith("transformers.models."):
        return ""
    return str(before.config.model_type)


def _find_plain(model: nn.Module) -> PreTrainedModel:
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel):
        raise ObjectiveError(f"{_TITLE}: {type(plain).__name__} is not a transformers model")
    return plain


def _explain_unfusable(arguments: TrainingArguments, objective: Objective) -> list[str]:
    """Returns why the loss cannot be fused with lm_head, which then returns no logits."""
    faults = []
    others = [term.name for term in objective.terms if not term.is_model]
    if others:
        faults.append(
            f"it makes no logits and computes only the model's own loss, but there is also {', '.join(others)}"
        )
    if type(arguments).__module__.startswith("trl."):
        faults.append("TRL's trainer computes the loss from lm_head itself")
    if arguments.fsdp:
        faults.append("it reads lm_head.weight, which fsdp shards")
    return faults


def _choose_kernels(model: nn.Module, config: Mapping[str, bool], objective: Objective) -> _Choice:
    """Finds out what each switch would change in the base, and which modules of the model may be changed so."""
    plain, table, name = _find_plain(model), liger.functions(), family(model)
    if name not in table:
        what = f"the family {name}" if name else f"{type(plain).__name__}, whose code is not transformers' own"
        return _Choice([f"Liger has no kernels for {what}; leave the line out (docs/kernels.md lists what it has)"])
    switches = liger.switches(table, name)
    if unknown := [key for key in config if key not in switches]:
        fault = f"not switches of {name}, and Liger would ignore them; its switches are {', '.join(switches)}"
        return _Choice([f"liger_kernel_config: {', '.join(unknown)}: {fault}"])
    before = descent.trace(plain)
    base = loading.on_meta(before.head, before.config)
    if swapped := {type(m).__name__ for m in base.modules() if type(m).__module__.startswith("liger_kernel.")}:
        fault = f"{', '.join(sorted(swapped))} stand for {name}'s own classes in this process"
        return _Choice([f"{fault}: something else switched Liger on for all models; start without it"])
    kinds = {(_fold_path(path), type(module)) for path, module in base.named_modules() if path}
    looked_at = [module_name for spec in objective.captures.values() for module_name in spec.find(model)]
    choice = _Choice([])
    for switch in [key for key, default in switches.items() if config.get(key, default)]:
        try:
            changes, elsewhere = _find_changes(table[name], base, switches, switch)
        except (AttributeError, AssertionError, ImportError, NotImplementedError, TypeError) as error:
            fault = f"Liger cannot do it for {name} with this transformers ({error}); leave the line out"
            return _Choice([f"liger_kernel_config.{switch}: {fault}"])
        found = dict(_yield_changeable(plain, changes, kinds, looked_at, choice.left))
        if not changes and elsewhere:
            choice.left[switch] = "Liger swaps it for the whole process, not for one model"
        if not found and config.get(switch):
            reason = choice.left.get(switch, "the model holds nothing of the base's that it could swap")
            choice.faults.append(f"liger_kernel_config.{switch}: {reason}; leave it out")
        choice.swaps.update(found)
    if not choice.swaps and not choice.faults:
        reasons = "; ".join(dict.fromkeys(choice.left.values())) or "all switches are off"
        choice.faults.append(f"not one module of this model would run a kernel ({reasons}); leave the line out")
    return choice


def _yield_changeable(
    plain: PreTrainedModel,
    changes: Mapping[tuple[str, type[nn.Module]], dict[str, Any]],
    kinds: set[tuple[str, type[nn.Module]]],
    looked_at: Sequence[str],
    left: dict[str, str],
) -> Iterator[tuple[str, tuple[nn.Module, dict[str, Any]]]]:
    """Yields the modules that may be changed, with what to put on them; notes in `left` which may not, and why."""
    modules = list(lookup.modules(plain))
    foreign = [p.name for p in modules if p.name and (_fold_path(p.name), type(p.inner)) not in kinds]
    at = {path for path, _ in changes}
    for located in modules:
        folded = _fold_path(located.name)
        kind = (folded, type(located.inner))
        if folded not in at or (located.name and kind in kinds and kind not in changes):
            continue
        base_class = next(cls for there, cls in changes if there == folded)
        reason = _root_reason(plain, base_class, foreign) if not located.name else None
        if located.name and kind not in changes:
            reason = "not of the base's class"
        elif located.name and any(_is_within(located.name, other) for other in foreign):
            reason = "inside of what surgery put in"
        elif located.name and any(_is_within(other, located.name) for other in foreign):
            reason = "surgery changed what it holds"
        elif located.name and any(_is_within(other, located.name) for other in looked_at):
            reason = "a term looks into it"
        elif reason is None and "forward" in vars(located.inner):
            reason = "it has a forward of its own already"
        if reason is None:
            yield located.name, (located.inner, changes[kind if located.name else (folded, base_class)])
        else:
            left[located.name or FUSED] = reason


def _root_reason(plain: PreTrainedModel, base_class: type[nn.Module], foreign: Iterable[str]) -> str | None:
    """Returns why the whole model's forward, with its loss, may not be swapped."""
    if not base_class.__name__.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return f"{base_class.__name__} has no loss over a vocabulary"
    if type(plain).forward is not base_class.forward:
        return "the model's own forward is not the base's"
    head = plain.get_output_embeddings()
    name = next((path for path, module in plain.named_modules() if module is head), "")
    at = lookup.at(plain, name) if name else None
    if head is None or at is None or name in foreign:
        return "lm_head is not the base's"
    if isinstance(at.called, BaseTunerLayer) or getattr(at.inner, "bias", None) is not None:
        return "it reads lm_head.weight, so what is added to it (LoRA, a bias) would be left out of the loss"
    return None


def _fold_path(path: str) -> str:
    return anatomy.fold([path])[0]


def _is_within(inner: str, outer: str) -> bool:
    return inner.startswith(f"{outer}.")


def _same_code(one: Any, other: Any) -> bool:
    return getattr(one, "__func__", one) is getattr(other, "__func__", other)


def _bind_method(value: Any, module: nn.Module) -> Any:
    return MethodType(value.__func__, module) if isinstance(value, MethodType) else value


def _find_changes(
    function: Callable[..., None], base: PreTrainedModel, switches: Mapping[str, bool], switch: str
) -> tuple[dict[tuple[str, type[nn.Module]], dict[str, Any]], list[str]]:
    """Returns what one switch puts on the base's modules, by name and class, and what it swaps elsewhere.

    The base, transformers and torch are unchanged.
    """
    before = {path: (module, dict(vars(module))) for path, module in base.named_modules()}
    try:
        with _nothing_else() as elsewhere:
            function(model=base, **{key: key == switch for key in switches})
        found = {}
        for path, (module, values) in before.items():
            new = {k: v for k, v in vars(module).items() if k not in values or values[k] is not v}
            if any(key in new for key in TABLES):
                raise TypeError("it changes more than forwards")
            if "forward" in new:
                # Norms write their gradient over the one that they are given, which a residual may still need.
                new |= {"in_place": False} if "in_place" in new else {}
                found[_fold_path(path), type(module)] = new
    finally:
        for module, values in before.values():
            vars(module).clear()
            vars(module).update(values)
    return found, elsewhere


@contextmanager
def _nothing_else() -> Iterator[list[str]]:
    """Takes back, when the block ends, what Liger swaps in modules of transformers and torch; silences its notes.

    Yields a list, which then names what was taken back.
    """
    names = [n for n in sys.modules if n.startswith("transformers.models.") and ".modeling_" in n]
    spaces = [vars(sys.modules[n]) for n in (*names, "torch.nn", "torch.nn.functional")]
    kept = [dict(space) for space in spaces]
    classes: set[Any] = {v for values in kept for v in values.values() if isinstance(v, type) and "forward" in vars(v)}
    forwards = [(cls, vars(cls)["forward"]) for cls in classes]
    activations = list(dict.items(ACT2FN))
    log = logging.getLogger(liger.MODULE)
    disabled, log.disabled = log.disabled, True
    taken_back: list[str] = []
    try:
        yield taken_back
    finally:
        log.disabled = disabled
        for space, values in zip(spaces, kept, strict=True):
            new = [key for key in space if key not in values]
            taken_back += [*new, *(key for key, value in values.items() if space.get(key) is not value)]
            for key in new:
                del space[key]
            space.update(values)
        for cls, forward in forwards:
            if vars(cls)["forward"] is not forward:
                taken_back.append(f"{cls.__name__}.forward")
                cls.forward = forward
        for key, value in activations:
            if dict.get(ACT2FN, key) is not value:
                taken_back.append(f"ACT2FN[{key!r}]")
                dict.__setitem__(ACT2FN, key, value)
