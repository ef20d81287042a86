"""The configuration of a trained adapter, as read from its directory: its kind is looked at before anything else.

Whatever a file holds that PEFT would trip over, pass over with a warning, or read in another way than its trainer
meant, is refused here by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from solidify.adapter import expert_layouts as layouts
from solidify.adapter import kinds, patterns
from solidify.errors import AdapterError, refuse
from solidify.system import files, foreign
from solidify.upstream.peft import DUMMY_TARGET_MODULES
from solidify.weights import format

WEIGHTS = SAFETENSORS_WEIGHTS_NAME
NO_TARGETS = DUMMY_TARGET_MODULES
_LARGEST = 2**24  # bytes: a name of a hundred letters for each of a hundred thousand layers is less
# unsloth-zoo marks in adapter_config.json how the columns of an expert's `lora_B` are ordered (since September 2026,
# https://github.com/unslothai/unsloth-zoo/pull/1232): `rank_major` is PEFT's own order, `grouped_by_expert` another.
# The rows of `lora_A` are grouped by expert in both. vLLM calls PEFT's fused layout `is_3d_lora_weight`.
_LAYOUT = re.compile("layout|is_3d", re.IGNORECASE)
_DETAILS = "unsloth_fused_expert_lora"
_IN_HEADER = "lora_B_layout in the header of the weights"
_GENERAL = ("lora_B_layout", _IN_HEADER)
_OF_PARAMETER = re.compile(re.escape(_DETAILS) + r"\.parameters\.(.+)\.lora_B_layout")
# A name, or its end, as PEFT itself, its users and `re.escape` write it: with anchors, and with points that are escaped
# or not; `.*` may stand for a part of it, at most `_WILD` times, so that matching takes no time.
_NAME = re.compile(r"(\^|\\A)?(\w|\.\*?|-|\\\.|\\-)+(\$|\\Z)?")
_WILD, _WILD_KEYS, _KEYS = 2, 8, 2**12
_RANK = 2**10  # up to here a rank that no tensor has, for example where a pattern gives each its own, does no harm
_ADAPTED = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)*\.lora_(?:A\.weight|embedding_A)")
_ORDER_OF = {"rank_major": layouts.PEFT, "peft": layouts.PEFT, "grouped_by_expert": layouts.GROUPED}  # by its mark
_UNMARKED = (False, None, "")


def read(directory: Path, model: nn.Module | None = None, *, marked: bool = False) -> LoraConfig:
    """Reads the configuration of the LoRA adapter in a directory.

    One that is to be put on a `model` names modules of it, where the file has a regular expression. With `marked` it
    may say that its experts have another layout than ours: for who rewrites them (`expert_files.py`).

    Raises:
        AdapterError: there is none that can be read, it is of another kind than LoRA, or it says something that is not
            offered. All faults together.
    """
    found = document(directory)
    title = f"the adapter {directory} cannot be used"
    kind = found.get("peft_type")
    fault = f"its {CONFIG_NAME} does not name its kind (`peft_type`)" if not kind else kinds.kind_fault(kind)
    refuse(AdapterError, title, [fault] if fault is not None else [])
    with foreign.calling(f"{title}: its {CONFIG_NAME} does not have the form that PEFT writes", AdapterError):
        faults = unknown_marks(marks(found, {})) if marked else _layout_faults(marks(found, {}))
        faults += [*_find_unknown_fields(found), *kinds.configuration_faults(found)]
        refuse(AdapterError, title, faults or _expression_faults(found))
    if model is not None:
        header = format.read_header(directory / WEIGHTS)
        refuse(AdapterError, title, _rank_faults(found, header))
        found = _with_names(found, header, model)
    field_names = {f.name for f in fields(LoraConfig)} - {"runtime_config"}
    with foreign.calling(f"{title}: PEFT does not accept its {CONFIG_NAME}", AdapterError):
        return LoraConfig(**{key: value for key, value in found.items() if key in field_names})


def _expression_faults(document: Mapping[str, Any]) -> list[str]:
    """Names regular expressions in fields that PEFT (0.21.2) puts into one: only names are taken there."""
    held = {key: [str(word) for word in document.get(key) or ()] for key in (*patterns.FIELDS, "modules_to_save")}
    layers = document.get("layers_pattern") or []
    held["layers_pattern"] = [layers] if isinstance(layers, str) else [str(word) for word in layers]
    return [
        f"its {key} holds {word[:80]!r}, and solidify runs no regular expression that comes from a file; write module "
        "names, or how they end, in which `.*` may stand for a part"
        for key, words in held.items()
        for word in words
        if not _NAME.fullmatch(word) or word.count("*") > _WILD
    ] + [
        f"its {key} holds {len(words)} keys, each of which PEFT compares with every module; at most {_KEYS} are read, "
        f"{_WILD_KEYS} of them with `.*`, and {_WILD_KEYS} of layers_pattern"
        for key, words in held.items()
        if len(words) > (_WILD_KEYS if key == "layers_pattern" else _KEYS)
        or sum("*" in word for word in words) > _WILD_KEYS
    ]


def expressions(directory: Path) -> list[str]:
    """Names the fields of an adapter that say by a regular expression what is adapted: none of a file is run."""
    held = document(directory)
    fields = {key: held.get(key) for key in ("target_modules", "exclude_modules")}
    return [key for key, value in fields.items() if isinstance(value, str) and value != NO_TARGETS]


def _rank_faults(document: Mapping[str, Any], header: Mapping[str, format.Entry]) -> list[str]:
    """Names ranks that no tensor of the file is long enough for: PEFT would make room for them, whatever it takes."""
    longest = max([_RANK, *(size for entry in header.values() for size in entry.shape.sizes)])
    ranks = {"r": document.get("r"), **(document.get("rank_pattern") or {})}
    return [
        f"its rank is {rank} ({key}); no tensor of {SAFETENSORS_WEIGHTS_NAME} has more than {longest} rows or columns"
        for key, rank in ranks.items()
        if isinstance(rank, int) and rank > longest
    ]


def _with_names(document: dict[str, Any], header: Mapping[str, format.Entry], model: nn.Module) -> dict[str, Any]:
    """Puts names in the place of a regular expression that says which modules are adapted: those that have tensors."""
    targets, excluded = document.get("target_modules"), document.get("exclude_modules")
    if targets == NO_TARGETS or not (isinstance(targets, str) or isinstance(excluded, str)):
        return document
    names = {found[1] for key in header if (found := _ADAPTED.fullmatch(key))}
    ends = tuple(f".{word}" for word in document.get("target_parameters") or ())
    parameters = (re.sub(r"^base_model\.model\.|\.base_layer(?=\.)", "", name) for name, _ in model.named_parameters())
    owners = {name.rpartition(".")[0] for name in parameters if f".{name}".endswith(ends)} if ends else set()
    return {**document, "target_modules": sorted(names - owners), "exclude_modules": None}


def refuse_marked(weights: Path) -> None:
    """Refuses a file of weights whose header marks a layout of experts that is not PEFT's.

    Raises:
        AdapterError: it is marked so, or its header cannot be read.
    """
    found = marks({}, metadata(weights))
    refuse(AdapterError, f"the adapter {weights.parent} cannot be used", _layout_faults(found))


def metadata(weights: Path) -> dict[str, str]:
    """Returns the words that stand in the header of a file of weights beside the tensors.

    Raises:
        AdapterError: its header cannot be read.
    """
    with foreign.calling(f"the header of {weights} cannot be read", AdapterError), safe_open(weights, "pt") as file:
        return dict(file.metadata() or {})


def document(directory: Path) -> dict[str, Any]:
    """Reads an adapter's configuration, whatever it holds, as a mapping.

    Raises:
        AdapterError: there is none, or it is none.
    """
    if not (directory / CONFIG_NAME).is_file():
        raise AdapterError(f"{directory} holds no {CONFIG_NAME}, so it is not an adapter")
    return files.document(directory / CONFIG_NAME, AdapterError, largest=_LARGEST)


def marks(document: Mapping[str, Any], header: Mapping[str, str]) -> dict[str, Any]:
    """Returns what a configuration and the header of the weights say of a layout, by where they say it.

    `orders` reads those of the columns of `lora_B`.
    """
    found = {key: value for key, value in document.items() if _LAYOUT.search(key)}
    details = document.get(_DETAILS)
    if isinstance(details, Mapping):
        flat = files.flatten(details, f"{_DETAILS}.")
        found |= {key: value for key, value in flat.items() if _LAYOUT.search(key)}
    in_header = {key: value for key, value in header.items() if _LAYOUT.search(key)}
    return found | {_IN_HEADER if key == "lora_B_layout" else key: value for key, value in in_header.items()}


def orders(found: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the orders of `lora_B`'s columns that marks say: of all experts, by where it stands, and by parameter.

    The orders are those of `expert_layouts`; a mark that is empty says none.
    """
    said = {key: order for key, value in found.items() if (order := _read_order(value)) is not None}
    single = {match[1]: order for key, order in said.items() if (match := _OF_PARAMETER.fullmatch(key))}
    return {key: order for key, order in said.items() if key in _GENERAL}, single


