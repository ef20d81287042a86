"""cluster_experts: which experts of a block are alike, by the rows of its router."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy
from solidify.surgery import expert_parts, expert_tables, selection
from solidify.surgery.expert_scores import find_uncountable

_REFUSED = "the experts cannot be clustered as asked"


def cluster_experts(model: PreTrainedModel, where: str | Sequence[str], into: int) -> dict[str, list[list[int]]]:
    """Returns, for each MoE block that `where` names, its experts in `into` clusters; the model is unchanged.

    The two clusters whose experts' router rows are most alike (the mean of all pairs' cosines) become one, until there
    are so many; in each group by itself, where the router chooses among groups first.

    Raises:
        SurgeryError: a name means nothing, a block has no experts or not so many, its router has no rows for them or
            such as are NaN or infinite, or the model is on the meta device, where rows have no values.
    """
    rows = _read_rows(model, where, into)
    if anatomy.is_meta(model):
        raise SurgeryError(f"{_REFUSED}: the model is on the meta device, so it has no weights to be alike by; load it")
    lost = [name for name, each in rows.items() if not bool(each.isfinite().all())]
    refuse(SurgeryError, _REFUSED, [f"{name}: its router has weights that are NaN or infinite" for name in lost])
    return {
        name: _cluster_groups(each.cpu(), into, expert_parts.count_groups(model, name)) for name, each in rows.items()
    }


def stand_in(model: PreTrainedModel, where: str | Sequence[str], into: int) -> dict[str, list[list[int]]]:
    """Returns clusters of the right number in the place of those that are found once there are weights.

    Raises:
        SurgeryError: none could be found then, as `cluster_experts` says.
    """
    rows = _read_rows(model, where, into)
    found = {}
    for name, each in rows.items():
        count = expert_parts.count_groups(model, name)
        width, left = len(each) // count, into // count
        found[name] = [
            cluster
            for start in range(0, len(each), width)
            for cluster in (
                *([start + expert] for expert in range(left - 1)),
                list(range(start + left - 1, start + width)),
            )
        ]
    return found


def _read_rows(model: PreTrainedModel, where: str | Sequence[str], into: int) -> dict[str, torch.Tensor]:
    """Returns the router's rows (number of experts, hidden_size) of each block, in float64."""
    names = selection.targets(model, where, None, None)
    blocks = {name: model.get_submodule(name) for name in names}
    plans = {name: expert_parts.plan_block(model, name, []) for name in names}
    faults = expert_parts.find_missing(model, {name: plan["size"] for name, plan in plans.items()})
    if not faults:
        groups = {name: expert_parts.count_groups(model, name) for name in names}
        faults = find_uncountable(into, {name: plan["size"] for name, plan in plans.items()}, groups)
    refuse(SurgeryError, _REFUSED, faults)
    found = {}
    for name, plan in plans.items():
        wide = expert_tables.read_routers(blocks[name], plan)
        if not wide:
            raise SurgeryError(f"{name}: its router has no rows of weights for its experts, so none are alike by them")
        found[name] = torch.cat(wide, dim=1).double()
    return found


def _cluster_groups(rows: torch.Tensor, into: int, count: int) -> list[list[int]]:
    """Returns clusters of rows, as many in each of `count` groups, group after group."""
    width = len(rows) // count
    return [
        [start + expert for expert in cluster]
        for start in range(0, len(rows), width)
        for cluster in _cluster(rows[start : start + width], into // count)
    ]


def _cluster(rows: torch.Tensor, into: int) -> list[list[int]]:
    """Returns clusters of rows by average linkage, in the order of their first members."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    sums = unit @ unit.T  # over all pairs of two clusters' members; where a cluster was joined to another, no more
    sizes = torch.ones(len(rows), dtype=rows.dtype)
    apart = torch.ones_like(sums, dtype=torch.bool).triu(1)  # each pair of clusters once
    clusters = {number: [number] for number in range(len(rows))}
    while len(clusters) > into:
        means = (sums / torch.outer(sizes, sizes)).where(apart, -torch.inf)
        first, second = (means == means.max()).nonzero()[0].tolist()
        sums[first] += sums[second]
        sums[:, first] += sums[:, second]
        sizes[first] += sizes[second]
        apart[second] = apart[:, second] = False
        clusters[first] += clusters.pop(second)
    return sorted(sorted(cluster) for cluster in clusters.values())
