"""What of an MoE block belongs to its experts, one row, item or number each; and what else says how many there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.model import anatomy, cost, operations
from solidify.surgery import expert_groups, expert_numbers

# Of a configuration or a module, in transformers 5.23.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts")
_TOTALS = re.compile(r"(n|num|total)(_\w+)?_(experts|classes)$")  # of a router: all that it chooses among
_SIDE = "num_keys"  # of a grid of experts, whose rows and columns are looked up (product keys)
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "top_k_experts")


def plan_block(model: PreTrainedModel, name: str, order: list[int]) -> dict[str, Any]:
    """Finds, within a block, what has one row, item or number for each expert; `size` experts (0: none) at present.

    A tensor of a router may have `further` rows behind those of the experts (for experts that compute nothing, for
    shared ones), which stay; and `totals` says by how much numbers exceed that of the experts. `tables` name experts.
    """
    block = model.get_submodule(name)
    size = _count_experts(model, name, block)
    lists = [path for path, items in _find_lists(block).items() if len(items) == size and "shared" not in path]
    more = {path: value - size for path, value in _list_totals(block).items() if value > size > 0}
    rows = {
        path: (dim, count - size)
        for path, tensor in (*block.named_parameters(), *block.named_buffers())
        for dim, count in enumerate(tensor.shape[: 2 if tensor.shape[:1] == (1,) else 1])
        if count - size in (0, *more.values())
        and "shared" not in path
        and not any(path.startswith(f"{each}.") for each in lists)
    }
    further = {path: count for path, (_, count) in rows.items() if count}
    numbers = [
        f"{path}.{key}".lstrip(".")
        for path, module in block.named_modules()
        for key, value in expert_numbers.list_numbers(module).items()
        if value == size and (key.endswith(_COUNTS) or (key == "out_features" and f"{path}.weight" in rows))
    ]
    totals = {path: count for path, count in more.items() if count in further.values()}
    owners = {path.rpartition(".")[0]: count for path, count in further.items()}
    totals |= {
        f"{owner}.out_features": count
        for owner, count in owners.items()
        if isinstance(block.get_submodule(owner), nn.Linear)
    }
    plan = {
        "order": order,
        "tensors": {path: dim for path, (dim, _) in rows.items()},
        "lists": lists,
        "numbers": numbers,
        "size": size,
    }
    groups = expert_groups.find_groups(block, size)
    rest = {
        "groups": groups.numbers_after(order) if groups is not None else {},
        "further": further,
        "totals": totals,
        "tables": expert_numbers.find_tables(block, size, set(find_choices(block).values())),
    }
    return {**plan, **{key: found for key, found in rest.items() if found}}


def _list_totals(block: nn.Module) -> dict[str, int]:
    """Returns what the modules of a block say of how many experts, or classes, there are with those that stay."""
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in block.named_modules()
        for key, value in vars(module).items()
        if type(value) is int and _TOTALS.search(key)
    }


def find_faults(block: nn.Module, name: str, plan: Mapping[str, Any]) -> list[str]:
    """Says why a block cannot have the experts of its plan."""
    size, order = plan["size"], plan["order"]
    if not size:
        return [describe_missing(name, block)]
    faults = [
        f"{name} has no expert {expert}: it has {size}, from 0 to {size - 1}"
        for expert in dict.fromkeys(order)
        if not 0 <= expert < size
    ]
    chosen = max({**find_choices(block), **plan.get("chosen", {})}.values(), default=1)
    if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 1:
        faults.append(f"experts_per_token is a whole number of at least 1, but {chosen!r} was given")
    elif len(order) < chosen:
        faults.append(f"{name} gives each token {chosen} experts, but the order has {len(order)}")
    groups = expert_groups.find_groups(block, size)
    return faults if faults or groups is None else groups.find_faults(name, order, chosen)


def count_groups(model: PreTrainedModel, name: str) -> int:
    """Returns the number of groups of experts that a block's router chooses among first; 1 where there are none."""
    block = model.get_submodule(name)
    groups = expert_groups.find_groups(block, _count_experts(model, name, block))
    return 1 if groups is None else groups.count


def find_choices(block: nn.Module) -> dict[str, int]:
    """Returns where a block says how many experts a token gets: path of the attribute -> the number."""
    return {
        f"{path}.{key}".lstrip("."): value
        for path, module in block.named_modules()
        for key, value in expert_numbers.list_numbers(module).items()
        if key.rpartition(".")[2] in _CHOSEN
    }


def find_missing(model: PreTrainedModel, sizes: Mapping[str, int]) -> list[str]:
    """Says which of the named blocks have no experts (a size of 0), and how those are named that have some."""
    missing, blocks = [name for name in sizes if not sizes[name]], [name for name in sizes if sizes[name]]
    if not missing or not blocks:
        return [describe_missing(name, model.get_submodule(name)) for name in missing]
    kinds = ", ".join(dict.fromkeys(type(model.get_submodule(name)).__name__ for name in missing))
    return [
        f"{', '.join(missing)} ({kinds}) {'has' if len(missing) == 1 else 'have'} no experts, and the others have; "
        f"name those alone: {_find_patterns(model, blocks)}"
    ]


