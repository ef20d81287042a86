"""Routers that choose among groups of experts first: what they say of their groups, and which orders keep them.

Such a router ranks groups by the best scores in each, and a token gets its experts from the best groups alone. Experts
of one group stand side by side, and all groups have as many: so an order lists group after group, with as many of
each. The groups themselves may be reordered, and whole ones may go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

COUNTS = ("num_group", "n_group", "num_expert_group")  # of routers and configurations, in transformers 5.23
CHOSEN = ("topk_group",)
_RANKED_BY = 2  # routers rank a group by its best expert or by its two best


@dataclass(frozen=True)
class Groups:
    """A router has `count` groups of `size` experts, and chooses `chosen` of them; `places` are the attributes."""

    count: int
    size: int
    chosen: int
    places: Mapping[str, int]

    def renumbered(self) -> list[int]:
        """Returns an order in which every group stands elsewhere, and every expert elsewhere in its group."""
        return [
            (group + 1) % self.count * self.size + (expert + 1) % self.size
            for group in range(self.count)
            for expert in range(self.size)
        ]

    def split(self, order: Sequence[int]) -> list[list[int]] | None:
        """Returns the parts of an order that are a group each; None where it has no such parts, equally large."""
        present = {expert // self.size for expert in order}
        if not present or len(order) % len(present):
            return None
        width = len(order) // len(present)
        parts = [list(order[start : start + width]) for start in range(0, len(order), width)]
        homes = [{expert // self.size for expert in part} for part in parts]
        return parts if all(len(home) == 1 for home in homes) and len(set().union(*homes)) == len(parts) else None

    def numbers_after(self, order: Sequence[int]) -> dict[str, int]:
        """Returns what the attributes must say once groups have gone; nothing where all stay."""
        parts = self.split(order)
        if parts is None or len(parts) == self.count:
            return {}
        count, chosen = len(parts), min(self.chosen, len(parts))
        return {path: count if path.rpartition(".")[2] in COUNTS else chosen for path in self.places}

    def find_faults(self, name: str, order: Sequence[int], per_token: int) -> list[str]:
        """Says why the router of a block cannot choose `per_token` experts in groups of these."""
        parts, rule = self.split(order), self._state_rule(name)
        if parts is None:
            return [f"{rule}, so an order lists group after group, with as many of each: {self._remedy()}"]
        width, chosen = len(parts[0]), min(self.chosen, len(parts))
        if width < min(self.size, _RANKED_BY):
            return [f"{rule} by the two best of each, but the order has {width} of a group: {self._remedy()}"]
        if chosen * width < per_token:
            return [
                f"{rule} and gives a token {per_token} experts of those, but the order leaves only {chosen * width}: "
                f"keep {-(-per_token // chosen)} or more in each group of {self.size}"
            ]
        return []

    def describe_copies(self, name: str) -> list[str]:
        """Says why a copy beside each expert changes what a block computes; nothing where all groups are chosen."""
        if self.chosen >= self.count:
            return []
        return [
            f"{self._state_rule(name)} by the best experts in each; copies count there too, so that other groups would "
            "be chosen: give an order instead, which is free to change the function"
        ]

    def _state_rule(self, name: str) -> str:
        return f"the router of {name} has {self.count} groups of {self.size} experts and chooses {self.chosen} of them"

    def _remedy(self) -> str:
        return f"keep N in each group of {self.size}, or leave whole groups out"


def find_groups(block: nn.Module, size: int) -> Groups | None:
    """Returns the groups of a block's `size` experts; None where its router says of none, or of one."""
    places = {
        f"{path}.{key}".lstrip("."): value
        for path, module in block.named_modules()
        for key, value in vars(module).items()
        if key in (*COUNTS, *CHOSEN) and type(value) is int
    }
    counts = {value for path, value in places.items() if path.rpartition(".")[2] in COUNTS}
    chosen = {value for path, value in places.items() if path.rpartition(".")[2] in CHOSEN}
    if len(counts) != 1 or len(chosen) != 1:
        return None
    count = counts.pop()
    if count < 2 or size % count:
        return None
    return Groups(count, size // count, chosen.pop(), places)
