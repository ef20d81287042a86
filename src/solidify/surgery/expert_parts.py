"""What of an MoE block belongs to its experts, one row, item or number each; and what else says how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from solidify.model import anatomy, cost, operations

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of a configuration, in transformers 5.23
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "top_k_experts")


def plan_block(model: PreTrainedModel, name: str, order: list[int]) -> dict[str, Any]:
    """Finds, within a block, what has one row, item or number for each expert; `size` experts (0: none) at present."""
    block = model.get_submodule(name)
    size = _count_experts(model, name, block)
    lists = [path for path, items in _find_lists(block).items() if len(items) == size and "shared" not in path]
    tensors = {
        path: dim
        for path, tensor in (*block.named_parameters(), *block.named_buffers())
        for dim, rows in enumerate(tensor.shape[: 2 if tensor.shape[:1] == (1,) else 1])
        if rows == size and "shared" not in path and not any(path.startswith(f"{each}.") for each in lists)
    }
    numbers = [
        f"{path}.{key}".lstrip(".")
        for path, module in block.named_modules()
        for key, value in vars(module).items()
        if type(value) is int
        and value == size
        and (key.endswith(_COUNTS) or (key == "out_features" and f"{path}.weight" in tensors))
    ]
    return {"order": order, "tensors": tensors, "lists": lists, "numbers": numbers, "size": size}


def find_faults(block: nn.Module, name: str, plan: Mapping[str, Any]) -> list[str]:
    """Says why a block cannot have the experts of its plan."""
    size, order = plan["size"], plan["order"]
    if not size:
        return [
            f"{name} ({type(block).__name__}) has no experts, in a stack or list of the number that it or its "
            "configuration says; name an MoE block, such as '**.mlp'"
        ]
    faults = [
        f"{name} has no expert {expert}: it has {size}, from 0 to {size - 1}"
        for expert in dict.fromkeys(order)
        if not 0 <= expert < size
    ]
    values = [vars(module).get(key) for module in block.modules() for key in _CHOSEN]
    chosen = max((value for value in values if type(value) is int), default=1)
    if len(order) < chosen:
        faults.append(f"{name} gives each token {chosen} experts, but the order has {len(order)}")
    return faults


def find_ties(model: PreTrainedModel, names: Sequence[str], plans: Mapping[str, dict[str, Any]]) -> list[str]:
    """Names tensors of experts that have another name too, which a new one would not have."""
    found: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(path)
    tied = [group for group in found.values() if len(group) > 1]
    own = {f"{name}.{path}" for name in names for path in plans[name]["tensors"]}
    return [f"{', '.join(group)} are one tensor, which the new order would split" for group in tied if own & set(group)]


def find_configured(
    model: PreTrainedModel, names: Sequence[str], name: str, plan: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Returns what says how many experts there are outside of the blocks, once all blocks have as many.

    That is the configuration, before and after, and attributes of modules (the head's, by which it balances the load).
    Where some blocks keep another number, nothing is changed.
    """
    config = operations.enclosing_config(model, f"{name}.experts")
    counts = {key: value for key, value in vars(config).items() if key.endswith(_COUNTS) and type(value) is int}
    number, size = max(counts.values(), default=0), len(plan["order"])
    path = anatomy.path_in_config(model.config, config)
    if number in (0, size) or path is None or not _are_alike(model, names, size, number):
        return {"before": {}, "after": {}, "attributes": {}}
    keys = [key for key, value in counts.items() if value == number]
    attributes = [
        f"{owner}.{key}".lstrip(".")
        for owner, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int
        and value == number
        and key.endswith(_COUNTS)
        and any(not owner or each.startswith(f"{owner}.") for each in names)
    ]
    return {
        "before": dict.fromkeys((path + key for key in keys), number),
        "after": dict.fromkeys((path + key for key in keys), size),
        "attributes": dict.fromkeys(attributes, size),
    }


def _find_lists(block: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in block.named_modules() if path and isinstance(module, nn.ModuleList)}


def _count_experts(model: PreTrainedModel, name: str, block: nn.Module) -> int:
    """Returns how many experts a block has: so many are stacked, and it says so itself or its configuration does."""
    stacks = {parameter.shape[0] for parameter in block.parameters() if parameter.ndim == 3}
    stacks |= {len(items) for items in _find_lists(block).values()}
    said = [value for module in block.modules() for key, value in vars(module).items() if key.endswith(_COUNTS)]
    said.append(cost.experts(operations.enclosing_config(model, f"{name}.experts"))[0])
    return next((value for value in said if type(value) is int and value > 1 and value in stacks), 0)


def _are_alike(model: PreTrainedModel, names: Sequence[str], size: int, number: int) -> bool:
    """Returns whether all blocks have `size` experts once the named ones have, and nothing else holds `number`."""
    kinds = {type(model.get_submodule(name)) for name in names}
    for other, module in model.named_modules():
        if any(other == name or other.startswith(f"{name}.") for name in names):
            continue
        if _has_stack(module, number) or (type(module) in kinds and _count_experts(model, other, module) != size):
            return False
    return True


def _has_stack(module: nn.Module, size: int) -> bool:
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    named = any("expert" in key for key, child in module.named_children() if isinstance(child, nn.ModuleList))
    stacks = [parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    return size in stacks or (named and any(len(items) == size for items in lists))
