"""Chooses, repeats and reorders the experts of MoE blocks by a list of numbers, experts and router together.

The whole operation: its type, its function and the code that artifacts carry. Which tensors belong to the experts is
found by their shapes and then proved: with all experts renumbered, a block must compute what it computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from solidify.errors import SurgeryError, refuse
from solidify.surgery.operation import Context, Operation, Record

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.model.extent import Extent
    from solidify.surgery.contract import Call
    from solidify.surgery.replacing import Edit

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of a configuration, in transformers 5.23
_CHOSEN = ("top_k", "num_experts_per_tok", "moe_topk", "top_k_experts")


class RearrangeExperts(Operation):
    """One step of surgery: the blocks that `rearrange_experts` names have the experts that `order` lists, so ordered.

    A number that is left out goes (pruning), one that comes twice is copied.
    """

    asked = recorded = "rearrange_experts"
    shapes = runs = True

    rearrange_experts: str | list[str]
    order: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)
    expect: str
    count: int | None = Field(default=None, ge=1)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Rearranges the experts."""
        return rearrange_experts(
            model, self.rearrange_experts, self.order, expect=self.expect, count=self.count, extent=context.extent
        )

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Measures the tensors and lists that have one row or item per expert."""
        settings = edit["settings"]
        size = len(settings["order"])
        found = {path: _get_path(module, path).shape[dim] for path, dim in settings["tensors"].items()}
        found |= {path: len(_get_path(module, path)) for path in settings["lists"]}
        wrong = [f"{path} has {rows} experts, not {size}" for path, rows in found.items() if rows != size]
        return f"has {size} experts", wrong

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what an artifact does when its constructor has built the blocks as they were."""
        return take_experts


