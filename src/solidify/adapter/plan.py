"""What an adapter is going to train, by name, decided before PEFT is asked to do it and compared with what it did."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftModel
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solidify.adapter import kinds, lookup, patterns, tied, tokens
from solidify.errors import AdapterError, refuse
from solidify.model import anatomy, quantized
from solidify.surgery.differing import is_library
from solidify.system import console, foreign
from solidify.upstream.torch import module_hooks

# LoraConfig's fields that choose what is trained in ways of their own: one door for each thing.
_ELSEWHERE = {
    "modules_to_save": "name the modules in `train`",
    "bias": "name the biases in `train` (bias='all' cannot be switched off with the adapter)",
    "layers_to_transform": "name the layers in `target_modules`, for example model.layers.3.self_attn.q_proj",
    "layers_pattern": "name the layers in `target_modules`",
}


@dataclass(frozen=True)
class AdapterPlan:
    """Names of the plain model: LoRA targets (modules and parameters), and what is trained in full.

    `lora_modules` and `lora_parameters` get low-rank updates. `modules` are trained in full as copies, `parameters`
    alone. `full` lists every parameter that is trained in full, those of `modules` included. `tokens` maps modules, of
    which single rows are trained, to the ids of these.
    """

    lora_modules: tuple[str, ...]
    lora_parameters: tuple[str, ...]
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    full: tuple[str, ...]
    full_count: int
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def expected(self) -> set[tuple[str, str]]:
        """Returns what must be trainable, as (`lora` or `full`, name)."""
        return {
            *(("lora", name) for name in (*self.lora_modules, *self.lora_parameters)),
            *(("full", name) for name in self.full),
            *(("tokens", name) for name in self.tokens),
        }

    def table(self) -> Table:
        """Shows the plan, repeated layers folded."""
        return console.table("What is trained", ("how", "what", "modules"), self.rows(), numbers=(2,))

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns the plan as rows (how, what, number of modules), repeated layers folded."""
        rows = []
        for how, names in (
            ("LoRA", self.lora_modules + self.lora_parameters),
            ("in full", self.full),
        ):
            for line in anatomy.fold(names):
                count = sum(1 for name in names if anatomy.fold([name]) == [line])
                rows.append((how, line, str(count)))
        return [*rows, *((f"{len(ids)} rows", name, "1") for name, ids in self.tokens.items())]


def plan(model: nn.Module, lora: Mapping[str, Any] | None, train: str | Sequence[str]) -> AdapterPlan:
    """Resolves names and patterns against the model; the model is unchanged.

    Raises:
        AdapterError: a name hits nothing or something that cannot be trained that way, a field of LoraConfig is
            unknown or has another door here, two declarations overlap, or nothing is declared. All faults together.
    """
    train = [train] if isinstance(train, str) else list(train)
    named = {located.name: located.inner for located in lookup.modules(model) if located.name}
    parameters = {
        f"{name}.{key}" if name else key: parameter
        for name, module in {"": lookup.plain_model(model), **named}.items()
        for key, parameter in module.named_parameters(recurse=False)
    }
    faults: list[str] = []
    lora_modules, lora_parameters = _lora_targets(lora, named, parameters, model, faults)
    modules, bare = _full_targets(train, named, parameters, faults)
    faults += [
        f"train: {name} is tied to {other}; training it alone would break the tie: name the module instead"
        for name in bare
        for other, parameter in parameters.items()
        if other != name and parameter is parameters[name]
    ]
    faults += _find_overlaps(lora_modules + lora_parameters, modules, bare)
    faults += tied.faults(model, lora, lora_modules, modules)
    faults += _hook_faults(named, lora_modules)
    faults += _packed_faults(model, parameters, (*modules, *bare), lora_parameters)
    faults += [
        fault
        for name in lora_modules
        for parameter in named[name].parameters(recurse=False)
        if (fault := dora_fault(lora, type(parameter).__name__)) is not None
    ][:1]
    rows = tokens.resolve(model, lora, named, faults)
    taken = {*lora_modules, *modules, *(name.removesuffix(".weight") for name in (*lora_parameters, *bare))}
    faults += [
        f"rows of {name} would be trained, and it is trained otherwise too; declare one" for name in taken & {*rows}
    ]
    if not faults and not (lora_modules or lora_parameters or modules or bare or rows):
        faults.append("nothing would be trained: give LoRA `target_modules`, names in `train`, or both")
    refuse(AdapterError, "the adapter cannot be attached as declared", faults)
    frozen = _frozen_by_their_module(model)
    inside = [name for module in modules for name in _trained_inside(module, parameters, frozen)]
    full = tuple(dict.fromkeys(inside + bare))
    return AdapterPlan(
        tuple(lora_modules),
        tuple(lora_parameters),
        tuple(modules),
        tuple(bare),
        full,
        anatomy.count(parameters[name] for name in full),
        rows,
    )


