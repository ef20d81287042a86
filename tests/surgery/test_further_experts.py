"""Routers that know more than their experts: tables by token, further rows behind theirs, and numbers that stand in the
configuration. Reordered, pruned, copied and merged as all others are, or refused by the reason."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import experts
import families
import pytest
import torch
from transformers import PreTrainedModel

import solidify
from solidify.errors import SurgeryError

FAMILIES = ("deepseek_v4", "inkling_text", "longcat_flash", "zaya")
SELDOM = [pytest.param(family, marks=pytest.mark.slow) for family in ("inkling_text", "longcat_flash")]
SINGLE = {"inkling_text", "longcat_flash"}  # their routers compute in float32, whatever the model does
GEMMA = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}


def opinionated(family: str, count: int, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A model whose tables name experts at random, and whose corrections differ."""
    model = experts.tiny(family, count, dtype=dtype)
    experts.fill_tables(model, count)
    generator = torch.Generator().manual_seed(3)
    for key, buffer in model.named_buffers():
        if key.endswith(("correction_bias", "balancing_biases")):
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
        if key.endswith("balancing_biases"):
            buffer[-1] = -1.0  # which transformers 5.23 makes of it whenever it loads one
    return model


def blocks(model: PreTrainedModel) -> list[str]:
    """Its MoE blocks; of 32 experts there are as many as channels of Inkling's convolutions."""
    return [name for name in experts.blocks(model) if name.endswith("mlp") or model.config.model_type == "gemma4_text"]


def shuffled(count: int, seed: int = 0) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_another_order_computes_the_same(family: str) -> None:
    model, ids = opinionated(family, 8), experts.tokens()
    before = experts.logits(model, ids)
    solidify.rearrange_experts(model, blocks(model), shuffled(8))
    assert distance(experts.logits(model, ids), before) < (1e-6 if family in SINGLE else 1e-12)


def test_a_routers_bias_has_the_further_rows_too() -> None:
    config = families.tiny_config("longcat_flash")
    config.router_bias = True
    torch.manual_seed(0)
    model = families.head_of(config)(config).eval()
    families.give_opinions(model)
    ids, names = experts.tokens(), blocks(model)
    before = experts.logits(model, ids)
    further = config.zero_expert_num
    order = shuffled(config.n_routed_experts)
    solidify.rearrange_experts(model, names, order)
    assert distance(experts.logits(model, ids), before) < 1e-6
    edits = solidify.rearrange_experts(model, names, order[:3])
    counted = {"router.n_routed_experts", "experts.total_experts", "router.classifier.out_features"}
    assert edits[0].settings["totals"] == dict.fromkeys(counted, further)
    gate = model.get_submodule(names[0]).router.classifier
    assert gate.out_features == len(gate.weight) == len(gate.bias) == 3 + further