def rearrange_experts(
    model: PreTrainedModel,
    target: str | Sequence[str],
    order: Sequence[int],
    *,
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Gives the MoE blocks that `target` names the experts that `order` lists, and returns the edits.

    Expert `order[i]` (counted from 0) becomes expert `i`, with its column of the router: a number that is left out goes
    with the tokens that it would have had, one that comes twice is copied, and both copies are chosen among. Once all
    blocks of a configuration have as many experts, in one call or in several, the configuration and the modules that
    count them say so too, and the family's own class can hold the result. Until then router logits are not recorded.

    Raises:
        SurgeryError: what is named has no experts or others than its router chooses from; `order` names an expert that
            is not there, or fewer than a token gets; the changed model does not run, or behaves otherwise than before
            (with and without a cache, beside other rows). The model is then as it was.
    """
    import dataclasses

    from solidify.model.extent import Extent
    from solidify.surgery import control, replacing
    from solidify.surgery.transaction import transaction

    extent = Extent.given(extent, model)
    names = replacing.targets(model, target, expect, count)
    numbers = _read_order(order)
    plans = {name: _plan_block(model, name, numbers) for name in names}
    faults = [fault for name, plan in plans.items() for fault in _find_faults(model.get_submodule(name), name, plan)]
    refuse(SurgeryError, "the experts cannot be rearranged as asked", faults)
    before = control.take_whole(model, extent)
    if before.inputs is not None:
        _refuse_unproved(model, plans, before.inputs, partly=not extent.whole)
    settings = {name: {**plan, **_find_configured(model, names, name, plan)} for name, plan in plans.items()}
    with transaction(model):
        edits = [_rearrange_one(model, name, settings[name], extent) for name in names]
        mixed = len({_count_experts(model, name, model.get_submodule(name)) for name in _list_blocks(model, names)}) > 1
        unrecorded = ("router_logits",) if mixed else ()  # transformers balances the load over equal blocks alone
        identical = control.judge_whole(model, before, "these experts", unrecorded=unrecorded)
    probed = before.inputs is not None
    return [dataclasses.replace(edit, identical=identical, probed=probed, control=before.distances) for edit in edits]


def take_experts(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Takes rows of tensors and items of lists, in a new order; a repeated one is copied."""
    from copy import deepcopy

    import torch
    from torch import nn

    order = edit["order"]
    for name in names:
        block = model.get_submodule(name)
        for path, dim in edit["tensors"].items():
            owner, _, key = path.rpartition(".")
            holder = block.get_submodule(owner)
            old = getattr(holder, key)
            rows = old.detach().index_select(dim, torch.tensor(order, device=old.device))
            if isinstance(old, nn.Parameter):
                holder.register_parameter(key, nn.Parameter(rows, requires_grad=old.requires_grad))
            else:
                setattr(holder, key, rows)
        for path in edit["lists"]:
            items = block.get_submodule(path)
            taken = [deepcopy(items[e]) if e in order[:index] else items[e] for index, e in enumerate(order)]
            block.set_submodule(path, type(items)(taken), strict=True)
        for path in edit["numbers"]:
            owner, _, key = path.rpartition(".")
            setattr(block.get_submodule(owner), key, len(order))


def _read_order(order: Sequence[int]) -> list[int]:
    """Returns the numbers as plain ones, whatever holds them (numpy, torch)."""
    wrong = [each for each in order if isinstance(each, (bool, str)) or not hasattr(each, "__index__")]
    if isinstance(order, (str, bytes, Mapping)) or wrong:
        found = repr(wrong[0] if wrong else order)
        raise SurgeryError(f"`order` lists experts by their numbers, as in [5, 2, 0], but holds {found}")
    return [index(each) for each in order]


def _get_path(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module


def _plan_block(model: PreTrainedModel, name: str, order: list[int]) -> dict[str, Any]:
    """Finds, within a block, what has one row, item or number for each expert; `size` experts (0: none) at present."""
    block = model.get_submodule(name)
    size = _count_experts(model, name, block)
    lists = [path for path, items in _find_lists(block).items() if len(items) == size]
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
        and ("expert" in key or (key == "out_features" and f"{path}.weight" in tensors))
    ]
    return {"order": order, "tensors": tensors, "lists": lists, "numbers": numbers, "size": size}


def _find_lists(block: nn.Module) -> dict[str, Any]:
    from torch import nn

    return {path: module for path, module in block.named_modules() if path and isinstance(module, nn.ModuleList)}


def _count_experts(model: PreTrainedModel, name: str, block: nn.Module) -> int:
    """Returns how many experts a block has: so many are stacked, and it says so itself or its configuration does."""
    from solidify.model import cost, operations

    stacks = {parameter.shape[0] for parameter in block.parameters() if parameter.ndim == 3}
    stacks |= {len(items) for items in _find_lists(block).values()}
    said = [value for module in block.modules() for key, value in vars(module).items() if "expert" in key]
    said.append(cost.experts(operations.enclosing_config(model, f"{name}.experts"))[0])
    return next((value for value in said if type(value) is int and value > 1 and value in stacks), 0)


def _find_faults(block: nn.Module, name: str, plan: Mapping[str, Any]) -> list[str]:
    size, order = plan["size"], plan["order"]
    if not size:
        return [f"{name} ({type(block).__name__}) has no experts; name an MoE block, such as '**.mlp'"]
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


def _refuse_unproved(
    model: PreTrainedModel, plans: Mapping[str, dict[str, Any]], inputs: Mapping[str, Any], *, partly: bool
) -> None:
    """Renumbers all experts in a copy of the first block of each kind: its output must stay, or it was misread.

    Raises:
        SurgeryError: it moves, as where a router first chooses among groups of experts; or a block is never called.
    """
    from solidify.surgery import contract, control

    first = list(control.first_of_each_kind(model, list(plans)))
    calls = contract.record(model, first, inputs, partly=partly)
    faults = [f"{name} is not called by the model" for name in first if name not in calls]
    for name, call in calls.items():
        moved = _moved_by_renumbering(model.get_submodule(name), plans[name], call)
        if moved is not None:
            faults.append(
                f"{name}: with its experts only renumbered the output moves by {moved:.1e} of its largest value, so "
                "they are not alike (a router that chooses among groups, or a part that knows them by number), or "
                "their router lies outside: name the block that holds both"
            )
    refuse(SurgeryError, "the experts cannot be rearranged as asked", faults)


def _moved_by_renumbering(block: nn.Module, plan: Mapping[str, Any], call: Call) -> float | None:
    """Returns by how much a block's output moves when its experts change places; None within rounding."""
    import torch

    from solidify.model import anatomy, operations
    from solidify.surgery import contract

    size = plan["size"]
    holder = torch.nn.Module()
    holder.add_module("block", operations.twin(block))
    take_experts(holder, ["block"], {**plan, "order": [*range(1, size), 0]}, {})  # no group of experts stays one
    with torch.no_grad(), anatomy.evaluation(holder):
        found = contract.tensors_in(
            holder.get_submodule("block")(*contract.copied(call.args), **contract.copied(call.kwargs))
        )[0]
    expected = contract.tensors_in(call.output)[0]
    if found.shape != expected.shape:
        return float("inf")
    far = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))
    allowed = 2e-5 if expected.dtype in (torch.float32, torch.float64) else 5e-2  # sums in another order
    return None if far <= allowed else far


