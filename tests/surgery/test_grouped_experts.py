"""Experts in groups: what keeps a router exact that chooses groups first, in every family that has one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from solidify.errors import SurgeryError
from solidify.surgery import expert_parts
from solidify.surgery.expert_scores import ExpertScores

OFTEN = ("deepseek_v3", "bailing_hybrid")
SELDOM = ("axk1", "axk2", "beam", "deepseek_v32", "deepseek_v2", "dots1", "kimi_linear", "glm4_moe", "hy_v4")
FAMILIES = [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)]
GROUPS, SIZE = 4, 8


def grouped(family: str, *, chosen: int = 2) -> PreTrainedModel:
    """Four groups of eight experts; a token gets the two best of the `chosen` best groups."""
    changes = {"n_group": GROUPS, "num_expert_group": GROUPS, "topk_group": chosen}
    if family == "deepseek_v2":
        changes["topk_method"] = "group_limited_greedy"
    model = experts.tiny(family, GROUPS * SIZE, changes=changes)
    for name, buffer in model.named_buffers():
        if "correction" in name:  # two families choose others where scores are negative
            buffer.copy_(torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)) / 2)
    assert all(expert_parts.count_groups(model, name) == GROUPS for name in experts.blocks(model))
    return model


def tokens() -> torch.Tensor:
    """As many as kernels take at once, so that none is added up in another order beside other experts."""
    return experts.tokens(3, 16)


def numbers(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    return {key: getattr(config, key) for key in ("n_routed_experts", "n_group", "topk_group") if hasattr(config, key)}


def some_of_each(count: int, *, groups: Sequence[int] = range(GROUPS)) -> list[int]:
    """Returns so many experts of each group, drawn."""
    draw = torch.Generator().manual_seed(count)
    return [
        group * SIZE + expert for group in groups for expert in torch.randperm(SIZE, generator=draw)[:count].tolist()
    ]


def completed(kept: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Returns an order with all experts, those that are kept first in their group; and the places of the others."""
    order, gone = [], []
    for group in range(GROUPS):
        home = range(group * SIZE, (group + 1) * SIZE)
        order += [*(e for e in kept if e in home), *(e for e in home if e not in kept)]
        gone += [group * SIZE + place for place in range(count, SIZE)]
    return order, gone


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_in_each_group_equals_masked_bit_for_bit(family: str) -> None:
    model = grouped(family)
    names, ids = experts.blocks(model), tokens()
    kept = some_of_each(4)
    order, gone = completed(kept, 4)
    pruned = copy.deepcopy(model)
    solidify.rearrange_experts(pruned, names, kept)
    assert all(expert_parts.count_groups(pruned, name) == GROUPS for name in names)
    solidify.rearrange_experts(model, names, order)
    unmasked = experts.logits(model, ids)
    masked = experts.masked_logits(model, names, gone, ids)
    assert torch.equal(experts.logits(pruned, ids), masked)
    assert float((masked - unmasked).abs().max()) > 1e-2 * float(masked.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chosen", [1, 3])
def test_without_whole_groups_it_equals_masked_bit_for_bit(family: str, chosen: int, tmp_path: Path) -> None:
    """Two groups stay; a router that chose three chooses both. The family's own class holds the result."""
    model = grouped(family, chosen=chosen)
    names, ids = experts.blocks(model), tokens()
    pruned = copy.deepcopy(model)
    solidify.rearrange_experts(pruned, names, some_of_each(SIZE, groups=(2, 0)))
    gone = range(2 * SIZE, 4 * SIZE)
    solidify.rearrange_experts(model, names, some_of_each(SIZE, groups=(2, 0, 1, 3)))
    found = experts.logits(pruned, ids)
    assert torch.equal(found, experts.masked_logits(model, names, gone, ids))
    assert numbers(pruned)["n_group"] == 2 and numbers(pruned)["topk_group"] == min(chosen, 2)
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    state = pruned.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    assert float((experts.logits(again, ids) - found).abs().max()) < 2e-6 * float(found.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_reordered_within_and_between_groups_computes_the_same(family: str) -> None:
    model = grouped(family)
    before = experts.logits(model, tokens())
    solidify.rearrange_experts(model, experts.blocks(model), some_of_each(SIZE, groups=(3, 0, 2, 1)))
    assert float((experts.logits(model, tokens()) - before).abs().max()) < 2e-5 * float(before.abs().max())


@pytest.mark.parametrize(
    ("order", "sentence"),
    [
        (range(9), r"has 4 groups of 8 experts and chooses 2 of them, .* keep N in each group of 8"),
        ([0, 8, 1, 9], "an order lists group after group, with as many of each"),
        ([0, 8, 16, 24], "by the two best of each, but the order has 1 of a group"),
        ([0, 1, 8, 9, 0, 1], "an order lists group after group"),
    ],
)
def test_an_order_that_breaks_groups_is_refused(order: Sequence[int], sentence: str) -> None:
    model = grouped("deepseek_v3")
    before = experts.logits(model, tokens())
    with pytest.raises(SurgeryError, match=sentence):
        solidify.rearrange_experts(model, experts.blocks(model), list(order))
    assert torch.equal(experts.logits(model, tokens()), before)


def test_groups_that_hold_fewer_than_a_token_gets_are_refused() -> None:
    model = grouped("deepseek_v3", chosen=1)
    with pytest.raises(SurgeryError, match=r"gives a token 6 experts of those, .* leaves only 4: keep 6 or more in"):
        solidify.rearrange_experts(model, experts.blocks(model), some_of_each(4), experts_per_token=6)


def test_the_best_of_each_group_are_kept() -> None:
    scores = ExpertScores("reap", {"mlp": [9.0, 8.0, 7.0, 0.1, 0.2, 0.3]}, groups={"mlp": 2})
    assert dict(scores.keep(4)) == {"mlp": [0, 1, 4, 5]}
    assert ExpertScores.of(scores.document()) == ExpertScores("reap", scores.scores, {"mlp": []}, 0, {"mlp": 2})
    with pytest.raises(SurgeryError, match="2 groups of 3 experts, all to keep as many, so 3 cannot be kept: keep N"):
        scores.keep(3)


def test_scores_know_the_groups_of_a_model() -> None:
    model = grouped("deepseek_v3")
    names = experts.blocks(model)
    scores = solidify.score_experts(model, names, [{"input_ids": tokens()}])
    assert scores.groups == dict.fromkeys(names, GROUPS)
    solidify.rearrange_experts(model, names, scores.keep(16))
    assert model.config.n_routed_experts == 16 and model.config.n_group == GROUPS


def test_copies_that_would_move_the_choice_of_groups_are_refused() -> None:
    model = grouped("deepseek_v3")
    with pytest.raises(SurgeryError, match="chooses 2 of them by the best experts in each; copies count there too"):
        solidify.duplicate_experts(model, experts.blocks(model), 2)


def test_copies_are_exact_where_all_groups_are_chosen() -> None:
    model = grouped("deepseek_v3", chosen=GROUPS)
    before = experts.logits(model, tokens())
    solidify.duplicate_experts(model, experts.blocks(model), 2)
    assert float((experts.logits(model, tokens()) - before).abs().max()) < 2e-5 * float(before.abs().max())
    assert model.config.n_routed_experts == 2 * GROUPS * SIZE and model.config.n_group == GROUPS


def test_groups_are_merged_within() -> None:
    model = grouped("deepseek_v3")
    names = experts.blocks(model)
    clusters = solidify.cluster_experts(model, names, 16)
    assert all(len({e // SIZE for e in cluster}) == 1 for cluster in clusters[names[0]])
    with pytest.raises(SurgeryError, match=r"so a cluster has experts of one group, but \[0, 8\] has of several"):
        solidify.merge_experts(model, names, [[0, 8], *([e] for e in range(32) if e not in (0, 8))])
    solidify.merge_experts(model, names, clusters)
    assert model.config.n_routed_experts == 16 and torch.isfinite(experts.logits(model, tokens())).all()


def test_blocks_with_other_numbers_of_groups_say_so_themselves(tmp_path: Path) -> None:
    """One block loses groups: the configuration stays, the artifact holds both kinds; once both have, it follows."""
    model = grouped("bailing_hybrid")
    first, second = experts.blocks(model)
    order = some_of_each(SIZE, groups=(2, 0))
    edits = solidify.rearrange_experts(model, first, order)
    assert numbers(model)["n_group"] == GROUPS and edits[0].settings["groups"]
    solidify.build(model, edits, tmp_path / "mixed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed", trust_remote_code=True).eval()
    assert torch.equal(experts.logits(again, tokens()), experts.logits(model, tokens()))
    solidify.rearrange_experts(model, second, order)
    assert numbers(model)["n_group"] == 2