def give_away(model: PreTrainedModel, names: list[str], kept: list[int]) -> None:
    """Has tables name, for an expert that is not kept, the one whose router row is most alike and that a row lacks."""
    for name in names:
        gate: Any = getattr(model.get_submodule(name), "gate", None)
        if not hasattr(gate, "tid2eid"):
            continue
        for row in gate.tid2eid:
            for place, expert in enumerate(row.tolist()):
                if expert not in kept:
                    left = [each for each in kept if each not in row.tolist()]
                    alike = torch.cosine_similarity(gate.weight[expert][None].double(), gate.weight[left].double())
                    row[place] = left[int(alike.argmax())]


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_masked_bit_for_bit(family: str) -> None:
    """Kernels add up 16 numbers as they add up 32 of which some are zero; so those that go come last first."""
    model = opinionated(family, 32, torch.float32)
    names, ids = blocks(model), experts.tokens()
    kept = shuffled(32)[:16]
    gone = [expert for expert in range(32) if expert not in kept]
    pruned = copy.deepcopy(model)
    solidify.rearrange_experts(pruned, names, kept)
    solidify.rearrange_experts(model, names, [*kept, *gone])
    unmasked = experts.logits(model, ids)
    give_away(model, names, list(range(16)))
    masked = experts.masked_logits(model, names, range(16, 32), ids)
    assert torch.equal(experts.logits(pruned, ids), masked)
    assert float((masked - unmasked).abs().max()) > 1e-2 * float(masked.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_list_equals_the_masked_model(family: str) -> None:
    model = opinionated(family, 32, torch.float32 if family in SINGLE else torch.float64)
    names, ids = blocks(model), experts.tokens()
    kept = shuffled(32, 1)[:9]
    pruned = copy.deepcopy(model)
    solidify.rearrange_experts(pruned, names, kept)
    give_away(model, names, kept)
    masked = experts.masked_logits(model, names, [expert for expert in range(32) if expert not in kept], ids)
    assert distance(experts.logits(pruned, ids), masked) < (2e-6 if family in SINGLE else 1e-12)


def test_copies_stand_in_the_table_beside_what_they_copy() -> None:
    model, ids = opinionated("deepseek_v4", 8), experts.tokens()
    names, before = blocks(model), experts.logits(model, ids)
    table = model.get_submodule(names[0]).gate.tid2eid.clone()
    solidify.duplicate_experts(model, names, 2)
    assert distance(experts.logits(model, ids), before) < 1e-12
    expected = torch.stack([2 * table, 2 * table + 1], dim=-1).flatten(1)
    assert torch.equal(model.get_submodule(names[0]).gate.tid2eid, expected)


@pytest.mark.parametrize("family", ["inkling_text", "longcat_flash", "zaya"])
def test_copies_of_experts_alone_are_refused_where_the_router_weighs_more_beside_them(family: str) -> None:
    model, ids = opinionated(family, 8), experts.tokens()
    before = experts.logits(model, ids)
    with pytest.raises(SurgeryError, match=r"router weighs them against \d+ more \(.*\) without copies"):
        solidify.duplicate_experts(model, blocks(model), 2)
    assert torch.equal(experts.logits(model, ids), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_experts_have_the_rows_of_their_clusters_and_the_further_ones_stay(family: str) -> None:
    model = opinionated(family, 8)
    names = blocks(model)
    clusters = [[0, 5], [1], [2, 7, 3], [4, 6]]
    before = {key: value.clone() for key, value in model.get_submodule(names[0]).state_dict().items()}
    solidify.merge_experts(model, names, clusters)
    after = model.get_submodule(names[0]).state_dict()
    changed = [key for key in before if before[key].shape != after[key].shape and "experts" not in key]
    assert changed
    for key in changed:
        means = torch.stack([before[key][cluster].double().mean(0) for cluster in clusters])
        assert torch.allclose(after[key][:4].double(), means, rtol=1e-6, atol=1e-12)
        assert torch.equal(after[key][4:], before[key][8:])
    if "gate.tid2eid" in before:
        cluster_of = {expert: number for number, cluster in enumerate(clusters) for expert in cluster}
        expected = before["gate.tid2eid"].clone().apply_(cluster_of.__getitem__)
        assert torch.equal(after["gate.tid2eid"], expected)
    assert torch.isfinite(experts.logits(model, experts.tokens())).all()


@pytest.mark.parametrize("family", ["deepseek_v4", "zaya", *SELDOM])
def test_a_pruned_model_comes_back_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    model = opinionated(family, 8, torch.float32)
    edits = solidify.rearrange_experts(model, blocks(model), [6, 1, 3, 0, 5])
    ids, expected = experts.tokens(), experts.logits(model, experts.tokens())
    solidify.build(model, edits, tmp_path / "artifact")
    assert torch.equal(experts.logits(solidify.load(tmp_path / "artifact").eval(), ids), expected)
    report = solidify.check(tmp_path / "artifact")
    assert report.passed, str(report)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_own_class_holds_what_all_blocks_have(family: str) -> None:
    model = opinionated(family, 8, torch.float32)
    solidify.rearrange_experts(model, blocks(model), [6, 1, 3, 0, 5])
    if family == "deepseek_v4":
        solidify.duplicate_experts(model, blocks(model), 2)
    stock = type(model)(model.config).eval()
    stock.load_state_dict(model.state_dict())
    ids = experts.tokens()
    assert torch.equal(experts.logits(stock, ids), experts.logits(model, ids))


@pytest.mark.parametrize("family", ["deepseek_v4", *SELDOM])
def test_one_block_alone_comes_back_too(family: str, tmp_path: Path) -> None:
    model, ids = opinionated(family, 8, torch.float32), experts.tokens()
    edits = solidify.rearrange_experts(model, blocks(model)[0], [6, 1, 3, 0, 5])
    expected = experts.logits(model, ids)
    solidify.build(model, edits, tmp_path / "artifact")
    assert torch.equal(experts.logits(solidify.load(tmp_path / "artifact").eval(), ids), expected)


@pytest.mark.parametrize("family", ["deepseek_v4", *SELDOM])
def test_blocks_may_differ_in_how_many_experts_they_have(family: str, tmp_path: Path) -> None:
    """What transformers cannot record then, the logits of all routers together, says nothing of the rest."""
    model, ids = opinionated(family, 8, torch.float32), experts.tokens()
    counts = dict(zip(blocks(model), (8, 6, 5), strict=False))
    edits = solidify.rearrange_experts(model, list(counts), {name: list(range(n)) for name, n in counts.items()})
    assert {edit.name: edit.arguments["order"] for edit in edits} == {n: list(range(c)) for n, c in counts.items()}
    expected = experts.logits(model, ids)
    solidify.build(model, edits, tmp_path / "artifact")
    assert torch.equal(experts.logits(solidify.load(tmp_path / "artifact").eval(), ids), expected)


def test_a_number_a_token_that_a_familys_code_does_not_take_is_told() -> None:
    """LongCat-Flash squeezes the axis of a token's experts, where there is one."""
    model = opinionated("longcat_flash", 8, torch.float32)
    before = experts.logits(model, experts.tokens())
    with pytest.raises(SurgeryError, match=r"with 1 of these experts a token .* give another experts_per_token"):
        solidify.rearrange_experts(model, blocks(model), experts_per_token=1)
    assert torch.equal(experts.logits(model, experts.tokens()), before)


def test_a_table_says_nothing_of_another_number_a_token() -> None:
    model = opinionated("deepseek_v4", 8)
    names = blocks(model)
    tabled = [name for name in names if hasattr(model.get_submodule(name).gate, "tid2eid")]
    with pytest.raises(SurgeryError, match=r"looks up in a table which 2 experts .* none can get 3: name only blocks"):
        solidify.rearrange_experts(model, names, experts_per_token=3)
    solidify.rearrange_experts(model, [name for name in names if name not in tabled], experts_per_token=3)
    assert torch.isfinite(experts.logits(model, experts.tokens())).all()


def gemma() -> tuple[PreTrainedModel, list[str]]:
    config = families.tiny_config("gemma4_text")
    for key, value in GEMMA.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model: Any = families.head_of(config)(config).eval()
    families.give_opinions(model)
    return model, blocks(model)


def test_a_number_that_is_read_from_the_configuration_changes_for_all_blocks(tmp_path: Path) -> None:
    model, names = gemma()
    twin, _ = gemma()
    edits = solidify.rearrange_experts(model, names, experts_per_token=3)
    twin.config.top_k_experts = 3
    ids = experts.tokens()
    assert model.config.top_k_experts == 3
    assert torch.equal(experts.logits(model, ids), experts.logits(twin, ids))
    solidify.build(model, edits, tmp_path / "artifact")
    assert torch.equal(experts.logits(solidify.load(tmp_path / "artifact").eval(), ids), experts.logits(twin, ids))


def test_copies_where_the_number_is_read_from_the_configuration() -> None:
    model, names = gemma()
    ids = experts.tokens()
    before = experts.logits(model, ids)
    solidify.duplicate_experts(model, names, 2)
    assert (model.config.top_k_experts, model.config.num_experts) == (4, 16)
    assert distance(experts.logits(model, ids), before) < 1e-5


@pytest.mark.parametrize(
    ("family", "path"), [("gemma4_text", "router.config.top_k_experts"), ("zaya", "gate.config.num_experts")]
)
def test_one_block_alone_cannot_change_what_all_read_from_the_configuration(family: str, path: str) -> None:
    model, names = gemma() if family == "gemma4_text" else (opinionated("zaya", 8), [])
    names = names or blocks(model)
    asked: dict[str, Any] = {"experts_per_token": 3} if family == "gemma4_text" else {"order": [0, 1, 2]}
    before = experts.logits(model, experts.tokens())
    with pytest.raises(SurgeryError, match=rf"reads {path} from the configuration, which is that of all blocks"):
        solidify.rearrange_experts(model, names[:1], **asked)
    assert torch.equal(experts.logits(model, experts.tokens()), before)


def test_experts_in_a_grid_of_keys_are_refused_by_the_reason() -> None:
    config = families.tiny_config("doge")
    for key, value in {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2}.items():
        setattr(config, key, value)
    model = families.head_of(config)(config).eval()
    with pytest.raises(SurgeryError, match=r"its 16 experts in a grid of 4 by 4: its router scores rows and"):
        solidify.rearrange_experts(model, "model.layers.0.mlp", [0, 1, 2])


def test_a_dictionary_of_experts_is_the_reason_that_copies_are_refused_for() -> None:
    model = families.tiny("switch_transformers", "AutoModelForSeq2SeqLM")
    with pytest.raises(SurgeryError, match=r"keeps its experts in a dictionary of modules"):
        solidify.duplicate_experts(model, "encoder.block.1.layer.1.mlp", 2)
    with pytest.raises(SurgeryError, match=r"keeps its experts in a dictionary of modules"):
        solidify.rearrange_experts(model, "encoder.block.1.layer.1.mlp", experts_per_token=2)