def _list_blocks(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Returns all modules of the classes that the named ones have."""
    kinds = {type(model.get_submodule(name)) for name in names}
    return [name for name, module in model.named_modules() if type(module) in kinds]


def _find_configured(
    model: PreTrainedModel, names: Sequence[str], name: str, plan: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """Returns what says how many experts there are outside of the blocks, once all blocks have as many.

    That is the configuration, before and after, and attributes of modules (the head's, by which it balances the load).
    Where some blocks keep another number, nothing is changed.
    """
    from solidify.model import anatomy, operations

    config = operations.enclosing_config(model, f"{name}.experts")
    counts = {key: value for key, value in vars(config).items() if key.endswith(_COUNTS) and type(value) is int}
    number, size = max(counts.values(), default=0), len(plan["order"])
    blocks = _list_blocks(model, [name])
    alike = all(
        _count_experts(model, other, model.get_submodule(other)) == size for other in blocks if other not in names
    )
    path = anatomy.path_in_config(model.config, config)
    if not alike or path is None or number in (0, size):
        return {"before": {}, "after": {}, "attributes": {}}
    keys = [key for key, value in counts.items() if value == number]
    attributes = [
        f"{owner}.{key}".lstrip(".")
        for owner, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int
        and value == number
        and "expert" in key
        and not any(owner == block or owner.startswith(f"{block}.") for block in blocks)
    ]
    return {
        "before": dict.fromkeys((path + key for key in keys), number),
        "after": dict.fromkeys((path + key for key in keys), size),
        "attributes": dict.fromkeys(attributes, size),
    }


def _rearrange_one(model: PreTrainedModel, name: str, settings: dict[str, Any], extent: Extent) -> Edit:
    """Rearranges one block and writes the record."""
    from solidify.model import anatomy, operations
    from solidify.surgery.replacing import Edit
    from solidify.weights import spilling

    block = model.get_submodule(name)
    old_keys, parameters = list(block.state_dict()), anatomy.count(block.parameters())
    order, size = settings["order"], settings.pop("size")
    kept = [*block.parameters(), *block.buffers()]
    take_experts(model, [name], settings, {})
    if not extent.whole:
        spilling.spill(name, block, kept, extent.spill)
    operations.assign(model.config, settings["after"])
    operations.set_attributes(model, settings["attributes"])
    same = order == list(range(size))
    tensors: dict[str, str | None] = {}
    for key in block.state_dict():
        inside = next((each for each in settings["lists"] if key.startswith(f"{each}.")), None)
        if inside is not None:
            number, _, rest = key.removeprefix(f"{inside}.").partition(".")
            tensors[f"{name}.{key}"] = f"{name}.{inside}.{order[int(number)]}.{rest}"
        else:
            tensors[f"{name}.{key}"] = f"{name}.{key}" if same or key not in settings["tensors"] else None
    lives = set(tensors.values())
    return Edit(
        name=name,
        old_class=type(block).__name__,
        module_class=None,
        arguments={"order": order},
        supplied=(),
        tensors=tensors,
        dropped=tuple(f"{name}.{key}" for key in old_keys if f"{name}.{key}" not in lives),
        frozen=(),
        parameters_before=parameters,
        parameters_after=anatomy.count(block.parameters()),
        probed=False,
        identical=False,
        bypass=False,
        operation=RearrangeExperts.recorded,
        settings=settings,
    )
