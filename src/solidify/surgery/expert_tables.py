"""Tables by which a router looks up the experts of a token, written anew for other experts.

DeepSeek-V4's first layers have one: a row for each token id, with the numbers of as many experts as a token gets. An
expert that changes its number has the new one in the table, a copy stands beside what it is a copy of, and the place of
an expert that goes is taken by the one whose router row is most alike (the cosine) of those that the row has not yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from solidify.surgery import expert_parts

_ROWS = 4096  # of a table that are written at a time


def places(order: Sequence[int], size: int) -> list[list[int]]:
    """Returns the new numbers of each of `size` experts once there are those of `order`; none of one that goes."""
    return [[new for new, expert in enumerate(order) if expert == old] for old in range(size)]


def find_faults(name: str, block: nn.Module, plan: Mapping[str, Any], numbers: Sequence[Sequence[int]]) -> list[str]:
    """Says why the tables of a block cannot name other experts; `numbers` has the new numbers of each old one."""
    faults = []
    for path, width in plan.get("tables", {}).items():
        tensor = expert_parts.get_path(block, path)
        rule = f"{name} looks up in a table which {tensor.shape[1]} experts a token gets ({path})"
        copies = {len(each) for each in numbers}
        if width != tensor.shape[1] and copies != {width / tensor.shape[1]}:
            faults.append(f"{rule}, so none can get {width}: name only blocks without one")
        elif path not in block.state_dict():
            faults.append(f"{rule}, which is not saved, so that it would name the old ones once it is loaded")
        elif 0 in copies and not read_routers(block, plan):
            faults.append(f"{rule}, and its router has no rows by which to tell who is most like one that goes")
    return faults


def rewrite(block: nn.Module, plan: Mapping[str, Any], numbers: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Returns the tables of a block, by path, with the new numbers (`numbers`) of its experts."""
    found = {}
    for path, width in plan.get("tables", {}).items():
        table = expert_parts.get_path(block, path)
        if table.is_meta:
            found[path] = table.new_empty(len(table), width)
            continue
        alike = _compare(block, plan, numbers) if any(not each for each in numbers) else None
        parts = [_rewrite_rows(rows.long(), numbers, width, alike) for rows in table.split(_ROWS)]
        found[path] = torch.cat(parts).to(table.dtype)
    return found


def read_routers(block: nn.Module, plan: Mapping[str, Any]) -> list[torch.Tensor]:
    """Returns the rows of weights (number of experts, ...) that a router has for a block's experts."""
    own = expert_parts.expert_tensors(block, plan)
    found = []
    for path, dim in plan["tensors"].items():
        rows = expert_parts.get_path(block, path).detach().movedim(dim, 0)[: plan["size"]]
        rows = rows.reshape(len(rows), -1)
        if path not in own and rows.shape[1] > 1 and rows.is_floating_point():
            found.append(rows)
    return found


def _compare(block: nn.Module, plan: Mapping[str, Any], numbers: Sequence[Sequence[int]]) -> torch.Tensor:
    """Returns how alike the router's rows are (number of old experts, number of new ones)."""
    rows = torch.cat([each.double() for each in read_routers(block, plan)], dim=1)
    unit = torch.nn.functional.normalize(rows, dim=1)
    old = {new: expert for expert, each in enumerate(numbers) for new in each}
    return unit @ unit[[old[new] for new in range(len(old))]].T


def _rewrite_rows(
    rows: torch.Tensor, numbers: Sequence[Sequence[int]], width: int, alike: torch.Tensor | None
) -> torch.Tensor:
    """Returns rows of a table (tokens, experts a token) with new numbers."""
    copies = width // rows.shape[1]
    new = torch.tensor([[*each[:copies]] or [-1] * copies for each in numbers], device=rows.device)[rows].flatten(1)
    for column in (new < 0).any(0).nonzero()[:, 0].tolist():
        assert alike is not None
        lost = (new[:, column] < 0).nonzero()[:, 0]
        likeness = alike.to(rows.device)[rows[lost, column]]
        there = torch.zeros(len(lost), likeness.shape[1] + 1, dtype=torch.bool, device=rows.device)
        there.scatter_(1, new[lost] % there.shape[1], True)  # what is lost too falls into the last column
        new[lost, column] = likeness.masked_fill(there[:, :-1], -torch.inf).argmax(1)
    return new