def _find_patterns(model: PreTrainedModel, blocks: Sequence[str]) -> list[str]:
    """Returns few patterns that name these blocks and no other module."""
    everywhere = [name for name, _ in model.named_modules()]
    found: list[str] = []
    left = list(blocks)
    while left:
        hits = {pattern: set(anatomy.match(pattern, everywhere)[pattern]) for pattern in _list_patterns(left[0])}
        pattern = next((p for p, names in hits.items() if len(names) > 1 and names <= set(blocks)), left[0])
        found.append(pattern)
        left = [name for name in left if name not in {left[0], *hits.get(pattern, ())}]
    return found


def _list_patterns(name: str) -> Iterator[str]:
    """Yields patterns for a block: all layers, then those whose numbers begin more and more as its own."""
    parts = name.split(".")
    at = next((index for index, part in reversed(list(enumerate(parts))) if part.isdigit()), None)
    if at is not None:
        for length in range(len(parts[at]) + 1):
            yield ".".join([*parts[:at], f"{parts[at][:length]}*", *parts[at + 1 :]])


def describe_missing(name: str, block: nn.Module) -> str:
    """Says that a module has no experts, or none of a form that can be rearranged."""
    kind, taken = f"{name} ({type(block).__name__})", "only experts in a list, or in a stack of three axes, are taken"
    for path, module in block.named_modules():
        if isinstance(module, nn.ModuleDict) and "expert" in path:
            return f"{kind} keeps its experts in a dictionary of modules ({path}); {taken}"
    said = {value for module in block.modules() for key, value in vars(module).items() if key.endswith(_COUNTS)}
    for module in block.modules():
        side = vars(module).get(_SIDE)
        if type(side) is int and side * side in said:
            return (
                f"{kind} keeps its {side * side} experts in a grid of {side} by {side}: its router scores rows and "
                "columns alone, so that no expert can go or change places by itself"
            )
    for path, parameter in block.named_parameters():
        rows = parameter.shape[0] if parameter.ndim == 2 and path.startswith("experts.") else 0
        count = next((n for n in said if type(n) is int and n > 1 and rows > n and rows % n == 0), 0)
        if count:
            each = f"{path}: {count} times {rows // count} rows"
            return f"{kind} keeps its {count} experts below each other in one matrix each ({each}); {taken}"
    return (
        f"{kind} has no experts, in a stack or list of the number that it or its configuration says; name an MoE "
        "block, such as '**.mlp'"
    )


def expert_tensors(block: nn.Module, plan: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, int | None]]:
    """Returns the tensors that experts compute with, by path: the whole stack, or that of one expert and its number.

    A stack of matrices is the experts', and so is what stands beside it with a row for each; a router's is not.
    """
    parameters = dict(block.named_parameters())
    holders = {path.rpartition(".")[0] for path in plan["tensors"] if path in parameters and parameters[path].ndim == 3}
    found: dict[str, tuple[torch.Tensor, int | None]] = {
        path: (parameters[path], None)
        for path, dim in plan["tensors"].items()
        if dim == 0 and path in parameters and path.rpartition(".")[0] in holders
    }
    for each in plan["lists"]:
        for path, tensor in parameters.items():
            if path.startswith(f"{each}."):
                found[path] = (tensor, int(path.removeprefix(f"{each}.").partition(".")[0]))
    return found


def find_ties(model: PreTrainedModel, names: Sequence[str], plans: Mapping[str, dict[str, Any]]) -> list[str]:
    """Names tensors of experts that have another name too, which a new one would not have."""
    found: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(path)
    tied = [group for group in found.values() if len(group) > 1]
    own = {f"{name}.{path}" for name in names for path in plans[name]["tensors"]}
    return [f"{', '.join(group)} are one tensor, which the new order would split" for group in tied if own & set(group)]


def find_configured(
    model: PreTrainedModel, plans: Mapping[str, Mapping[str, Any]], name: str
) -> dict[str, dict[str, int]]:
    """Returns what says, outside of the blocks, how many experts there are and how many a token gets.

    That is the configuration, before and after, and attributes of modules (the head's, by which it balances the load).
    Where some blocks keep another number, nothing is changed.
    """
    config = operations.enclosing_config(model, f"{name}.experts")
    path = anatomy.path_in_config(model.config, config)
    found: dict[str, dict[str, int]] = {"before": {}, "after": {}, "attributes": {}}
    if path is None:
        return found
    for old, new, keys in _list_numbers(model, plans, name, config):
        values = {key: value for key, value in vars(config).items() if keys(key) and value == old}
        attributes = [
            f"{owner}.{key}".lstrip(".")
            for owner, module in model.named_modules()
            for key, value in vars(module).items()
            if type(value) is int and value == old and keys(key)
            if any(not owner or each.startswith(f"{owner}.") for each in plans)
        ]
        found["before"] |= {path + key: old for key in values}
        found["after"] |= {path + key: new for key in values}
        found["attributes"] |= dict.fromkeys(attributes, new)
    return found


