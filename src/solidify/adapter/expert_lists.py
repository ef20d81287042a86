"""Adapters that have their experts one by one, or stacked without being fused, as one of PEFT's fused parameters.

transformers 4 had a linear layer for each projection of each expert, and so has vLLM; transformers 5 has one parameter
for all experts, and gate and up in one. What becomes of the tensors is in `expert_layouts.py`; here are their names,
and the fields of the configuration: ranks add up where gate and up become one, and alpha follows them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import expert_layouts as layouts
from solidify.adapter import lookup, patterns
from solidify.adapter.expert_layouts import Factors
from solidify.upstream.peft import get_pattern_key
from solidify.upstream.torch import own_parameters
from solidify.upstream.transformers import WeightRenaming, get_model_conversion_mapping, rename_source_key

PREFIX = "base_model.model."
_ONE = re.compile(r"(?P<path>.+)\.(?P<expert>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight")
_STACK = re.compile(r"(?P<path>.+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight")
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# What the projections of an expert are called: by most families and by Mixtral, whose words vLLM takes for all.
ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_Key = tuple[str, str]  # the full name of the module of all experts, and what a projection is for them


@dataclass
class Found:
    """The factors of experts in an adapter that has them apart, and all its other tensors by their keys.

    `names` has, for each projection, the names of its linear layers in transformers 4: alpha is looked up by them.
    """

    layout: str
    factors: dict[_Key, Factors] = field(default_factory=dict)
    names: dict[_Key, list[str]] = field(default_factory=dict)
    rest: dict[str, torch.Tensor] = field(default_factory=dict)


def renaming(model: nn.Module) -> Callable[[str], str]:
    """Returns what turns a module's name in a hub checkpoint of the model's family into the one in memory."""
    plain = lookup.plain_model(model)
    rules = get_model_conversion_mapping(plain) if isinstance(plain, PreTrainedModel) else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]

    def renamed(name: str) -> str:
        return str(rename_source_key(f"{name}.weight", renamings, [])[0]).removesuffix(".weight")

    return renamed


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules that hold parameters of three axes, experts among them, by their full names."""
    return {
        name: module
        for name, module in lookup.owners(model)
        if any(p is not None and p.ndim == 3 for p in own_parameters(module).values())
    }


