"""Inserts and removes layers in place: the list, the layers' numbers and the configuration change together.

How a family counts its layers is learned from the model at hand: which numbers inside a layer say where it stands, and
which entry of the configuration, changed, makes the list longer or shorter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, operations
from solidify.model.extent import Extent
from solidify.surgery import control, selection
from solidify.surgery.edit_record import Edit
from solidify.surgery.transaction import transaction
from solidify.system import foreign

_INDEX_WORDS = ("idx", "index", "layer", "block", "depth", "number", "_id")


def insert(
    model: PreTrainedModel,
    target: str | Sequence[str],
    *,
    zero: Sequence[str] = (),
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Inserts after every layer that `target` names a copy of it; later layers move up.

    `zero` names modules or parameters within the layer (`self_attn.o_proj`, `mlp.down_proj`) that are zero in the copy:
    with the projections back into the residual stream named, the model computes exactly what it did (block expansion,
    LLaMA-Pro, arXiv 2401.02415).

    Raises:
        SurgeryError: a target is no layer of a list, a name in `zero` is not found, or the changed model does not run
            or computes with a cache something else than without. The model is then as it was.
    """
    lists = _find_lists(model, target, expect, count)
    faults = [
        f"{name}.{index} has no {part!r} to set to zero; it has: {', '.join(list(_collect_parts(layer))[:12])}"
        for name, indices in lists.items()
        for index in indices
        for layer in [model.get_submodule(f"{name}.{index}")]
        for part in zero
        if part not in _collect_parts(layer)
    ]
    refuse(SurgeryError, "layers cannot be inserted as asked", faults)
    orders = {}
    for name, indices in lists.items():
        size = len(_list_at(model, name))
        orders[name] = [i for i in range(size) for _ in range(1 + (i in indices))]
    return _rearrange_lists(model, orders, "insert", zero, extent)


