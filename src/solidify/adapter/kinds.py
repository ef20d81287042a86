"""Which of PEFT's kinds of adapter are right from attach to merge; every other is refused by name, before any training.

The lists below are compared with those of the installed PEFT by a test, which also makes docs/adapter_kinds.md: a
start, a field or a kind that PEFT adds is refused here until somebody has decided about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from solidify.adapter import start_kinds
from solidify.model import quantized

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Fields of LoraConfig that are right in every value that `value_faults` lets pass.
FREE = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "target_modules",
        "exclude_modules",
        "lora_alpha",
        "lora_dropout",
        "fan_in_fan_out",
        "bias",
        "use_rslora",
        "modules_to_save",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
        "use_dora",
        "qalora_group_size",
        "megatron_core",
        "lora_bias",
        "target_parameters",
        "use_bdlora",
        "ensure_weight_tying",
    ]
)
REFUSED_FIELDS = {
    "velora_config": "it compresses the gradients of each micro-batch, so they depend on how a batch is split; leave "
    "it out, and use gradient checkpointing to save memory",
    "alora_invocation_tokens": "the update acts on some tokens only, so it has no merged weights; leave it out",
    "use_qalora": "it works on GPTQ layers only, does nothing on others, and cannot be merged; leave it out",
    "monteclora_config": "it draws noise and needs a loss term of its own in training, neither of which is saved or "
    "merged; leave it out and use `lora_dropout`",
    "arrow_config": "it routes tokens among other adapters, so it has no merged weights; attach one adapter",
    "kasa_config": "it removes singular values from the base's weights, so with the adapter off the model is no "
    "longer the base; leave it out",
    "layer_replication": "it changes the architecture; leave it out, and use surgery for that (insert, replace)",
    "megatron_config": "Megatron's layers are not supported; load the model with transformers, and leave it out",
    "loftq_config": "it belongs to the start 'loftq', which is refused; leave it out",
    "runtime_config": "offloading is set for a process and not for an adapter; leave it out",
}

_PROMPTS = "it changes what the model reads and no weight, so it cannot be merged"
_OTHER = "only LoRA, and what `train` names, is planned, saved and merged here"
_LORA = "attach LoRA (`target_modules`)"
_FULL = "name what it trains in `train`"
REFUSED_KINDS = {
    "PROMPT_TUNING": (_PROMPTS, _LORA),
    "MULTITASK_PROMPT_TUNING": (_PROMPTS, _LORA),
    "P_TUNING": (_PROMPTS, _LORA),
    "PREFIX_TUNING": (_PROMPTS, _LORA),
    "CPT": (_PROMPTS, _LORA),
    "CARTRIDGE": (_PROMPTS, _LORA),
    "ADAPTION_PROMPT": ("it adds gated prompts to the attention, so it cannot be merged", _LORA),
    "ADALORA": ("its ranks move while it trains", "attach LoRA with a `rank_pattern`"),
    "XLORA": ("it mixes other adapters by token, so it has no merged weights", "attach one LoRA"),
    "POLY": ("it mixes several adapters by task, so it has no merged weights", "attach one LoRA for each task"),
    "LN_TUNING": ("it trains norms in full", "name the norms in `train`"),
    "TRAINABLE_TOKENS": ("it trains rows of the embedding alone", "give LoRA's `trainable_token_indices`"),
    "BEFT": ("it trains only biases", "name the biases in `train`"),
    "OSF": ("it trains whole matrices within a subspace", _FULL),
    "SHIRA": ("it trains single entries of matrices", _FULL),
    **{
        kind: (_OTHER, _LORA)
        for kind in [
            "ADAMSS",
            "BOFT",
            "IA3",
            "LILY",
            "LOHA",
            "LOKR",
            "OFT",
            "VERA",
            "FROD",
            "PVERA",
            "FOURIERFT",
            "GLORA",
            "HRA",
            "VBLORA",
            "UNILORA",
            "MISS",
            "RANDLORA",
            "ROAD",
            "HIRA",
            "C3A",
            "WAVEFT",
            "DELORA",
            "GRALORA",
            "TINYLORA",
            "PSOFT",
            "PEANUT",
            "SHADOW",
            "SUPERTUNING",
            "DEFT",
        ]
    },
}


def faults(lora: Mapping[str, Any]) -> list[str]:
    """Names what of a declaration (LoraConfig's fields) is of a kind that is not right from attach to merge."""
    kind = kind_fault(lora["peft_type"]) if lora.get("peft_type") is not None else None
    if kind is not None:
        return [kind]  # the fields are another kind's
    return [*_field_faults(lora), *start_kinds.start_faults(lora), *value_faults(lora), *_find_joint_variants(lora)]


def configuration_faults(lora: Mapping[str, Any]) -> list[str]:
    """Names what a trained adapter's configuration has that is not supported, by PEFT's own fields."""
    return [
        *_field_faults({key: value for key, value in lora.items() if key != "eva_config"}),
        *start_kinds.left_faults(lora),
        *_token_faults(lora.get("trainable_token_indices")),
        *value_faults(lora),
    ]


def _token_faults(tokens: Any) -> list[str]:
    """Names what is no list of ids, or such lists by module names, as PEFT writes rows that are trained alone."""
    lists = list(tokens.values()) if isinstance(tokens, Mapping) else [] if tokens is None else [tokens]
    if all(isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids) for ids in lists):
        return []
    return [f"LoRA: trainable_token_indices must list ids, or map module names to such lists, not {tokens!r}"]


