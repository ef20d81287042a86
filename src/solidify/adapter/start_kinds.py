"""Which of PEFT's starts of low-rank updates are right from attach to merge; others are refused by name.

The lists are compared with those of the installed PEFT by a test, as those of `kinds.py` are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import EvaConfig, LoraGAConfig

from solidify.upstream.peft import CordaConfig

# How low-rank factors may start: the base keeps its weights, so that switched off the model is the base.
STARTS: tuple[bool | str, ...] = (True, False, "gaussian", "orthogonal", "mica")
_ITERATED = "pissa_niter_[number of iters]"
# PEFT takes these out of the base's weights; what `attach` makes of them leaves the base alone (`starts.py`).
STARTED: tuple[str, ...] = ("pissa", _ITERATED, "olora", "corda", "lora_ga")
# These are made from data (`data_starts.py`), with the settings of a field of their own.
FED: tuple[str, ...] = ("eva", "corda", "lora_ga")
SETTINGS = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}
OF_START = {f"{start}_config": start for start in FED}
_FILES = ("cache_file", "covariance_file")  # PEFT reads them back without a look at what they were made from

_MOVES_THE_BASE = (
    "it subtracts its starting values from the base's weights, so with the adapter off the model is no longer the base"
)
_ROUNDS_THE_BASE = (
    "it rounds the base's weights to a few bits and starts with what that loses, so with the adapter off the model is "
    "no longer the base; a base that is loaded quantised is rounded already"
)
REFUSED_STARTS = {"loftq": _ROUNDS_THE_BASE}
# A start is over when training is: what it left of the base decides whether the result can be merged.
_MERGED_STARTS = (*STARTS, "eva")
_LEFT_ELSEWHERE = {**dict.fromkeys(STARTED, _MOVES_THE_BASE), "loftq": _ROUNDS_THE_BASE}


def started(lora: Mapping[str, Any] | None) -> str | None:
    """Returns the start of a declaration, as PEFT writes it, where it begins with an update that is not zero."""
    word = str((lora or {}).get("init_lora_weights")).lower()
    return word if _name_start(word) in STARTED else None


def fed(lora: Mapping[str, Any] | None) -> str | None:
    """Returns the start of a declaration where it is made from data."""
    word = str((lora or {}).get("init_lora_weights")).lower()
    return word if word in FED else None


def is_made(lora: Mapping[str, Any]) -> bool:
    """Returns whether a start is made for each layer: from its weight, or from what it reads."""
    return started(lora) is not None or fed(lora) is not None


def without_start(lora: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns a declaration with PEFT's plain start, which needs neither weights nor data; shapes are the same."""
    if lora is None:
        return None
    return {**{key: value for key, value in lora.items() if key not in OF_START}, "init_lora_weights": True}


def _name_start(word: str) -> str:
    """Returns what the lists above call a start."""
    return _ITERATED if re.fullmatch(r"pissa_niter_\d+", word) else word


def start_faults(lora: Mapping[str, Any]) -> list[str]:
    """Names the start of a declaration where `attach` does not offer it."""
    start = lora.get("init_lora_weights", True)
    if _is_one_of(start, STARTS) or started(lora) is not None or fed(lora) is not None:
        return []
    offered = f"take one of {_list_values(dict.fromkeys((*STARTS, *STARTED, *FED)))}"
    why = REFUSED_STARTS.get(str(start).lower(), "PEFT has no such start, or solidify does not know it yet")
    return [f"LoRA: init_lora_weights={start!r} is not supported: {why}; {offered}"]


def left_faults(lora: Mapping[str, Any]) -> list[str]:
    """Names the start of an adapter that was trained elsewhere, where its base was changed for it."""
    start = lora.get("init_lora_weights", True)
    if _is_one_of(start, _MERGED_STARTS):
        return []
    word = str(start).lower()
    family = _ITERATED if word.startswith("pissa_niter") else word
    if family in _LEFT_ELSEWHERE:
        return [
            f"LoRA: init_lora_weights={start!r} is not supported: {_LEFT_ELSEWHERE[family]}; make it plain LoRA first "
            "(PEFT's save_pretrained with path_initial_model_for_weight_conversion), or merge it by PEFT on the model "
            "that it was trained in"
        ]
    return [
        f"LoRA: init_lora_weights={start!r} is not supported: PEFT has no such start, or solidify does not know it "
        f"yet; {_list_values(_MERGED_STARTS)}"
    ]


def _is_one_of(start: Any, choices: Sequence[bool | str]) -> bool:
    return any(start is choice or (isinstance(start, str) and start == choice) for choice in choices)


def setting_faults(lora: Mapping[str, Any], key: str, value: Any) -> list[str]:
    """Names what is wrong with the settings of a start; PEFT passes over names that it does not know."""
    start = OF_START[key]
    if fed(lora) != start:
        return [f"LoRA: {key} belongs to the start {start!r}; give init_lora_weights: {start}, or leave it out"]
    kind = SETTINGS[start]
    if not isinstance(value, (Mapping, kind)):
        return [f"LoRA: {key} must be a mapping of {kind.__name__}'s fields, not {value!r}"]
    given, known = (value if isinstance(value, Mapping) else vars(value)), [f.name for f in fields(kind)]
    found = [f"LoRA: {key} has no {name!r}; it has {', '.join(known)}" for name in given if name not in known]
    return found + [
        f"LoRA: {key}: {name} is not read here, as nothing tells which weights and data it was made from; leave it out"
        for name in _FILES
        if given.get(name) is not None
    ]


def _list_values(values: Iterable[Any]) -> str:
    return ", ".join(repr(value) for value in values)
