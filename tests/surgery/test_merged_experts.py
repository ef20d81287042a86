"""Clusters of experts become one each: aligned, averaged, recorded; and what cannot be merged is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experts
import families
import pico
import pytest
import torch
from torch import nn

import solidify
from solidify.errors import SurgeryError
from solidify.surgery import expert_clusters
from solidify.surgery.expert_scores import ExpertScores

Permute = Callable[[Any, int, torch.Tensor], None]


def concatenated(stack: Any, expert: int, order: torch.Tensor) -> None:
    """Gate and up one after the other, as rows."""
    size = len(order)
    stack.gate_up_proj[expert] = stack.gate_up_proj[expert][torch.cat([order, order + size])]
    stack.down_proj[expert] = stack.down_proj[expert][:, order]


def interleaved(stack: Any, expert: int, order: torch.Tensor) -> None:
    """GPT-OSS: gate and up by turns, as columns, with biases."""
    both = torch.stack([2 * order, 2 * order + 1], dim=1).flatten()
    stack.gate_up_proj[expert] = stack.gate_up_proj[expert][:, both]
    stack.gate_up_proj_bias[expert] = stack.gate_up_proj_bias[expert][both]
    stack.down_proj[expert] = stack.down_proj[expert][order]


def plain(stack: Any, expert: int, order: torch.Tensor) -> None:
    """Nemotron-H: no gate."""
    stack.up_proj[expert] = stack.up_proj[expert][order]
    stack.down_proj[expert] = stack.down_proj[expert][:, order]


FAMILIES: list[Any] = [("olmoe", concatenated), ("gpt_oss", interleaved), ("nemotron_h", plain)]
FAMILIES += [pytest.param(f, concatenated, marks=pytest.mark.slow) for f in ("qwen2_moe", "mixtral", "granitemoe")]


@pytest.mark.parametrize(("family", "permute"), FAMILIES)
def test_permuted_copies_become_the_expert_that_they_were(family: str, permute: Permute) -> None:
    """Bit for bit, tensors and logits: the average of equal numbers is that number."""
    model, ids = families.tiny(family), experts.tokens()
    names, before = experts.blocks(model), experts.logits(model, ids)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    chosen = model.config.num_experts_per_tok
    solidify.duplicate_experts(model, names)
    for number, name in enumerate(names):
        stack = model.get_submodule(name).experts
        width = (stack.down_proj.shape[1:][family != "gpt_oss"]) if family != "nemotron_h" else stack.up_proj.shape[1]
        for expert in range(1, 8, 2):
            generator = torch.Generator().manual_seed(8 * number + expert)
            with torch.no_grad():
                permute(stack, expert, torch.randperm(width, generator=generator))
    doubled = experts.logits(model, ids)
    clusters = [[1, 0], [2, 3], [4, 5], [7, 6]]
    edits = solidify.merge_experts(model, names, clusters, experts_per_token=chosen)
    assert float((doubled - before).abs().max()) < 2e-6 * float(before.abs().max())
    assert float((experts.logits(model, ids) - before).abs().max()) < 2e-6 * float(before.abs().max())
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items() if "experts" not in key)
    assert edits[0].arguments["clusters"] == clusters and model.config.num_experts_per_tok == chosen
    restored = model.get_submodule(names[0]).experts.down_proj
    for number in (1, 2):  # the first of a cluster is its reference, and these were not permuted
        assert torch.equal(restored[number], state[f"{names[0]}.experts.down_proj"][number])


def merged_by_hand(block: Any, cluster: list[int], counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The average of OLMoE's experts in float64, each neuron with the nearest that is free, nearest pairs first."""
    size = block.experts.down_proj.shape[2]
    gated, down = block.experts.gate_up_proj.detach().double(), block.experts.down_proj.detach().double()

    def neuron(expert: int, index: int) -> torch.Tensor:
        return torch.cat([gated[expert, index], gated[expert, size + index], down[expert, :, index]])

    heaviest = max(cluster, key=lambda expert: counts[expert])
    out = [torch.zeros(3 * gated.shape[2], dtype=torch.float64) for _ in range(size)]
    for expert in cluster:
        pairs = sorted(
            (float((neuron(heaviest, i) - neuron(expert, j)).norm()), i, j) for i in range(size) for j in range(size)
        )
        free, taken = set(range(size)), set(range(size))
        for _, i, j in pairs:
            if i in free and j in taken:
                free.remove(i)
                taken.remove(j)
                out[i] += counts[expert] / sum(counts[e] for e in cluster) * neuron(expert, j)
    width = gated.shape[2]
    first = torch.stack([*(row[:width] for row in out), *(row[width : 2 * width] for row in out)])
    return first, torch.stack([row[2 * width :] for row in out], dim=1)