def remove(
    model: PreTrainedModel,
    target: str | Sequence[str],
    *,
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Removes every layer that `target` names; later layers move down.

    Raises:
        SurgeryError: a target is no layer of a list, no layer would be left, or the changed model does not run or
            computes with a cache something else than without. The model is then as it was.
    """
    orders = {
        name: [i for i in range(len(_list_at(model, name))) if i not in indices]
        for name, indices in _find_lists(model, target, expect, count).items()
    }
    empty = [f"no layer of {name} would be left" for name, order in orders.items() if not order]
    refuse(SurgeryError, "layers cannot be removed as asked", empty)
    return _rearrange_lists(model, orders, "remove", (), extent)


def _find_lists(
    model: PreTrainedModel, target: str | Sequence[str], expect: str | None, count: int | None
) -> dict[str, list[int]]:
    """Returns the lists that hold the targets, each with the indices that are meant."""
    lists: dict[str, list[int]] = {}
    faults = []
    for name in selection.targets(model, target, expect, count):
        parent, _, index = name.rpartition(".")
        if index.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList):
            lists.setdefault(parent, []).append(int(index))
        else:
            faults.append(f"{name} is not an item of a list of layers")
    refuse(SurgeryError, "the target is not a layer", faults)
    return lists


def _list_at(model: PreTrainedModel, name: str) -> Any:
    return model.get_submodule(name)


def _collect_parts(layer: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Returns what can be named in a layer, modules and parameters, with the parameters of each."""
    modules = {name: list(module.parameters()) for name, module in layer.named_modules() if name}
    return {**modules, **{name: [parameter] for name, parameter in layer.named_parameters()}}


def _rearrange_lists(
    model: PreTrainedModel, orders: dict[str, list[int]], verb: str, zero: Sequence[str], extent: Extent | None
) -> list[Edit]:
    """Changes the lists one after the other; puts everything back when the result does not run.

    Some families count the same layers twice (a decoder that was cut out of an encoder-decoder): where the model does
    not run with the one number changed that makes the list longer, all that count layers and are equal to it are.
    """
    extent = Extent.given(extent, model)
    before = control.take_whole(model, extent)
    what = "these layers"
    for wide in (False, True):
        try:
            with transaction(model, extent, changes=orders):
                edits = [_rearrange_one(model, name, order, verb, zero, wide=wide) for name, order in orders.items()]
                identical = control.judge_whole(model, before, what)
        except SurgeryError:
            if wide:
                raise
        else:
            probed = before.inputs is not None
            return [
                dataclasses.replace(edit, identical=identical, probed=probed, control=before.distances)
                for edit in edits
            ]
    raise AssertionError("unreachable")


def _rearrange_one(
    model: PreTrainedModel, name: str, order: list[int], verb: str, zero: Sequence[str], *, wide: bool
) -> Edit:
    """Rearranges one list and writes the record."""
    settings = _make_settings(model, name, order, wide)
    old = _list_at(model, name)
    size, parameters, old_keys = len(old), anatomy.count(old.parameters()), list(old.state_dict())
    operations.rearrange(model, [name], settings, {})
    operations.assign(model.config, settings["after"])
    new = _list_at(model, name)
    tensors: dict[str, str | None] = {}
    for index, source in enumerate(order):
        copied = source in order[:index]
        silent = {id(p) for part in zero for p in _collect_parts(new[index])[part]} if copied else set()
        for parameter in new[index].parameters():
            if id(parameter) in silent and not parameter.is_meta:
                parameter.data.zero_()
        for key, tensor in new[index].state_dict(keep_vars=True).items():
            tensors[f"{name}.{index}.{key}"] = None if id(tensor) in silent else f"{name}.{source}.{key}"
    used = set(tensors.values())
    return Edit(
        name=name,
        old_class=type(new).__name__,
        module_class=None,
        arguments={verb: _find_difference(order, size), **({"zero": list(zero)} if zero else {})},
        supplied=(),
        tensors=tensors,
        dropped=tuple(f"{name}.{key}" for key in old_keys if f"{name}.{key}" not in used),
        frozen=(),
        parameters_before=parameters,
        parameters_after=anatomy.count(new.parameters()),
        probed=False,
        identical=False,
        bypass=False,
        operation="rearrange",
        settings=settings,
    )


def _find_difference(order: list[int], size: int) -> list[int]:
    """Returns the layers, by their old indices, that were copied or left out."""
    return [i for i in range(size) if order.count(i) != 1]


def _make_settings(model: PreTrainedModel, name: str, order: list[int], wide: bool) -> dict[str, Any]:
    """Returns what an artifact needs to do the same: order, numbers to renew, the configuration before and after."""
    before, after = _find_configuration(model, name, order, wide)
    return {"order": order, "index": _find_indices(_list_at(model, name)), "before": before, "after": after}


def _find_indices(layers: Any) -> list[str]:
    """Finds the numbers within the layers that say where a layer stands: equal to its index in every layer."""
    found: dict[str, list[bool]] = {}
    for index, layer in enumerate(layers):
        for owner, module in layer.named_modules():
            for key, value in vars(module).items():
                if type(value) is int and any(word in key for word in _INDEX_WORDS):
                    found.setdefault(f"{owner}.{key}" if owner else key, []).append(value == index)
    return sorted(path for path, agrees in found.items() if all(agrees))


def _find_configuration(
    model: PreTrainedModel, name: str, order: list[int], wide: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Finds the entries of the configuration that go with the list, as they are and as they must become.

    Lists with one value per layer are put into the new order, lists of layer numbers are renumbered, and the number of
    layers is the entry that, changed, makes the family's own constructor build a list of the new length. Lists that
    do not speak of layers by their name are touched only when it cannot be had without.
    """
    owner_name, owner = _find_owner(model, name)
    path = anatomy.path_in_config(model.config, owner.config)
    if path is None:
        raise SurgeryError(
            f"the configuration of {owner_name} is not part of the model's configuration, so its number of layers "
            "cannot be changed there"
        )
    inside = name.removeprefix(owner_name + ".") if owner_name else name
    size = len(_list_at(model, name))
    values = {key: value for key, value in vars(owner.config).items() if not key.startswith("_") and key != "surgery"}
    lists = {key: list(value) for key, value in values.items() if isinstance(value, (list, tuple))}
    numbers = [key for key, value in values.items() if type(value) is int and value == size]
    for strict in (True, False):
        changed = {key: new for key, value in lists.items() if (new := _reorder_list(key, value, order, size, strict))}
        for number in [None, *numbers]:
            after = {**changed, **({number: len(order)} if number else {})}
            if _count_layers(owner, inside, after) == len(order):
                after |= dict.fromkeys([key for key in numbers if "layer" in key] if wide else [], len(order))
                return {path + key: values[key] for key in after}, {path + key: value for key, value in after.items()}
    return {}, {}  # the family does not count these layers; the list alone says how many there are


def _find_owner(model: PreTrainedModel, name: str) -> tuple[str, PreTrainedModel]:
    """Returns the innermost pretrained model that holds a module, and its name."""
    found = ("", model)
    parts = name.split(".")
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, PreTrainedModel):
            found = (".".join(parts[:end]), module)
    return found


def _reorder_list(key: str, value: list[Any], order: list[int], size: int, strict: bool) -> list[Any] | None:
    """Returns a list for the new order of layers; None for a list that has nothing to do with layers."""
    are_indices = bool(value) and all(type(v) is int and 0 <= v < size for v in value) and value == sorted(set(value))
    if are_indices and any(word in key for word in ("layer", "idx", "index", "indices")):
        return [index for index, source in enumerate(order) if source in value]
    is_per_layer = "layer" in key or all(isinstance(v, str) for v in value) or not strict
    return [value[source] for source in order] if len(value) == size and is_per_layer else None


def _count_layers(owner: PreTrainedModel, inside: str, after: dict[str, Any]) -> int | None:
    """Returns how many layers the family builds from a configuration with other values; None when it refuses them."""
    config = deepcopy(owner.config)
    operations.assign(config, after)
    kind = next(cls for cls in type(owner).__mro__ if not hasattr(cls, "changed"))

    def build() -> int:
        with torch.device("meta"):
            return len(_list_at(kind(config), inside))

    return foreign.attempt(build).value
