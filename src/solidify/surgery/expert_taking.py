"""The rows and items of other experts, taken in their order: at surgery, and in every artifact that carries this."""

from __future__ import annotations

from typing import Any


def take_experts(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Takes rows of tensors and items of lists, in a new order; a repeated one is copied.

    What stands behind the experts' rows (`further`) stays there. Tables that name experts (`tables`) get their width;
    what they name is their value, which is put or loaded after this.
    """
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
            end = old.shape[dim]
            taken = [*order, *range(end - edit.get("further", {}).get(path, 0), end)]
            rows = old.detach().index_select(dim, torch.tensor(taken, device=old.device))
            if isinstance(old, nn.Parameter):
                holder.register_parameter(key, nn.Parameter(rows, requires_grad=old.requires_grad))
            else:
                setattr(holder, key, rows)
        for path in edit["lists"]:
            items = block.get_submodule(path)
            taken = [deepcopy(items[e]) if e in order[:index] else items[e] for index, e in enumerate(order)]
            block.set_submodule(path, type(items)(taken), strict=True)
        for path, width in edit.get("tables", {}).items():
            owner, _, key = path.rpartition(".")
            old = getattr(block.get_submodule(owner), key)
            setattr(block.get_submodule(owner), key, old.new_zeros(old.shape[0], width))
        numbers = dict.fromkeys(edit["numbers"], len(order)) | edit.get("chosen", {}) | edit.get("groups", {})
        numbers |= {path: len(order) + more for path, more in edit.get("totals", {}).items()}
        for path, number in numbers.items():
            *parts, key = path.split(".")
            holder = block
            for part in parts:  # some stand in a module's configuration
                holder = getattr(holder, part)
            setattr(holder, key, number)