def kind_fault(kind: Any) -> str | None:
    """Says why a kind of adapter (a member of PeftType, or its word) is refused; None for LoRA."""
    word = str(kind.value if isinstance(kind, PeftType) else kind)
    if word == PeftType.LORA.value:
        return None
    if word in REFUSED_KINDS:
        why, instead = REFUSED_KINDS[word]
        return f"an adapter of the kind {word} is not supported: {why}; {instead} instead"
    if word in PEFT_TYPE_TO_CONFIG_MAPPING:
        return f"an adapter of the kind {word} is not supported: solidify does not know it yet; {_LORA} instead"
    return f"peft_type {word!r} is not a kind of PEFT; {_LORA}"


def object_fault(lora: Any) -> str | None:
    """Says what is wrong with a declaration that is no mapping, a configuration object of PEFT's above all."""
    if isinstance(lora, Mapping):
        return None
    if isinstance(lora, PeftConfig) and (fault := kind_fault(lora.peft_type)) is not None:
        return fault
    return (
        f"LoRA: give LoraConfig's fields as a mapping, not as {type(lora).__name__}: {{'r': 8, 'target_modules': ...}}"
    )


def model_fault(configuration: PeftConfig) -> str | None:
    """Says why an adapter that a model carries cannot be saved, loaded and merged; None when it can."""
    if (fault := kind_fault(configuration.peft_type)) is not None:
        return fault
    given = {f.name: getattr(configuration, f.name) for f in fields(configuration)}
    return "; ".join(configuration_faults(given)) or None


def _field_faults(lora: Mapping[str, Any]) -> list[str]:
    """Names fields that are set and not supported; what is empty or PEFT's own default is not set."""
    found = []
    for field in fields(LoraConfig):
        value = lora.get(field.name)
        if field.name in FREE or not value or value == _find_default(field):
            continue
        if field.name in start_kinds.OF_START:
            found += start_kinds.setting_faults(lora, field.name, value)
            continue
        why = REFUSED_FIELDS.get(field.name, "solidify does not know it yet; leave it out")
        found.append(f"LoRA: {field.name} is not supported: {why}")
    return found


def _find_default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _find_joint_variants(lora: Mapping[str, Any]) -> list[str]:
    """Names variants that PEFT has, but not on one layer at a time."""
    found = [
        f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant") and f.name in FREE and lora.get(f.name)
    ]
    start = lora.get("init_lora_weights")
    found += (
        [f"init_lora_weights={start!r}"]
        if start == "mica" or (start_kinds.is_made(lora) and lora.get("use_bdlora"))
        else []
    )
    return [f"LoRA: {' and '.join(found)} cannot be combined; take one"] if len(found) > 1 else []


def value_faults(lora: Mapping[str, Any]) -> list[str]:
    """Names values of LoraConfig's fields that PEFT takes without a look, and trips over later or never."""
    found = []
    for key, (right, words) in _VALUES.items():
        if lora.get(key) is not None and not right(lora[key]):
            found.append(f"LoRA: {key} must be {words}, not {lora[key]!r}")
    bdlora = lora.get("use_bdlora")
    if bdlora and not found:
        field_names = [f.name for f in fields(BdLoraConfig)]
        given = vars(bdlora) if is_dataclass(bdlora) else bdlora
        found += [
            f"LoRA: use_bdlora has no {key!r}; it has {', '.join(field_names)}"
            for key in given
            if key not in field_names
        ]
    return found


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value != 0


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value)


def _make_pattern_check(right: Any) -> Any:
    return lambda value: isinstance(value, Mapping) and all(isinstance(k, str) and right(v) for k, v in value.items())


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