def test_experts_are_averaged_by_how_often_they_are_chosen() -> None:
    """Against an independent float64 computation; the router's rows by the same weights."""
    model = pico.olmoe()
    original = pico.olmoe()
    counts = [[5, 1, 0, 7, 3, 9, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8]]
    names = ["model.layers.0.mlp", "model.layers.1.mlp"]
    weights = ExpertScores("frequency", dict.fromkeys(names, [0.0] * 8), dict(zip(names, counts, strict=True)), 9)
    clusters = [[0, 3, 1], [2, 4], [5], [6, 7]]
    edits = solidify.merge_experts(model, "**.mlp", clusters, weights=weights)
    for name, count in zip(names, counts, strict=True):
        block, before = model.get_submodule(name), original.get_submodule(name)
        for number, cluster in enumerate(clusters):
            own = count if sum(count[e] for e in cluster) else [1] * 8
            gated, down = merged_by_hand(before, cluster, own)
            assert torch.allclose(block.experts.gate_up_proj[number].double(), gated, rtol=1e-6, atol=1e-8)
            assert torch.allclose(block.experts.down_proj[number].double(), down, rtol=1e-6, atol=1e-8)
            shares = torch.tensor([own[e] / sum(own[e] for e in cluster) for e in cluster], dtype=torch.float64)
            row = (shares[:, None] * before.gate.weight[cluster].double()).sum(0)
            assert torch.allclose(block.gate.weight[number].double(), row, rtol=1e-6, atol=1e-8)
    assert model.config.num_experts == 4 and edits[0].arguments["weights"] == weights.digest()


def test_experts_with_alike_routers_are_put_together() -> None:
    model = pico.olmoe()
    for layer in model.model.layers:
        with torch.no_grad():
            layer.mlp.gate.weight[6] = 1.01 * layer.mlp.gate.weight[2]
            layer.mlp.gate.weight[4] = 0.9 * layer.mlp.gate.weight[2]
            layer.mlp.gate.weight[7] = 2.0 * layer.mlp.gate.weight[0]
    found = solidify.cluster_experts(model, "**.mlp", 5)
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(clusters == [[0, 7], [1], [2, 4, 6], [3], [5]] for clusters in found.values())
    solidify.merge_experts(model, "**.mlp", found)
    assert model.config.num_experts == 5


def clustered_by_hand(rows: torch.Tensor, into: int) -> list[list[int]]:
    """Average linkage as it is defined: every mean over all pairs, anew for each merge."""
    unit = nn.functional.normalize(rows, dim=1)
    clusters = [[number] for number in range(len(rows))]
    while len(clusters) > into:
        means = {
            (i, j): sum(float(unit[a] @ unit[b]) for a in clusters[i] for b in clusters[j])
            / (len(clusters[i]) * len(clusters[j]))
            for i in range(len(clusters))
            for j in range(i + 1, len(clusters))
        }
        first, second = max(means, key=lambda pair: means[pair])
        clusters[first] += clusters.pop(second)
    return sorted(sorted(cluster) for cluster in clusters)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("into", [1, 3, 8, 23, 24])
def test_clusters_are_those_of_average_linkage(seed: int, into: int) -> None:
    rows = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert expert_clusters._cluster(rows, into) == clustered_by_hand(rows, into)


