"""May the transformers backends of vLLM and SGLang serve an artifact? Rule by rule, and what to do where not.

The rules are read, no server is run for them (`served_run.py` runs one): the documented ones, vLLM's "Supported
Models", sections "Custom models" and "Writing custom models"
(https://docs.vllm.ai/en/stable/models/supported_models.html), and SGLang's "Transformers fallback"
(https://docs.sglang.io/supported_models/transformers_fallback.html); and what is not documented but follows from their
sources (the head is built anew, ties come from the configuration, and see `replaced.py`). Facts come from the loaded
model and from calling it as the servers do (`served_call.py`). A rule that is not met is no failure of the artifact.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.checks import replaced, served_call
from solidify.checks.rule import SGLANG, VLLM, Rule, full, listed, prefix
from solidify.checks.served_call import KEYWORD, Observed
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError
from solidify.findings import Finding
from solidify.model import anatomy, cost
from solidify.surgery import catalogue, ledger
from solidify.system import files, foreign
from solidify.upstream.torch import own_parameters
from solidify.upstream.transformers import BACKEND_FLAG

Record = Mapping[str, Any]  # of an edit
EditsByName = Mapping[str, Record]  # what stands where after all edits: full module name -> the edit that put it there


def serving(directory: Path, record: Manifest, model: PreTrainedModel | None = None) -> list[Finding]:
    """Says for every rule whether the artifact meets it, then for each server whether it may serve it.

    The artifact's code runs in this process: the caller has asked whether it may. `model` is the artifact's, where that
    was loaded.
    """
    try:
        model = loading.load_artifact(directory) if model is None else model
    except ArtifactError as error:
        return [Finding.unseen(f"rules of {server}", f"not known; not run: {error}") for server in (VLLM, SGLANG)]
    return findings(model, record.edits, files.document(directory / "config.json")["auto_map"])


def findings(model: PreTrainedModel, edits: Sequence[Record], auto_map: Mapping[str, str]) -> list[Finding]:
    """Judges a model that was changed by `edits` (their records) and whose `auto_map` stands in config.json."""
    kind, edited = _judge_kind(model), ledger.new_modules(edits)
    needed = (
        [Rule("architecture", kind, "", "Serve it with transformers")]
        if kind
        else _list_needed(model, edited, auto_map)
    )
    plans = [] if kind else [_tensor_parallel(model, edited), _pipeline_parallel(model), replaced.head_size(model)]
    return [rule.finding() for rule in (*needed, *plans)] + [_state_verdict(s, needed, plans) for s in (VLLM, SGLANG)]


def _list_needed(model: PreTrainedModel, edited: EditsByName, auto_map: Mapping[str, str]) -> list[Rule]:
    """Returns the rules that a server cannot do without."""
    seen = served_call.observe(model.base_model)
    encoder = ["it is an encoder; SGLang's document names decoders only"] if seen.causal is False else []
    return [
        Rule("architecture", [], f"{'decoder' if seen.causal else 'encoder'}-only, takes tokens", ""),
        *([Rule("architecture for SGLang", encoder, "", "Serve it with vLLM", (SGLANG,))] if encoder else []),
        _auto_map(auto_map),
        _in_the_base_model(model, edited),
        _backend_flag(model),
        _judge_keywords(model, seen),
        _judge_attention(model, seen),
        _is_causal(model, seen),
        _judge_experts(model, edited, seen),
        _judge_ties(model),
        *replaced.rules(model, seen),
        *_judge_hints(model, auto_map),
    ]


def _state_verdict(server: str, needed: Sequence[Rule], plans: Sequence[Rule]) -> Finding:
    broken = [rule.name for rule in needed if rule.faults and server in rule.servers]
    if broken:
        return Finding(f"rules of {server}", None, f"not met; not run: {', '.join(broken)}")
    single = [rule.name for rule in plans if rule.faults and server in rule.servers]
    alone = f"; limited by: {', '.join(single)}" if single else ""
    command = "vllm serve DIR" if server == VLLM else "python -m sglang.launch_server --model-path DIR"
    run = f"to be tried: {command} --model-impl transformers --trust-remote-code"
    return Finding(f"rules of {server}", None, f"met; not run: {run}{alone}")


def _judge_hints(model: PreTrainedModel, auto_map: Mapping[str, str]) -> list[Rule]:
    """Judges the artifact's part without a head, built as the servers build it; a model in memory has none."""
    class_name = auto_map.get("AutoModel", "").rpartition(".")[2]
    part = vars(sys.modules[type(model).__module__]).get(class_name)
    if part is None:
        return []
    with torch.device("meta"):
        built = foreign.attempt(part, deepcopy(model.config))
    if built.error is not None:
        reason = f"{class_name} cannot be built from the configuration alone: {foreign.said(built.error)}"
        remedy = (
            "servers build it like this; let the constructors of its modules take only what the configuration holds"
        )
        return [Rule("the part without a head is built by its configuration", [reason], "", remedy)]
    return [replaced.hints(model, built.value)]