_VALUES: dict[str, tuple[Any, str]] = {
    "r": (_is_whole_number, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a finite number other than 0"),
    "lora_dropout": (_is_share, "a number from 0 to below 1"),
    "target_modules": (lambda v: isinstance(v, str) or _are_names(v), "a name or a list of names"),
    "layers_pattern": (lambda v: isinstance(v, str) or _are_names(v), "a name or a list of names"),
    "exclude_modules": (lambda v: isinstance(v, str) or _are_names(v), "a name or a list of names"),
    "target_parameters": (lambda v: isinstance(v, str) or _are_names(v), "a list of names"),
    "modules_to_save": (_are_names, "a list of names"),
    "rank_pattern": (_make_pattern_check(_is_whole_number), "a mapping of names to whole numbers of at least 1"),
    "alpha_pattern": (_make_pattern_check(_is_number), "a mapping of names to finite numbers other than 0"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "use_bdlora": (
        lambda v: v is False or isinstance(v, (Mapping, BdLoraConfig)),
        "a mapping of BdLoraConfig's fields",
    ),
    "base_model_name_or_path": (lambda v: isinstance(v, str), "a string"),
    "revision": (lambda v: isinstance(v, str), "a string"),
    **{
        flag: (_is_flag, "true or false")
        for flag in ["use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "inference_mode", "ensure_weight_tying"]
    },
}


def layer_fault(name: str, module: nn.Module, owner: nn.Module | None, lora: Mapping[str, Any]) -> str | None:
    """Says why a low-rank update of this layer would not be what is merged later, or None.

    `owner` is the module that the layer is a child of.
    """
    kind = type(module).__name__
    if not isinstance(module, (nn.Linear, nn.Embedding, Conv1D, *_CONVOLUTIONS)):
        return (
            f"LoRA: {name} ({kind}) cannot get a low-rank update; name the linear layers inside it, or name it in "
            "`train`"
        )
    if isinstance(owner, nn.MultiheadAttention):
        whole = name.rpartition(".")[0]
        return f"LoRA: {name} is read by {type(owner).__name__}, which never calls it; name {whole} in `train`"
    if strange := unfollowed(module):
        return f"LoRA: {name} ({kind}) has {strange}, which PEFT's update ignores; name it in `train`"
    start = lora.get("init_lora_weights")
    linear = isinstance(module, (nn.Linear, Conv1D))
    if (start_kinds.is_made(lora) and not linear) or (
        isinstance(module, _CONVOLUTIONS) and start in ("orthogonal", "mica")
    ):
        return f"LoRA: {name} ({kind}) does not support the start {start!r}; leave `init_lora_weights` out"
    if start_kinds.started(lora) and any(
        quantized.is_packed(parameter) for parameter in module.parameters(recurse=False)
    ):
        return (
            f"LoRA: the start {start!r} is made from a layer's weights, and those of {name} are quantised; load the "
            "artifact without quantization, or leave `init_lora_weights` out"
        )
    if lora.get("use_bdlora") and not isinstance(module, nn.Linear):
        return f"LoRA: {name} is of class {kind}, and `use_bdlora` is for nn.Linear only; attach without it"
    if lora.get("lora_bias") and getattr(module, "bias", None) is None:
        return f"LoRA: {name} ({kind}) has no bias to merge `lora_bias` into; attach without it"
    return None


def unfollowed(module: nn.Module) -> str:
    """Names settings of a layer that its low-rank update does not have, so that merged is not what was attached."""
    if isinstance(module, nn.Embedding):
        return f"max_norm={module.max_norm!r}" if module.max_norm is not None else ""
    if not isinstance(module, _CONVOLUTIONS):
        return ""
    plain = {"groups": 1, "dilation": (1,) * len(module.kernel_size), "padding_mode": "zeros"}
    return ", ".join(f"{key}={getattr(module, key)!r}" for key, value in plain.items() if getattr(module, key) != value)


def parameter_fault(name: str, parameter: nn.Parameter, lora: Mapping[str, Any]) -> str | None:
    """Says why a parameter cannot get a low-rank update as declared, or None."""
    if parameter.ndim not in (2, 3):
        return f"LoRA: {name} has {parameter.ndim} dimensions; target_parameters takes 2 or 3"
    with_it = [
        key for key in ("use_dora", "use_bdlora", "lora_bias", "lora_dropout", "fan_in_fan_out") if lora.get(key)
    ]
    start = lora.get("init_lora_weights")
    with_it += [f"init_lora_weights={start!r}"] if start in ("orthogonal", "mica") or start_kinds.is_made(lora) else []
    if with_it:
        return (
            f"LoRA: {name} is a parameter, and target_parameters cannot be combined with {', '.join(with_it)}; leave "
            "that out"
        )
    return None