def test_many_experts_are_clustered_in_no_time() -> None:
    """A mean over all pairs at every merge took over a minute."""
    rows = torch.randn(256, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    started = time.perf_counter()
    assert len(expert_clusters._cluster(rows, 64)) == 64
    assert time.perf_counter() - started < 10


def test_experts_whose_router_has_no_numbers_are_not_alike() -> None:
    model = pico.olmoe()
    model.model.layers[1].mlp.gate.weight.data[2, 3] = torch.nan
    with pytest.raises(SurgeryError, match=r"layers\.1\.mlp: its router has weights that are NaN or infinite"):
        solidify.cluster_experts(model, "**.mlp", 4)


class Single(nn.Module):
    """Experts of one matrix each, which have no neurons between what comes in and what goes out."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_experts = 8
        self.router = nn.Linear(config.hidden_size, 8, bias=False)
        self.experts = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size) for _ in range(8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.router(x), -1)
        return torch.as_tensor(sum(weights[..., n : n + 1] * self.experts[n](x) for n in range(len(self.experts))))


class Listed(Single):
    """Experts in a list, each a feed-forward of its own."""

    def __init__(self, config: Any):
        super().__init__(config)
        width = config.hidden_size
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in "12345678"]
        )


def test_experts_in_a_list_are_merged_too() -> None:
    model = pico.olmoe()
    solidify.replace(model, "**.mlp", Listed, declares={"router_logits": False})
    block = model.model.layers[1].mlp
    with torch.no_grad():
        order = torch.randperm(24)
        block.experts[5][0].weight.copy_(block.experts[0][0].weight[order])
        block.experts[5][0].bias.copy_(block.experts[0][0].bias[order])
        block.experts[5][2].weight.copy_(block.experts[0][2].weight[:, order])
        block.experts[5][2].bias.copy_(block.experts[0][2].bias)
        expected = [tensor.clone() for tensor in block.experts[0].state_dict().values()]
    edits = solidify.merge_experts(model, "**.mlp", [[0, 5], [1], [2], [3, 4, 6, 7]])
    assert len(block.experts) == 4 == block.num_experts
    assert all(torch.equal(a, b) for a, b in zip(block.experts[0].state_dict().values(), expected, strict=True))
    assert all(name.endswith(("router.weight", "weight", "bias")) for name in edits[1].document()["new"])


def test_experts_whose_neurons_are_not_found_are_refused() -> None:
    model = pico.olmoe()
    solidify.replace(model, "**.mlp", Single, declares={"router_logits": False})
    before = experts.logits(model, pico.tokens())
    with pytest.raises(SurgeryError, match=r"model\.layers\.0\.mlp: where the neurons of its experts stand \(experts"):
        solidify.merge_experts(model, "**.mlp", [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert torch.equal(experts.logits(model, pico.tokens()), before)


@pytest.mark.parametrize(
    ("clusters", "words"),
    [
        ([[0, 1], [2, 3]], r"has the experts 0 to 7, each to be in one cluster, but the clusters hold \[0, 1, 2, 3\]"),
        ([[0, 1, 2, 3, 4], [4, 5, 6, 7]], "each to be in one cluster"),
        ([list(range(8))], "gives each token 2 experts, but the order has 1"),
        ([0, 1], r"clusters are lists of experts' numbers, as in \[\[0, 3\], \[1, 2\]\]"),
        ({"model.layers.0.mlp": [list(range(8))]}, r"there are no clusters for model\.layers\.1\.mlp"),
    ],
)
def test_clusters_that_do_not_fit_are_refused(clusters: Any, words: str) -> None:
    model = pico.olmoe()
    before = experts.logits(model, pico.tokens())
    with pytest.raises(SurgeryError, match=words):
        solidify.merge_experts(model, "**.mlp", clusters)
    assert torch.equal(experts.logits(model, pico.tokens()), before)


@pytest.mark.slow
def test_merged_experts_live_in_an_artifact_and_become_a_stock_model(tmp_path: Path) -> None:
    surgery = solidify.Surgery(pico.olmoe())
    surgery.merge_experts("**.mlp", [[0, 1], [2, 3], [4, 5], [6, 7]])
    artifact = surgery.build(tmp_path / "artifact")
    assert all(finding.passed is not False for finding in artifact.findings)
    plain = solidify.export(artifact.directory, tmp_path / "plain")
    assert all(finding.passed for finding in plain.findings)
    ids = pico.tokens()
    assert torch.equal(experts.logits(solidify.load(artifact.directory), ids), experts.logits(surgery.model, ids))
