"""merge_experts: clusters of experts become one each, the weighted average after their neurons are aligned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from solidify.errors import SurgeryError, refuse
from solidify.surgery.expert_scores import ExpertScores
from solidify.surgery.experts import RearrangeExperts
from solidify.surgery.operation import Context, Operation, Record, broken_rule

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.model.extent import Extent
    from solidify.surgery.edit_record import Edit
    from solidify.surgery.expert_averages import Merging

Clusters = Sequence[Sequence[int]]
_REFUSED = "the experts cannot be merged as asked"


class MergeExperts(Operation):
    """One step of surgery: in the blocks that `merge_experts` names, the experts of each cluster become one.

    `clusters` lists them; or experts whose rows of the router are alike are put together until there are `into`. Their
    `weights` are equal, or how often each is chosen on the first `rows` rows of the recipe's data.
    """

    asked = recorded = "merge_experts"
    shapes = runs = True

    merge_experts: str | list[str]
    expect: str
    clusters: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]] | None = Field(
        default=None, min_length=1
    )
    into: int | None = Field(default=None, ge=1)
    weights: Literal["equal", "frequency"] = "equal"
    rows: int = Field(default=128, ge=1)
    experts_per_token: int | None = Field(default=None, ge=1)
    count: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_together(self) -> MergeExperts:
        if (self.clusters is None) == (self.into is None):
            raise broken_rule("give `clusters`, or `into`, the number of experts that are left")
        if self.weights != "frequency" and "rows" in self.model_fields_set:
            raise broken_rule("`rows` says on how much data experts are counted: give `weights: frequency`")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the step needs data."""
        return self.weights == "frequency"

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Merges the experts, which are clustered and counted first where that is asked for."""
        from solidify.model import anatomy
        from solidify.surgery import expert_clusters, selection

        names = selection.targets(model, self.merge_experts, self.expect, self.count)
        clusters: Any = self.clusters
        if anatomy.is_meta(model):
            clusters = expert_clusters.stand_in(model, names, self.into) if self.into is not None else clusters
            merging = _plan_merging(model, names, clusters, None)
            merging = dataclasses.replace(merging, weights=self.weights, planned=self.into is not None)
        else:
            if self.into is not None:
                clusters = expert_clusters.cluster_experts(model, names, self.into)
            counted = context.scores(model, names, "frequency", self.rows) if self.calibrates else None
            merging = _plan_merging(model, names, clusters, counted)
        return _merge_as_planned(model, merging, self.experts_per_token, context.extent)

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Measures the tensors and lists that have one row or item per expert."""
        return RearrangeExperts.inspect(module, edit)

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what an artifact does when its constructor has built the blocks as they were."""
        from solidify.surgery.expert_taking import take_experts

        return take_experts


def merge_experts(
    model: PreTrainedModel,
    target: str | Sequence[str],
    clusters: Clusters | Mapping[str, Clusters],
    *,
    weights: ExpertScores | None = None,
    experts_per_token: int | None = None,
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Makes one expert of each cluster, in the MoE blocks that `target` names, and returns the edits.

    Cluster `i` becomes expert `i`: the average of its experts' tensors, and of their rows of the router, by how many
    tokens each got (`weights.counts`), or equally. Before that the neurons of each are put in the order of those of the
    cluster's heaviest expert, which computes the same. A mapping has clusters for each block, by its name.

    Raises:
        SurgeryError: an expert is in no cluster, or in two; where its neurons stand is not found; or as
            `rearrange_experts`. The model is then as it was.
    """
    from solidify.surgery import selection

    names = selection.targets(model, target, expect, count)
    return _merge_as_planned(model, _plan_merging(model, names, clusters, weights), experts_per_token, extent)


def _plan_merging(
    model: PreTrainedModel,
    names: Sequence[str],
    clusters: Clusters | Mapping[str, Clusters],
    weights: ExpertScores | None,
) -> Merging:
    """Returns what becomes one in each block, and with which shares."""
    from solidify.surgery import expert_averages, expert_change

    sizes = {name: len(order) for name, order in expert_change.present_orders(model, names).items()}
    given = clusters if isinstance(clusters, Mapping) else dict.fromkeys(names, clusters)
    faults = _find_faults(names, given, sizes, weights)
    refuse(SurgeryError, _REFUSED, faults)
    refuse(SurgeryError, _REFUSED, [f for name in names for f in _find_split_groups(model, name, given[name])])
    parts = {name: _weigh(given[name], weights.counts[name] if weights is not None else None) for name in names}
    return expert_averages.Merging(parts, "equal" if weights is None else weights.digest())


def _merge_as_planned(
    model: PreTrainedModel, merging: Merging, experts_per_token: int | None, extent: Extent | None
) -> list[Edit]:
    from solidify.surgery import expert_change

    orders = {name: [max(part, key=lambda e: part[e]) for part in parts] for name, parts in merging.parts.items()}
    chosen = None if experts_per_token is None else dict.fromkeys(orders, experts_per_token)
    return expert_change.change(model, orders, chosen, merging=merging, extent=extent)


def _weigh(clusters: Clusters, counts: Sequence[int] | None) -> list[dict[int, float]]:
    """Returns the share of each expert in its cluster; equal ones where none of them got a token."""
    found = []
    for cluster in clusters:
        weights = [1 if counts is None else counts[expert] for expert in cluster]
        weights = weights if sum(weights) else [1] * len(weights)
        found.append({expert: weight / sum(weights) for expert, weight in zip(cluster, weights, strict=True)})
    return found


def _find_split_groups(model: PreTrainedModel, name: str, clusters: Clusters) -> list[str]:
    """Names the clusters of a block whose experts are of several groups."""
    from solidify.surgery import expert_groups

    groups = expert_groups.find_groups(model.get_submodule(name), sum(map(len, clusters)))
    if groups is None:
        return []
    split = [list(cluster) for cluster in clusters if len({expert // groups.size for expert in cluster}) > 1]
    rule = f"the router of {name} chooses among {groups.count} groups of {groups.size} experts"
    return [f"{rule}, so a cluster has experts of one group, but {cluster} has of several" for cluster in split]


def _find_faults(
    names: Sequence[str], clusters: Mapping[str, Any], sizes: Mapping[str, int], weights: ExpertScores | None
) -> list[str]:
    """Says which blocks have no clusters that hold each of their experts once."""
    faults = [f"there are no clusters for {name}" for name in names if name not in clusters]
    faults += [
        f"there are clusters for {name!r}, which is none of the blocks" for name in clusters if name not in names
    ]
    for name in names:
        listed = clusters.get(name, [])
        if not all(isinstance(c, Sequence) and c and all(type(e) is int for e in c) for c in listed):
            faults.append(f"{name}: clusters are lists of experts' numbers, as in [[0, 3], [1, 2]], but are {listed!r}")
            continue
        experts = [expert for cluster in listed for expert in cluster]
        if sizes[name] and name in clusters and sorted(experts) != list(range(sizes[name])):
            faults.append(
                f"{name} has the experts 0 to {sizes[name] - 1}, each to be in one cluster, but the clusters hold "
                f"{sorted(experts)}"
            )
        if weights is not None and len(weights.counts.get(name, ())) != sizes[name]:
            faults.append(f"{name}: the weights are no table of its {sizes[name]} experts")
    return faults