def _judge_kind(model: PreTrainedModel) -> list[str]:
    if model.config.is_encoder_decoder:
        return ["it is an encoder-decoder; the servers run encoder-only (vLLM) and decoder-only models"]
    if "input_ids" not in inspect.signature(model.base_model.forward).parameters:
        return [f"it takes {model.main_input_name}, not tokens; the servers run language models only"]
    return []


def _auto_map(auto_map: Mapping[str, str]) -> Rule:
    return Rule(
        "auto_map names AutoModel",
        [] if "AutoModel" in auto_map else [f"it names {', '.join(sorted(auto_map))} only"],
        str(auto_map.get("AutoModel")),
        "AutoModel is offered only where the part without a head has the same tensors by itself as within the whole "
        "model; serve it with transformers",
    )


def _backend_flag(model: PreTrainedModel) -> Rule:
    name = type(model.base_model).__name__
    return Rule(
        BACKEND_FLAG,
        [] if model.base_model.is_backend_compatible() else [f"it is False in {name}"],
        f"True in {name}",
        "transformers' own class of this family does not offer it; serve it with transformers",
    )


def _in_the_base_model(model: PreTrainedModel, edited: EditsByName) -> Rule:
    start = prefix(model)
    added = [name for name, edit in edited.items() if catalogue.of(edit).adds]
    outside = [name for name in edited if not name.startswith(start) and name not in added]
    return Rule(
        "changes lie in the base model",
        [f"{name} belongs to the head, which the servers build themselves" for name in outside]
        + [f"{name} adds to the outputs, of which the servers read the hidden states only" for name in added],
        f"all {len(edited)} lie in {full(model, '')}",
        "Move the change into the part without a head, or serve it with transformers",
    )


def _judge_keywords(model: PreTrainedModel, seen: Observed) -> Rule:
    faults = []
    if seen.refused:
        what = f"refuses {KEYWORD}" if seen.runs_without else "fails when it is called as the servers do"
        faults.append(f"{full(model, '')} {what} ({seen.refused})")
    lost = [_last_with_keyword(arrival.module, seen) for arrival in seen.arrivals if not arrival.passed]
    faults += [f"{name} does not pass them on" for name in listed(model, dict.fromkeys(lost))]
    return Rule(
        "keyword arguments reach the attention",
        faults,
        f"from {full(model, '')} to the attention function, in {len(seen.arrivals)} modules",
        "Let every forward on the way take **kwargs and hand it on, down to the attention function",
    )


def _last_with_keyword(module: str, seen: Observed) -> str:
    """Returns the innermost of the modules around (and with) `module` that was given the keyword."""
    parts = module.split(".")
    around = [".".join(parts[:count]) for count in range(len(parts) + 1)]
    return [name for name in around if name in seen.received][-1]


def _judge_attention(model: PreTrainedModel, seen: Observed) -> Rule:
    mixers = listed(model, seen.mixers)
    faults = [f"{name} mixes positions by itself" for name in mixers]
    layers = _count_layers(model)
    numbers = [arrival.layer_idx for arrival in seen.arrivals]
    for arrival in seen.arrivals:
        name, number = full(model, arrival.module), arrival.layer_idx
        if not isinstance(number, int) or not 0 <= number < layers:
            faults.append(f"{name} has layer_idx {number!r}, but num_hidden_layers is {layers}")
        elif numbers.count(number) > 1:
            faults.append(
                f"layer_idx {number} is used {numbers.count(number)} times; the servers keep one cache for it"
            )
    if seen.refused:
        faults.append("not known, because the call fails")
    elif not numbers and not faults:
        faults.append("no module uses it")
    tried = f" (tried with other numbers in {seen.stood_in} linear layers)" if seen.stood_in else ""
    return Rule(
        "attention goes through ALL_ATTENTION_FUNCTIONS",
        list(dict.fromkeys(faults)),
        f"in {len(numbers)} modules, each with its layer_idx; nothing else mixes positions{tried}",
        "Call ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](self, query, key, value, mask, **kwargs) in a "
        "module with a layer_idx; what mixes positions otherwise needs a model class of the server's own",
    )


