"""The rows and items of other experts, taken in their order: at surgery, and in every artifact that carries this."""

from __future__ import annotations

from typing import Any


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
        numbers = dict.fromkeys(edit["numbers"], len(order)) | edit.get("chosen", {}) | edit.get("groups", {})
        for path, number in numbers.items():
            owner, _, key = path.rpartition(".")
            setattr(block.get_submodule(owner), key, number)
