"""An adapter's experts in the layout of another program: the way back of `expert_files.py` and `expert_lists.py`.

What is written is read again by those, and must be the adapter that it was, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

from solidify.adapter import configured, expert_files, expert_lists, patterns
from solidify.adapter import expert_layouts as layouts
from solidify.adapter.expert_files import Pair
from solidify.adapter.expert_layouts import Factors
from solidify.adapter.expert_lists import PREFIX, ROLES, alpha_of, as_whole, root_of, scale_of
from solidify.errors import AdapterError
from solidify.upstream.transformers import revert_weight_conversion

_MARK = {layouts.GROUPED: {"lora_B_layout": "grouped_by_expert"}}
_STACKED = {"gate": "w1", "up": "w3", "down": "w2"}  # vLLM's words


def write(directory: Path, output: Path, layout: str, model: PreTrainedModel) -> None:
    """Writes the adapter in `directory`, which has our layout, into the empty directory `output` in another.

    `model`, which may be on the meta device, is the adapter's base.

    Raises:
        AdapterError: it holds no experts, or what the other layout has no place for.
    """
    document = configured.unmarked(configured.document(directory))
    tensors = safetensors.torch.load_file(directory / configured.WEIGHTS)
    pairs = expert_files.find_pairs({key: tuple(t.shape) for key, t in tensors.items()}, document, model)
    if not pairs:
        raise AdapterError(f"{directory} holds no low-rank updates of fused experts, so there is nothing to lay out")
    if layout in layouts.ORDERS:
        for pair in pairs:
            factors = layouts.unpack(tensors[pair.a], tensors[pair.b], pair.shape[0])
            tensors[pair.a], tensors[pair.b] = layouts.pack(factors, layout)
    else:
        document, tensors = _take_apart(directory, document, tensors, pairs, layout, model)
    expert_files.write_files(output, document, tensors, **_MARK.get(layout, {}))


def find_differences(directory: Path, output: Path, layout: str, model: PreTrainedModel) -> list[str]:
    """Reads what was written as `expert_files` reads it, and names each update that is not what it was."""
    with expert_files.in_own_layout(output, model, layout) as own:
        found = [_read_updates(each, model) for each in (directory, own.directory)]
    before, after = found
    return [
        name
        for name in sorted({*before, *after})
        if name not in before
        or name not in after
        or before[name][1] != after[name][1]
        or not all(torch.equal(a, b) for a, b in zip(before[name][0], after[name][0], strict=True))
    ]


def _read_updates(directory: Path, model: PreTrainedModel) -> dict[str, tuple[list[torch.Tensor], float]]:
    """Returns the tensors of each update in our layout, and its scale to nine digits, by the key of its A."""
    document = configured.document(directory)
    tensors = safetensors.torch.load_file(directory / configured.WEIGHTS)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    pairs = {pair.a: pair for pair in expert_files.find_pairs(shapes, document, model)}
    found: dict[str, tuple[list[torch.Tensor], float]] = {}
    for key, tensor in tensors.items():
        module, side, _ = key.partition(".lora_A.")
        if key.partition(".lora_B.")[1]:
            continue
        if not side:
            found[key] = ([tensor], 1.0)
            continue
        name = pairs[key].full_name if key in pairs else module.removeprefix(PREFIX)
        rank = len(tensor) // pairs[key].shape[0] if key in pairs else len(tensor)
        found[key] = ([tensor, tensors[f"{module}.lora_B.weight"]], float(f"{scale_of(document, name, rank):.9g}"))
    return found


@dataclass
class _Apart:
    """Tensors of an adapter without fused parameters, and the rank and alpha of each of its targets."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def put(self, name: str, a: torch.Tensor, b: torch.Tensor, rank: int, alpha: float) -> None:
        """Adds a target."""
        self.tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        self.ranks[name] = rank
        self.alphas[name] = as_whole(alpha)


