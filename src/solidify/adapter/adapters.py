"""Attach, switch off and merge: verbs over PEFT on a model in memory, strict about names. (On disk: `storage.py`.)"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import (
    base_state,
    configured,
    data_starts,
    lookup,
    patterns,
    start_kinds,
    starts,
    tied,
    together,
    tokens,
    trial,
    verbs,
)
from solidify.adapter import plan as planning
from solidify.adapter.data_starts import DataStart
from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.adapter.parameters import TrainedParameters
from solidify.adapter.plan import AdapterPlan
from solidify.behaviour import calling
from solidify.errors import AdapterError, refuse
from solidify.model.extent import Extent
from solidify.surgery.transaction import transaction
from solidify.system import console, foreign, processes
from solidify.upstream.bitsandbytes import keep_as_quantized
from solidify.upstream.peft import put_on
from solidify.weights import mapped


def attach(
    model: PreTrainedModel,
    *,
    lora: Mapping[str, Any] | None = None,
    train: str | Sequence[str] = (),
    name: str = "default",
    batches: Iterable[Mapping[str, Any]] | None = None,
) -> PeftModel:
    """Puts a fresh adapter on the model, in place, and returns PEFT's model around it.

    `lora` holds PEFT's own fields; its `target_modules` (and `target_parameters`) are full names or patterns, as for
    surgery. `train` names modules or parameters that are trained in full. Either may be left out. The plan is printed
    (on stderr), and what PEFT then trains is compared with it by name. `batches` are what the model is called with
    (`input_ids`, `attention_mask`, `labels`, ...), for the starts that are made from data: eva, corda, lora_ga.

    Raises:
        AdapterError: the declaration does not fit the model (see `solidify.adapter.plan`), or PEFT made something else
            trainable than was declared. The model is then as it was, as after any other exception.
    """
    keep_as_quantized(model)
    together.refuse_taken(model, name)
    existing = lookup.peft_model(model)
    base = base_state.find(model)
    if base is not None:
        base_state.refuse_changed(model, base)
    wanted = planning.plan(model, lora, train)
    if existing is not None:
        together.refuse_overlaps(
            existing,
            [*wanted.lora_modules, *wanted.lora_parameters],
            wanted.modules,
            wanted.parameters,
            list(wanted.tokens),
        )
    _refuse_unfed(lora, batches)
    console.words.print(wanted.table())
    single = _find_single_parameters(model, wanted.modules)
    probe = trial.inputs(model)
    trial.refuse_read_past(model, [*wanted.lora_modules, *wanted.lora_parameters], probe)
    with calling.chance_kept_at_failure(), transaction(existing if existing is not None else model, Extent.of(model)):
        found = DataStart()
        if lora is not None and (start := start_kinds.fed(lora)) is not None:
            found = data_starts.prepare(model, lora, wanted.lora_modules, start, batches or ())
        configuration = data_starts.ranked(_build_configuration(model, lora, wanted, single), found)
        peft_model, faults = _attach_adapter(model, existing, configuration, wanted, name)
        verbs.take_over(peft_model, frozen=_frozen_inside(peft_model, wanted))
        data_starts.put(peft_model, name, found)
        if lora is not None and (start := start_kinds.started(lora)) is not None:
            starts.begin(peft_model, name, start, found.layer, **data_starts.settings(lora, start))
        _freeze_inside(peft_model, wanted, name)
        train_parameters(peft_model, [*wanted.parameters, *(n for n in wanted.full if n.startswith(single))], name)
        faults += [*tied.parted(peft_model, lora), *tokens.faults(peft_model, wanted.tokens, name)]
        faults = [*planning.compare(peft_model, wanted), *faults, *trial.faults(peft_model, probe)]
        refuse(AdapterError, "PEFT did not do what was declared", faults)
        trial.refuse_without_effect(peft_model, name, probe)
    release_originals(peft_model)
    return peft_model


def _refuse_unfed(lora: Mapping[str, Any] | None, batches: Any) -> None:
    start = start_kinds.fed(lora)
    if start is not None and batches is None:
        raise AdapterError(
            f"LoRA: the start {start!r} is made from data; give attach `batches` of what the model is called with "
            "(input_ids, attention_mask, labels)"
        )
    if start is None and batches is not None:
        raise AdapterError(
            f"`batches` are for the starts that are made from data ({', '.join(start_kinds.FED)}); leave them out"
        )


def release_originals(model: PeftModel) -> None:
    """Gives the memory of parameters back of which an adapter trains a version in full, where they stand in a file.

    They are read from there when the adapter is switched off: what is trained in full is in memory once.
    """
    wrapped = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    single = [p for m in model.modules() if isinstance(m, TrainedParameters) for p in m.own().values()]
    mapped.release_tensors([*single, *(parameter for module in wrapped for parameter in module.parameters())])


def _frozen_inside(model: PeftModel, wanted: AdapterPlan) -> set[str]:
    """Names what stays frozen in modules that are trained in full."""
    inside = tuple(f"{module}." for module in wanted.modules)
    return {name for name, _ in lookup.plain_parameters(model) if name.startswith(inside)} - set(wanted.full)


_OF_TIES = "You have requested `ensure_weight_tying`"  # how PEFT's warnings of ties begin (0.21.2)


def _attach_adapter(
    model: Any, existing: PeftModel | None, configuration: LoraConfig, wanted: AdapterPlan, name: str
) -> tuple[PeftModel, list[str]]:
    """Has PEFT put an adapter on the model; returns what it warns of that would be a fault.

    Raises:
        AdapterError: PEFT refuses it.
    """
    with warnings.catch_warnings(record=True) as caught, foreign.calling("PEFT refuses the adapter", AdapterError):
        warnings.simplefilter("always", RuntimeWarning)  # by which PEFT says that a name hit nothing
        warnings.filterwarnings("always", message=_OF_TIES)
        peft_model = _inject_adapter(model, existing, configuration, name)
    faults = []
    for warning in caught:
        if str(warning.message).startswith(_OF_TIES):
            continue  # `tied.parted` looks whether the tie is kept
        if not issubclass(warning.category, RuntimeWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif not patterns.is_false_alarm(str(warning.message), wanted.lora_modules):
            faults.append(str(warning.message))
    return peft_model, faults


def _inject_adapter(model: Any, existing: PeftModel | None, configuration: LoraConfig, name: str) -> PeftModel:
    if existing is None:
        return put_on(model, configuration, name)
    existing.add_adapter(name, configuration)
    existing.set_adapter(name)
    return existing


def _freeze_inside(model: PeftModel, wanted: AdapterPlan, adapter: str) -> None:
    """Freezes again, in the trained copies, what a module's own code had frozen: PEFT makes all of a copy trainable."""
    copies = [
        (f"{lookup.canonical(model, path)}.{key}", parameter)
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
        for key, parameter in module.modules_to_save[adapter].named_parameters()
    ]
    trained = {id(parameter) for name, parameter in copies if name in wanted.full}  # tied copies have two names
    for _, parameter in copies:
        parameter.requires_grad_(id(parameter) in trained)