def _read_order(mark: Any) -> str | None:
    return _ORDER_OF.get(mark) if isinstance(mark, str) else None


def unmarked(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration without what it says of a layout."""
    return {key: value for key, value in document.items() if key != _DETAILS and not _LAYOUT.search(key)}


def unknown_marks(found: Mapping[str, Any]) -> list[str]:
    """Names marks of a layout that nobody here knows."""
    return _layout_faults(
        {k: v for k, v in found.items() if not (_read_order(v) and (k in _GENERAL or _OF_PARAMETER.fullmatch(k)))}
    )


def _layout_faults(found: Mapping[str, Any]) -> list[str]:
    """Names marks of another layout than ours; the rows of `lora_A` are grouped by expert in ours too."""
    return [
        f"its experts are in the order of another trainer ({key}: {value!r}), and here PEFT's order (rank_major) is "
        "read; save it again in that order with the trainer that wrote it"
        for key, value in found.items()
        if value not in _UNMARKED
        and _read_order(value) != layouts.PEFT
        and not ("lora_A_layout" in key and _read_order(value) == layouts.GROUPED)
        and not ("is_3d" in key and value is True)
    ]


def _find_unknown_fields(document: Mapping[str, Any]) -> list[str]:
    """Names fields that this PEFT does not have; what is empty or switched off changes nothing."""
    field_names = {f.name for f in fields(LoraConfig)}
    return [
        f"its {CONFIG_NAME} says {key}={value!r}, which the installed PEFT does not know and would ignore; install "
        "the version of PEFT that wrote it, or remove the field if it changes nothing"
        for key, value in document.items()
        if key not in field_names and value and key != _DETAILS and not _LAYOUT.search(key)
    ]