def _count_layers(model: PreTrainedModel) -> int:
    """Returns the number of layers by the name under which the servers look for it, 0 where there is none."""
    config = model.config.get_text_config()
    return int(config.to_dict().get(config.attribute_map.get("num_hidden_layers", "num_hidden_layers")) or 0)


def _is_causal(model: PreTrainedModel, seen: Observed) -> Rule:
    """Both take a text model for an encoder as soon as one of its modules has `is_causal = False`."""
    values = {name: vars(m)["is_causal"] for name, m in model.base_model.named_modules() if "is_causal" in vars(m)}
    faults: list[str] = []
    if seen.causal is None:
        faults = ["not known, because the model cannot be called"]
    elif seen.causal and model.config.get_text_config() is model.config:
        wrong = [name for name, value in values.items() if not value]
        faults = [f"{listed_name} has it False, but the model is causal" for listed_name in listed(model, wrong)]
    elif not seen.causal:
        wrong = [arrival.module for arrival in seen.arrivals if values.get(arrival.module, True)]
        faults = [
            f"{listed_name} does not have it False, but the model is an encoder" for listed_name in listed(model, wrong)
        ]
    return Rule(
        "is_causal tells encoders",
        faults,
        "no module of the causal model has it False" if seen.causal else "it is False in the attention of the encoder",
        "Set self.is_causal to what the attention does",
    )


def _judge_experts(model: PreTrainedModel, edited: EditsByName, seen: Observed) -> Rule:
    blocks = {n: m for n, m in model.base_model.named_modules() if n.rpartition(".")[2] == "experts"}
    number, _ = cost.experts(model.config)
    faults = [fault for name, module in blocks.items() for fault in _experts_faults(model, name, module, number, seen)]
    inside = tuple(f"{name}." for name in edited)
    for name, module in model.base_model.named_modules():
        if (
            full(model, name).startswith(inside)
            and name not in blocks
            and number > 1
            and _count_experts(module) == number
        ):
            faults.append(f"{full(model, name)} holds {number} experts, but is not called `experts`")
    return Rule(
        "experts",
        faults,
        f"{len(blocks)} blocks hold `experts` as the servers replace them" if blocks else "there are none",
        "An MoE block keeps its experts in the attribute `experts`: a ModuleList, or a module whose parameters are all "
        "stacked (num_experts, ., .), called as experts(hidden_states, top_k_index, top_k_weights)",
    )


def _experts_faults(model: PreTrainedModel, name: str, module: nn.Module, number: int, seen: Observed) -> list[str]:
    full_name = full(model, name)
    faults = []
    flat = [key for key, parameter in module.named_parameters() if parameter.ndim != 3]
    if not isinstance(module, nn.ModuleList) and (flat or not list(module.parameters())):
        faults.append(
            f"{full_name} is not a ModuleList and its {flat[0] if flat else 'content'} is not stacked by expert"
        )
    elif number and _count_experts(module) != number:
        faults.append(f"{full_name} holds {_count_experts(module)} experts, but the configuration says {number}")
    if type(module).forward is nn.ModuleList.forward:
        faults.append(f"{full_name} has no forward")
    else:
        try:
            inspect.signature(type(module).forward).bind(None, "hidden_states", "top_k_index", "top_k_weights")
        except TypeError:
            faults.append(f"{full_name}.forward takes {inspect.signature(type(module).forward)}")
    given = seen.experts.get(name)
    if not seen.refused and not faults and given != 3:
        how = "is never called as a module" if given is None else f"is called with {given} positional arguments"
        faults.append(f"{full_name} {how}")
    return faults