def _find_single_parameters(model: nn.Module, modules: Sequence[str]) -> tuple[str, ...]:
    """Returns the beginnings of names of parameters that are trained one by one, though their module was named.

    PEFT takes the name of a module that is trained in full for the end of a name: `score` is `layers.0.mlp.score` too.
    Of a module whose name other names end in, no copy is trained, but a version of each of its parameters.
    """
    everywhere = [name for name, _ in lookup.owners(model)]
    return tuple(m + "." for m in modules if any(n != m and n.endswith(m) for n in everywhere))


def _build_configuration(
    model: nn.Module, lora: Mapping[str, Any] | None, wanted: AdapterPlan, single: Sequence[str]
) -> LoraConfig:
    made = start_kinds.started(lora) is not None or start_kinds.fed(lora) is not None
    given = start_kinds.without_start(lora) if made else lora
    fields = {**(given or {}), **patterns.resolved(lora, (*wanted.lora_modules, *wanted.lora_parameters))}
    fields.pop("exclude_modules", None)
    copied = [name for name in wanted.modules if name + "." not in single]
    with foreign.calling("LoRA", AdapterError):
        configuration = LoraConfig(
            **{
                **fields,
                "target_modules": _match_exactly(wanted.lora_modules, model)
                or ([] if wanted.lora_parameters else configured.NO_TARGETS),
                "target_parameters": list(wanted.lora_parameters) or None,
                "modules_to_save": copied or None,
                tokens.FIELD: {name: list(ids) for name, ids in wanted.tokens.items()} or None,
                "task_type": without_heads(fields.get("task_type") or _task_type(model)),
                # A tied pair stays tied when one of them is trained, unless the user says otherwise.
                "ensure_weight_tying": fields.get("ensure_weight_tying", _trains_tied(model, wanted)),
            }
        )
    return starts.doubled(configuration) if start_kinds.started(lora) is not None else configuration