def factor_keys(path: str, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns the keys of A and B of a module's parameters: PEFT wraps it once for each, the first innermost."""
    wrapped = {name: f"{PREFIX}{path}{'.base_layer' * depth}" for depth, name in enumerate(reversed(names))}
    return {name: (f"{where}.lora_A.weight", f"{where}.lora_B.weight") for name, where in wrapped.items()}


def layout(shapes: Mapping[str, Sequence[int]], model: nn.Module) -> str | None:
    """Returns `lists` or `stacked` when tensors of these shapes, by their keys, hold experts apart; else None."""
    renamed, experts = renaming(model), owners(model)
    present = {name for name, _ in lookup.owners(model)}
    for key, shape in shapes.items():
        plain = key.removeprefix(PREFIX)
        one, stack = _ONE.fullmatch(plain), _STACK.fullmatch(plain)
        if one and one["name"] in ROLES and _moved(one, renamed) in experts:
            if f"{_moved(one, renamed)}.{one['expert']}" not in present:
                return "lists"
        elif stack and stack["name"] in ROLES and len(shape) == 3 and _moved(stack, renamed) in experts:
            return "stacked"
    return None


def _moved(found: re.Match[str], renamed: Callable[[str], str]) -> str:
    """Returns the name in memory of the module that all experts of a key are in."""
    return renamed(f"{found['path']}.0.{found['name']}").removesuffix(f".0.{found['name']}")


def gather(kind: str, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> Found:
    """Sorts an adapter's tensors: the factors of experts, by projection, and the rest.

    Raises:
        ValueError: experts are missing, or differ in shape.
    """
    renamed, experts = renaming(model), owners(model)
    found = Found(kind)
    pattern = _ONE if kind == "lists" else _STACK
    parts: dict[_Key, dict[tuple[int, str], torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = pattern.fullmatch(key.removeprefix(PREFIX))
        path = _moved(match, renamed) if match and match["name"] in ROLES else ""
        if match is None or path not in experts or (kind == "stacked" and tensor.ndim != 3):
            found.rest[key] = tensor
            continue
        place = (path, ROLES[match["name"]])
        number = int(match["expert"]) if kind == "lists" else 0
        parts.setdefault(place, {})[number, match["side"]] = tensor
        name = key.removeprefix(PREFIX).rpartition(".lora_")[0]
        if name not in found.names.setdefault(place, []):
            found.names[place].append(name)
    for place, pieces in parts.items():
        count = _count(experts[place[0]])
        wanted = [(e, side) for e in range(count if kind == "lists" else 1) for side in "AB"]
        odd = sorted({*wanted} ^ {*pieces})
        if odd:
            raise ValueError(
                f"{place[0]} has {count} experts, and of their {place[1]} projections the adapter has "
                f"{'no' if odd[0] in wanted else 'too many'} lora_{odd[0][1]} ({len(odd)} tensors, the first of expert "
                f"{odd[0][0]})"
            )
        if kind == "lists":
            found.factors[place] = layouts.from_list([(pieces[e, "A"], pieces[e, "B"]) for e in range(count)])
        else:
            found.factors[place] = layouts.from_stacked(pieces[0, "A"], pieces[0, "B"], count)
    return found


def _count(owner: nn.Module) -> int:
    """Returns how many experts the parameters of a module are of."""
    return next(len(p) for p in own_parameters(owner).values() if p is not None and p.ndim == 3)


def fused(
    found: Found, document: Mapping[str, Any], model: nn.Module
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """Makes the configuration and the tensors of PEFT's fused layout; and words on what is not as it was.

    Raises:
        ValueError: experts have different scales, or something that fused parameters cannot have.
    """
    refused = [key for key in ("use_dora", "lora_bias", "bias") if document.get(key) not in (None, False, "none")]
    if refused:
        raise ValueError(f"its experts have {', '.join(refused)}, which fused parameters cannot have")
    made: dict[str, tuple[Factors, float]] = {}
    holders = owners(model)
    for path, holder in holders.items():
        roles = {role: _scaled(found, (path, role), document) for at, role in found.factors if at == path}
        made |= {f"{path}.{name}": value for name, value in _parameters(path, holder, roles).items()}
    tensors: dict[str, torch.Tensor] = {}
    for path, holder in holders.items():
        names = [name for name in own_parameters(holder) if f"{path}.{name}" in made]
        for name, keys in factor_keys(path, names).items():
            tensors |= zip(keys, layouts.pack(made[f"{path}.{name}"][0]), strict=True)
    settings = _Settings(document)
    for name, (factors, scale) in made.items():
        settings.put(name, factors.rank, scale)
    modules, parameters, rest = _others(found.rest, document, settings, model)
    changed = {
        **document,
        **settings.fields(),
        "target_modules": sorted(modules),
        "target_parameters": sorted([*parameters, *made]),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,
    }
    dropout = document.get("lora_dropout")
    words = [f"its dropout ({dropout}) is left out: fused parameters have none"] if dropout else []
    return changed, {**rest, **tensors}, words


def _scaled(found: Found, place: _Key, document: Mapping[str, Any]) -> tuple[Factors, float]:
    """Returns the factors of a projection and the scale that its experts have in common."""
    factors = found.factors[place]
    alphas = {alpha_of(document, name) for name in found.names[place]}
    if len(alphas) != 1:
        raise ValueError(f"the experts of {place[0]} have different alphas ({sorted(alphas)}); fused they share one")
    return factors, alphas.pop() / root_of(document, factors.rank)


def root_of(document: Mapping[str, Any], rank: int) -> float:
    """Returns what alpha is divided by: the rank, or with rsLoRA its square root."""
    return math.sqrt(rank) if document.get("use_rslora") else rank


def alpha_of(document: Mapping[str, Any], name: str) -> float:
    """Returns the alpha that the configuration gives a target, by PEFT's own rule."""
    values = document.get("alpha_pattern") or {}
    alpha: float = values.get(get_pattern_key(list(values), name), document.get("lora_alpha", 8))
    return alpha


def scale_of(document: Mapping[str, Any], name: str, rank: int) -> float:
    """Returns what the update of a target is multiplied by."""
    return alpha_of(document, name) / root_of(document, rank)


def as_whole(alpha: float) -> float:
    """Returns an alpha that was computed; as a whole number where rounding alone keeps it from being one."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _parameters(
    path: str, holder: nn.Module, roles: Mapping[str, tuple[Factors, float]]
) -> dict[str, tuple[Factors, float]]:
    """Makes the factors of a module's parameters from those of its projections."""
    held = own_parameters(holder)
    made = {}
    if "down" in roles:
        made["down_proj"] = roles["down"]
    if "gate_up_proj" in held:
        given = {role: roles[role] for role in ("gate", "up") if role in roles}
        if given:
            scales = {scale for _, scale in given.values()}
            if len(scales) != 1:
                raise ValueError(
                    f"gate and up of {path} have different scales ({sorted(scales)}); fused they share one"
                )
            some = next(iter(given.values()))[0]
            silent = Factors(some.a, torch.zeros_like(some.b))  # a projection without an update: the same A, B of zeros
            gate, up = (given[role][0] if role in given else silent for role in ("gate", "up"))
            interleaved = not vars(holder).get("is_concatenated", True)
            made["gate_up_proj"] = layouts.fuse(gate, up, interleaved=interleaved), scales.pop()
    else:
        made |= {f"{role}_proj": roles[role] for role in ("gate", "up") if role in roles}
    if strange := [name for name in made if name not in held]:
        raise ValueError(f"{path} has no parameter {strange[0]}, which the adapter has factors for")
    return made


@dataclass
class _Settings:
    """Ranks and alphas of single targets, where they are not those of the whole configuration."""

    document: Mapping[str, Any]
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def put(self, name: str, rank: int, scale: float) -> None:
        """Notes the rank and the scale of a target."""
        alpha = as_whole(scale * root_of(self.document, rank))
        if rank != self.document.get("r"):
            self.ranks[name] = rank
        if alpha != self.document.get("lora_alpha"):
            self.alphas[name] = alpha

    def fields(self) -> dict[str, Any]:
        """Returns them as LoraConfig's fields; each pattern is one whole name."""
        found: dict[str, Mapping[str, float]] = {"rank_pattern": self.ranks, "alpha_pattern": self.alphas}
        return {key: {patterns.exactly(name): v for name, v in values.items()} for key, values in found.items()}


def _others(
    rest: Mapping[str, torch.Tensor], document: Mapping[str, Any], settings: _Settings, model: nn.Module
) -> tuple[set[str], set[str], dict[str, torch.Tensor]]:
    """Names the other targets (modules, and parameters of what is no linear layer any more) under their new names."""
    renamed, present = renaming(model), dict(lookup.owners(model))
    modules: set[str] = set()
    parameters: set[str] = set()
    tensors: dict[str, torch.Tensor] = {}
    for key, tensor in rest.items():
        part = _PART.fullmatch(key.removeprefix(PREFIX))
        if part is None:
            tensors[key] = tensor
            continue
        name = renamed(part["module"])
        tensors[f"{PREFIX}{name}.lora_{part['side']}.weight"] = tensor
        routed = name in present and not isinstance(present[name], (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
        target = f"{name}.weight" if routed and "weight" in own_parameters(present[name]) else name
        (parameters if target != name else modules).add(target)
        if part["side"] == "A":
            settings.put(target, tensor.shape[0], scale_of(document, part["module"], tensor.shape[0]))
    return modules, parameters, tensors