def _take_apart(
    directory: Path,
    document: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    pairs: list[Pair],
    layout: str,
    model: PreTrainedModel,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Makes the configuration and the tensors of an adapter that has its experts one by one, or stacked."""
    if (bias := document.get("bias", "none")) != "none":
        raise AdapterError(
            f"{directory} trains biases (bias={bias!r}) beside low-rank updates, for which {layout} has no place"
        )
    names, apart = _HubNames.of(model), _Apart()
    for pair in pairs:
        factors = layouts.unpack(tensors[pair.a], tensors[pair.b], pair.shape[0])
        scale = scale_of(document, pair.full_name, factors.rank)
        for role, part in _list_projections(pair, factors, model).items():
            for name, a, b in names.lay_out(pair.owner, role, part, layout, directory):
                apart.put(name, a, b, part.rank, scale * root_of(document, part.rank))
    own = {key for pair in pairs for key in (pair.a, pair.b)}
    for key in tensors.keys() - own:
        module, side, rest = key.removeprefix(PREFIX).partition(".lora_A.weight")
        if ".lora_B.weight" in key:
            continue
        if not side or rest:
            raise AdapterError(f"{directory} trains {key} beside low-rank updates, for which {layout} has no place")
        b = tensors[f"{PREFIX}{module}.lora_B.weight"]
        apart.put(names.module(module), tensors[key], b, len(tensors[key]), alpha_of(document, module))
    rank = Counter(apart.ranks.values()).most_common(1)[0][0]
    alpha = Counter(apart.alphas.values()).most_common(1)[0][0]
    changed = {
        **document,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {patterns.exactly(n): r for n, r in apart.ranks.items() if r != rank},
        "alpha_pattern": {patterns.exactly(n): a for n, a in apart.alphas.items() if a != alpha},
        "target_modules": sorted(apart.ranks),
        "target_parameters": None,
    }
    return changed, apart.tensors


def _list_projections(pair: Pair, factors: Factors, model: PreTrainedModel) -> dict[str, Factors]:
    """Returns the factors of an expert's projections, by what they are."""
    if pair.name != "gate_up_proj":
        return {ROLES[pair.name]: factors}
    holder = model.get_submodule(pair.owner)
    gate, up = layouts.split(factors, interleaved=not vars(holder).get("is_concatenated", True))
    return {"gate": gate, "up": up}


@dataclass(frozen=True)
class _HubNames:
    """How a family's checkpoints name modules: of experts by (module in memory, projection), and of all others."""

    experts: Mapping[tuple[str, str], Mapping[int, str]]
    others: Mapping[str, str]

    @classmethod
    def of(cls, model: PreTrainedModel) -> _HubNames:
        """Reads them from the checkpoint that transformers would write of a model."""
        meta = {key: torch.empty(tensor.shape, device="meta") for key, tensor in model.state_dict().items()}
        renamed, holders = expert_lists.renaming(model), expert_lists.owners(model)
        experts: dict[tuple[str, str], dict[int, str]] = {}
        others = {}
        for key in revert_weight_conversion(model, meta):
            name = key.removesuffix(".weight")
            path, _, projection = name.rpartition(".")
            path, _, number = path.rpartition(".")
            where = renamed(f"{path}.0.{projection}").removesuffix(f".0.{projection}")
            if number.isdigit() and projection in ROLES and where in holders:
                experts.setdefault((where, ROLES[projection]), {})[int(number)] = name
            else:
                others[renamed(name)] = name
        return cls(experts, others)

    def module(self, name: str) -> str:
        """Returns what checkpoints call a module."""
        return self.others.get(name, name)

    def lay_out(
        self, owner: str, role: str, part: Factors, layout: str, directory: Path
    ) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Returns the targets of one projection of all experts: their names, A and B.

        Raises:
            AdapterError: checkpoints of the family have no modules of single experts.
        """
        found = self.experts.get((owner, role), {})
        if len(found) != len(part.a):
            raise AdapterError(
                f"{directory} cannot be written as {layout}: checkpoints of its base's family have no modules of "
                f"single experts that {owner} is made of, so nothing says what they are called"
            )
        if layout == "stacked":
            return [(f"{found[0].rpartition('.')[0].rpartition('.')[0]}.{_STACKED[role]}", part.a, part.b)]
        return [(found[expert], a, b) for expert, (a, b) in enumerate(layouts.to_list(part))]