def _trains_tied(model: nn.Module, wanted: AdapterPlan) -> bool:
    plain = lookup.plain_model(model)
    tied = plain.all_tied_weights_keys if isinstance(plain, PreTrainedModel) else {}
    names = {name.rpartition(".")[0] for pair in tied.items() for name in pair}
    return any(module in names for module in (*wanted.modules, *wanted.lora_modules))


def _match_exactly(names: Sequence[str], model: nn.Module) -> list[str] | str:
    """Returns names so that PEFT cannot read them as ends of longer ones: a list, or a regular expression."""
    everywhere = [located.name for located in lookup.modules(model)]
    endings = tuple("." + name for name in names)
    if endings and any(name.endswith(endings) for name in everywhere):
        return "|".join(re.escape(name) for name in names)
    return list(names)


def _task_type(model: nn.Module) -> str | None:
    """Returns PEFT's task type for the model's head, so that PeftModel has its methods; None for other heads."""
    name = type(lookup.plain_model(model)).__name__
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def without_heads(task: Any) -> Any:
    """Drops a task type by which PEFT trains, undeclared, every module whose name ends in `score`, `classifier`, ...

    What else it brings (`PeftModelForSequenceClassification`, ...) is for prompts. Heads are named in `train`.
    """
    return None if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else task


def train_parameters(model: PeftModel, names: Sequence[str], adapter: str) -> None:
    """Gives the named bare parameters a version of their own for this adapter."""
    if not names:
        return
    wanted = {name: lookup.owner(model, name.rpartition(".")[0]) for name in names}
    holder = lookup.trained_parameters(model)
    if holder is None:
        lookup.plain_model(model).add_module(PARAMETERS, TrainedParameters(wanted, adapter))
    else:
        holder.update(adapter, owners=wanted)


def trained_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Returns all that is not the base's, on the CPU, by its name in the PeftModel.

    What is spread over the processes is gathered for it: all processes must then call this.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    kinds = [kind for kind, _, _ in (*lookup.named_parameters(model), *lookup.named_buffers(model))]
    return {n: processes.whole(t.detach()).cpu() for (n, t), kind in zip(held, kinds, strict=True) if kind != "base"}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Runs the plain base while the block lasts: adapters disabled, and modules that have `bypass` bypassed."""
    peft_model = lookup.peft_model(model)
    bypassing: list[Any] = [m for m in model.modules() if isinstance(vars(m).get("bypass"), bool)]
    before = [(module, module.bypass) for module in bypassing]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for module in bypassing:
        module.bypass = True
    try:
        if peft_model is None:
            yield
        else:
            with peft_model.disable_adapter():
                yield
    finally:
        for module, value in before:
            module.bypass = value
        for parameter, flag in trainable:  # enabling again, PEFT makes all of a trained copy trainable
            parameter.requires_grad_(flag)