def find_held(block: nn.Module, name: str, settings: Mapping[str, Any]) -> list[str]:
    """Says which numbers a block reads from a configuration that others share, and that would not be as it needs."""
    wanted = {**dict.fromkeys(settings["numbers"], len(settings["order"])), **settings.get("chosen", {})}
    after = {path.rpartition(".")[2]: number for path, number in settings["after"].items()}
    return [
        f"{name} reads {path} from the configuration, which is that of all blocks, so they change alike: name all of "
        "them in one call"
        for path in expert_numbers.find_shared(wanted)
        if wanted[path] not in (get_path(block, path), after.get(path.rpartition(".")[2]))
    ]


def is_mixed(block: nn.Module, settings: Mapping[str, Any]) -> bool:
    """Returns whether a number of a block will be another than the configuration says."""
    keys = [path.rpartition(".")[2] for path in settings["after"]]
    counted = len(settings["order"]) == settings["size"] or any(key.endswith(_COUNTS) for key in keys)
    grouped = not settings.get("groups") or any(key in expert_groups.COUNTS for key in keys)
    chosen = settings.get("chosen", {}).items() <= find_choices(block).items() or any(key in _CHOSEN for key in keys)
    return not (counted and grouped and chosen)


def _list_numbers(
    model: PreTrainedModel, plans: Mapping[str, Mapping[str, Any]], name: str, config: PreTrainedConfig
) -> Iterator[tuple[int, int, Callable[[str], bool]]]:
    """Yields the numbers of a configuration that all blocks have outgrown: the old one, the new one, and its keys."""
    counts = {key: value for key, value in vars(config).items() if key.endswith(_COUNTS) and type(value) is int}
    number, size = max(counts.values(), default=0), len(plans[name]["order"])
    alike = all(len(plan["order"]) == size for plan in plans.values())
    if number not in (0, size) and alike and _are_alike(model, list(plans), size, number):
        yield number, size, lambda key: key.endswith(_COUNTS)
    chosen = next(iter(plans[name].get("chosen", {}).values()), None)
    said = {value for key, value in vars(config).items() if key in _CHOSEN and type(value) is int}
    if chosen is not None and len(said) == 1 and chosen not in said and _choose_alike(model, plans, chosen):
        yield said.pop(), chosen, lambda key: key in _CHOSEN
    for keys in (expert_groups.COUNTS, expert_groups.CHOSEN):
        yield from _list_group_numbers(model, plans, name, config, keys)


def _list_group_numbers(
    model: PreTrainedModel,
    plans: Mapping[str, Mapping[str, Any]],
    name: str,
    config: PreTrainedConfig,
    keys: Sequence[str],
) -> Iterator[tuple[int, int, Callable[[str], bool]]]:
    """Yields how many groups of experts there were, and are, once all blocks have as many."""

    def now(block: nn.Module, plan: Mapping[str, Any]) -> set[int]:
        """Returns the numbers that a block will have under these keys."""
        groups = expert_groups.find_groups(block, plan["size"])
        found = {**(groups.places if groups is not None else {}), **plan.get("groups", {})}
        return {value for path, value in found.items() if path.rpartition(".")[2] in keys}

    said = {value for key, value in vars(config).items() if key in keys and type(value) is int}
    kinds = {type(model.get_submodule(each)) for each in plans}
    after: set[int] = set()
    for other, module in model.named_modules():
        if other in plans:
            after |= now(module, plans[other])
        elif type(module) in kinds:
            after |= now(module, plan_block(model, other, []))
    if len(said) == 1 and len(after) == 1 and after != said:
        yield said.pop(), after.pop(), lambda key: key in keys


def _choose_alike(model: PreTrainedModel, plans: Mapping[str, Mapping[str, Any]], chosen: int) -> bool:
    """Returns whether a token gets as many experts in all blocks, once the named ones have changed."""
    kinds = {type(model.get_submodule(name)) for name in plans}
    others = (
        module
        for other, module in model.named_modules()
        if type(module) in kinds and not any(other == name or other.startswith(f"{name}.") for name in plans)
    )
    return all(set(find_choices(module).values()) <= {chosen} for module in others)


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


def get_path(module: nn.Module, path: str) -> Any:
    """Returns what stands at a dotted path of attributes."""
    for part in path.split("."):
        module = getattr(module, part)
    return module