def _hook_faults(named: Mapping[str, nn.Module], targets: Sequence[str]) -> list[str]:
    """Names targets of LoRA with a hook of the user's: PEFT adds beside the module, and a merged change goes through
    the hook."""
    hooked = [
        name
        for name in targets
        if not all(is_library(str(getattr(hook, "__module__", ""))) for _, hook, _ in module_hooks(named[name]))
    ]
    return [
        f"LoRA: {line} has a hook on its input or output, which LoRA beside it does not pass and a merged one would; "
        "write the hook as a module around it, or target others"
        for line in anatomy.fold(hooked)
    ]


def dora_fault(lora: Mapping[str, Any] | None, kind: str) -> str | None:
    """Says why DoRA cannot stand on weights of a packed kind, or None where it can."""
    if not (lora or {}).get("use_dora") or kind not in ("Int8Params", "int8"):
        return None
    return (
        "LoRA: use_dora does not go with 8-bit weights of bitsandbytes: PEFT reads them in a way that loses their "
        "scales (tried with peft 0.21.2 on a CPU); quantise to nf4, or leave use_dora out"
    )


def _packed_faults(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], full: Sequence[str], lora_parameters: Sequence[str]
) -> list[str]:
    """Names packed parameters of a quantised model that would be trained in full, or updated as plain tensors."""
    if not quantized.is_quantized(lookup.plain_model(model)):
        return []
    asked = dict.fromkeys((*full, *lora_parameters))
    return [
        f"{name} is quantised ({type(parameter).__name__}), and a packed weight cannot be trained itself; load the "
        f"artifact with solidify.load(..., quantization=..., keep={each!r}), or give it LoRA by `target_modules`"
        for each in asked
        for name, parameter in parameters.items()
        if (name == each or name.startswith(f"{each}.")) and quantized.is_packed(parameter)
    ]


def _trained_inside(module: str, parameters: Mapping[str, nn.Parameter], frozen: set[str]) -> list[str]:
    """Names what is trained of a module: all of it, but for what its own code froze beside other parameters."""
    inside = [name for name in parameters if name.startswith(module + ".")]
    return [name for name in inside if name not in frozen] or inside


def _frozen_by_their_module(model: nn.Module) -> set[str]:
    """Names what is frozen now, and what new modules froze in their constructors: loading makes it trainable again."""
    plain, recorded = lookup.plain_model(model), frozen_at_surgery(model)
    if lookup.peft_model(model) is not None:  # PEFT has frozen everything that it does not train
        return recorded
    return recorded | {name for name, parameter in plain.named_parameters() if not parameter.requires_grad}


def frozen_at_surgery(model: nn.Module) -> set[str]:
    """Names the parameters that new modules froze in their constructors, as the configuration records it."""
    plain = lookup.plain_model(model)
    surgery = (vars(plain.config).get("surgery") if isinstance(plain, PreTrainedModel) else None) or []
    return {f"{name}.{key}" for edit in surgery for name in edit["modules"] for key in edit.get("frozen", [])}


def compare(model: PeftModel, wanted: AdapterPlan) -> list[str]:
    """Compares by name what PEFT made trainable with the plan and returns every difference."""
    found = {(kind, name) for kind, name, p in lookup.named_parameters(model) if p.requires_grad}
    expected = wanted.expected()
    words = {"lora": "LoRA on", "tokens": "rows of", "full": "full training of", "base": "the base parameter"}
    return [
        *(f"not trainable, but declared: {words[kind]} {name}" for kind, name in sorted(expected - found)),
        *(f"trainable, but not declared: {words[kind]} {name}" for kind, name in sorted(found - expected)),
    ]