def _count_experts(module: nn.Module) -> int:
    """Returns how many experts a module may hold: members of a list, or the length of stacked parameters."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacked = {p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3}
    return stacked.pop() if len(stacked) == 1 else 0


def _judge_ties(model: PreTrainedModel) -> Rule:
    stated = any(c.to_dict().get("tie_word_embeddings") for c in (model.config, model.config.get_text_config()))
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    pair = [_find_weight(model.get_input_embeddings()), _find_weight(model.get_output_embeddings())]
    faults = []
    for parameter, group in names.items():
        allowed = 2 if stated and parameter is pair[0] is pair[1] else 1
        if len(group) > allowed and any(name.startswith(prefix(model)) for name in group):
            faults.append(f"{_fold_names(group)} are one tensor")
    if stated and None not in pair and pair[0] is not pair[1]:
        faults.append("the configuration ties the head to the embeddings, but they are two tensors")
    return Rule(
        "ties are those of the configuration",
        faults,
        "the head to the embeddings" if stated and None not in pair else "no tensor has two names",
        "The servers tie the head to the embeddings when tie_word_embeddings says so, and nothing else; serve it with "
        "transformers, or give each module a tensor of its own",
    )


def _fold_names(names: Sequence[str]) -> str:
    folded = anatomy.fold(names)
    return f"{folded[0]} ({len(names)} names)" if len(folded) == 1 else " and ".join(names)


def _find_weight(module: nn.Module | None) -> nn.Parameter | None:
    return own_parameters(module).get("weight") if module is not None else None


def _tensor_parallel(model: PreTrainedModel, edited: EditsByName) -> Rule:
    base, start = model.base_model, prefix(model)
    plan: dict[str, str] = dict(base.tp_plan or {})
    modules = dict(base.named_modules(remove_duplicate=False))
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    there = {*modules, *(name for name, _ in base.named_parameters(remove_duplicate=False))}
    inside = [name.removeprefix(start) for name in edited if name.startswith(start)]
    before = {  # what each module was, by its name now
        (target + old.removeprefix(edit["name"])).removeprefix(start)
        for target, edit in edited.items()
        for old in (*edit["dropped"], *edit["kept"].values())
        if old.startswith(edit["name"])
    }
    replaced: list[str] = []
    gone: list[str] = []
    odd: dict[str, list[str]] = {}
    for pattern, style in plan.items():
        regex = re.compile(r"\d+".join(map(re.escape, pattern.split("*"))))
        hit = {name for name in there if regex.fullmatch(name)}
        was = {m.group() for name in before if (m := regex.match(name)) and name[m.end() :][:1] in ("", ".")}
        replaced += [name for name in inside if regex.fullmatch(name) and name not in linear]
        gone += sorted(was - hit)
        if style not in ("colwise", "rowwise") and hit & linear:
            odd.setdefault(style, []).append(pattern)
    faults = [] if plan else ["the configuration has no base_model_tp_plan"]
    faults += [f"{target} is in the plan, but was replaced" for target in listed(model, replaced)]
    faults += [f"{target} is in the plan, but is not there any more" for target in listed(model, gone)]
    faults += [f"{', '.join(names)} are planned as {style}, not colwise or rowwise" for style, names in odd.items()]
    return Rule(
        "tensor parallel plan",
        faults,
        f"all {len(plan)} patterns of base_model_tp_plan name what they named before surgery",
        "vLLM keeps these layers whole on every device, SGLang may refuse them: use one device, or split the "
        "model in another way",
    )


def _pipeline_parallel(model: PreTrainedModel) -> Rule:
    base = model.base_model
    plan = list(base.pp_plan or {})
    decoder = base.get_decoder()
    children = dict(base.named_modules()) if plan else dict(decoder.named_children())
    names = plan or [name for name, child in children.items() if any(True for _ in child.parameters())]
    faults = [f"{full(model, name)} is planned, but is not there" for name in names if name not in children]
    lists = {name: child for name in names if isinstance(child := children.get(name), nn.ModuleList)}
    layers = _count_layers(model)
    if len(lists) != 1:
        faults.append(f"it takes exactly one ModuleList to split, but there are: {', '.join(lists) or 'none'}")
    faults += [
        f"{full(model, n)} is not num_hidden_layers = {layers} long" for n, m in lists.items() if len(m) != layers
    ]
    missing = ["the configuration has no base_model_pp_plan; vLLM infers the split"] if not faults and not plan else []
    return Rule(
        "pipeline parallel plan",
        faults or missing,
        f"{full(model, next(iter(lists), ''))} is split",
        "Keep one ModuleList of num_hidden_layers layers, and the names in base_model_pp_plan",
        (SGLANG,) if missing else (VLLM, SGLANG),
    )