def _lora_targets(
    lora: Mapping[str, Any] | None,
    named: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    faults: list[str],
) -> tuple[list[str], list[str]]:
    if lora is None:
        return [], []
    if (fault := kinds.object_fault(lora)) is not None:
        faults.append(fault)
        return [], []
    field_names = [f.name for f in fields(LoraConfig)]
    strange = kinds.faults(lora)
    faults += [f"LoRA: {key!r} is not a field of peft's LoraConfig" for key in lora if key not in field_names]
    faults += [
        f"LoRA: leave out {key!r}; {where}"
        for key, where in _ELSEWHERE.items()
        if lora.get(key) not in (None, False, "none", [], {})
    ]
    faults += strange
    if strange:  # what is targeted is read once it is known to be LoRA, with values that can be read
        return [], []
    targets, target_parameters = lora.get("target_modules"), lora.get("target_parameters") or []
    if not targets and not target_parameters:
        if lora.get(tokens.FIELD):
            return [], []
        faults.append("LoRA: give `target_modules`, or leave `lora` out to train only what `train` names")
        return [], []
    if targets == "all-linear":
        modules = _all_linear(named, model)
    else:
        modules = _match_patterns("LoRA: target_modules", targets or [], named, faults, parameters)
    excluded = lora.get("exclude_modules")
    if excluded:
        out = set(_match_patterns("LoRA: exclude_modules", excluded, named, faults))
        modules = [name for name in modules if name not in out]
    bare = _match_patterns("LoRA: target_parameters", target_parameters, parameters, faults)
    layers = [kinds.layer_fault(n, named[n], named.get(n.rpartition(".")[0]), lora) for n in modules]
    stacks = [kinds.parameter_fault(name, parameters[name], lora) for name in bare]
    faults += [fault for fault in (*layers, *stacks) if fault is not None]
    faults += patterns.faults(lora, [*modules, *bare])
    return modules, bare


def _all_linear(named: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    plain = lookup.plain_model(model)
    head = foreign.attempt(plain.get_output_embeddings).value if isinstance(plain, PreTrainedModel) else None
    return [n for n, m in named.items() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]


def _full_targets(
    train: Sequence[str],
    named: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    faults: list[str],
) -> tuple[list[str], list[str]]:
    """Splits what is trained in full into modules and bare parameters; lists of modules become their members."""
    modules: list[str] = []
    bare: list[str] = []
    for name in _match_patterns("train", train, {**named, **parameters}, faults):
        if name in parameters:
            bare.append(name)
        elif isinstance(named[name], (nn.ModuleList, nn.ModuleDict)):
            modules += [n for n in named if n.rpartition(".")[0] == name]
        elif isinstance(named[name], (nn.ParameterList, nn.ParameterDict)):
            bare += [n for n in parameters if n.rpartition(".")[0] == name]
        elif not any(True for _ in named[name].parameters()):
            faults.append(f"train: {name} has no parameters")
        else:
            modules.append(name)
    return list(dict.fromkeys(modules)), list(dict.fromkeys(bare))


def _match_patterns(
    what: str, patterns: Any, names: Mapping[str, Any], faults: list[str], parameters: Collection[str] = ()
) -> list[str]:
    """Returns the names that patterns hit; one that hits nothing is a fault, with what it may mean.

    `parameters` are names that belong under another word, `target_parameters`.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    found = anatomy.match(patterns, names)
    for pattern, hits in found.items():
        if not hits:
            hint = anatomy.suggestions(pattern, names)
            if "." not in pattern and any(n.endswith("." + pattern) for n in names):
                hint = f"patterns match full names: write **.{pattern} to hit it everywhere"
            ends = [n for n in parameters if n.endswith(f".{str(pattern).removeprefix('**.')}")]
            if ends or anatomy.match([pattern], parameters)[pattern]:
                word = pattern if not ends or str(pattern).startswith("**.") else f"**.{pattern}"
                hint = f"that is a parameter and no module: write {word} under `target_parameters`"
            faults.append(f"{what}: {pattern!r} hits nothing; {hint}")
    return list(dict.fromkeys(name for hits in found.values() for name in hits))


def _find_overlaps(lora: Sequence[str], modules: Sequence[str], bare: Sequence[str]) -> list[str]:
    faults = []
    for outer in modules:
        inside = [n for n in (*lora, *modules, *bare) if n.startswith(outer + ".") or (n == outer and n in lora)]
        faults += [f"{name} lies in {outer}, which is trained in full already; declare one of them" for name in inside]
    faults += [
        f"{name} would get a low-rank update and be trained in full; declare one" for name in bare if name in lora
    ]
    faults += [
        f"{name} belongs to {owner}, which gets a low-rank update of its weight; train one of them"
        for name in bare
        for owner in lora
        if name == f"{owner}.weight"
    ]
    return faults
