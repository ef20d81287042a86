"""How much each expert matters on data: the scores against their definition, in families of every form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, get_args

import experts
import pico
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import solidify
from solidify.errors import HealingError, SurgeryError
from solidify.surgery import expert_calls
from solidify.surgery.expert_scores import METHODS, ExpertScores
from solidify.surgery.experts import RearrangeExperts

Router = Callable[[nn.Module, torch.Tensor], dict[int, float]]


def softmax_router(block: Any, token: torch.Tensor) -> dict[int, float]:
    """OLMoE and Qwen2-MoE: softmax over all experts, the largest; divided by their sum where the family does it."""
    weights = torch.softmax(block.gate.weight @ token, dim=-1)
    chosen = {e: float(weights[e]) for e in weights.topk(block.gate.top_k).indices.tolist()}
    total = sum(chosen.values()) if block.gate.norm_topk_prob else 1.0
    return {e: weight / total for e, weight in chosen.items()}


def grouped_router(block: Any, token: torch.Tensor) -> dict[int, float]:
    """DeepSeek-V3 (arXiv 2412.19437, equations 13 to 16): sigmoid, the best groups by their two best, the largest."""
    scores = torch.sigmoid(block.gate.weight @ token)
    corrected = scores + block.gate.e_score_correction_bias
    groups = corrected.view(block.gate.num_group, -1)
    best = groups.topk(2, -1).values.sum(-1).topk(block.gate.topk_group).indices.tolist()
    size = groups.shape[1]
    allowed = [e for e in range(len(scores)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -float(corrected[e]))[: block.gate.top_k]
    total = sum(float(scores[e]) for e in chosen)
    return {e: float(scores[e]) / total * block.gate.routed_scaling_factor for e in chosen}


def reap_by_hand(block: Any, states: torch.Tensor, route: Router) -> tuple[list[float], list[int]]:
    """REAP (arXiv 2510.13999, equation 9), token by token: mean of gate times norm over the tokens of an expert."""
    size = block.experts.gate_up_proj.shape[0]
    sums, counts = [0.0] * size, [0] * size
    for token in states.reshape(-1, states.shape[-1]):
        for expert, weight in route(block, token).items():
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            output = block.experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
            sums[expert] += weight * float(output.norm())
            counts[expert] += 1
    return [each / max(count, 1) for each, count in zip(sums, counts, strict=True)], counts


def inputs_of(model: PreTrainedModel, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("family", "route"),
    [("olmoe", softmax_router), ("qwen2_moe", softmax_router), ("deepseek_v3", grouped_router)],
)
def test_reap_equals_an_independent_float64_computation(family: str, route: Router) -> None:
    """Shared experts, correction and groups included; padding is no token. Routers compute in float32 even here."""
    model = experts.tiny(family, 8, dtype=torch.float64)
    names = experts.blocks(model)
    ids, mask = experts.tokens(), torch.ones(3, 13, dtype=torch.long)
    mask[1, 8:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": experts.tokens(2, 5, seed=1)}]
    scores = solidify.score_experts(model, names, batches)
    shares = solidify.score_experts(model, names, batches, by="frequency")
    assert scores.tokens == 44 and scores.by == "reap" and names
    for name in names:
        first = inputs_of(model, name, batches[0])[mask.bool()]
        states = torch.cat([first, inputs_of(model, name, batches[1]).flatten(0, 1)])
        with torch.no_grad():
            expected, counts = reap_by_hand(model.get_submodule(name), states, route)
        assert scores.counts[name] == counts
        assert scores.scores[name] == pytest.approx(expected, rel=1e-6)
        assert shares.scores[name] == pytest.approx([count / 44 for count in counts], rel=1e-15)


OFTEN = ("qwen2_moe", "gpt_oss", "jamba")
SELDOM = (
    "olmoe",
    "mixtral",
    "granitemoe",
    "deepseek_v3",
    "ernie4_5_moe",
    "phimoe",
    "lfm2_moe",
    "nemotron_h",
    "aria_text",
)


@pytest.mark.parametrize("family", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)])
def test_both_ways_to_score_an_expert_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are called apart, and blocks that run with one expert at a time, know nothing of each other."""
    model = experts.tiny(family)
    name = experts.blocks(model)[0]
    batches = [{"input_ids": experts.tokens()}]
    found = solidify.score_experts(model, name, batches)
    monkeypatch.setattr(expert_calls, "_adds_up", lambda *_: False)
    other = solidify.score_experts(model, name, batches)
    assert found.counts == other.counts
    assert found.scores[name] == pytest.approx(other.scores[name], rel=1e-5)


@pytest.mark.parametrize("family", ["llama4_text", "jetmoe"])
def test_experts_that_are_not_called_apart_are_scored_too(family: str) -> None:
    """Llama 4 weighs what goes into its experts; JetMoE sorts the tokens first."""
    model = experts.tiny(family)
    name = "model.layers.0.feed_forward" if family == "llama4_text" else "model.layers.0.mlp"
    scores = solidify.score_experts(model, name, [{"input_ids": experts.tokens()}])
    config = model.config
    assert sum(scores.counts[name]) == 39 * config.num_experts_per_tok
    assert all(
        (score > 0) == (count > 0) for score, count in zip(scores.scores[name], scores.counts[name], strict=True)
    )


def test_layer_by_layer_the_scores_are_the_same() -> None:
    model = pico.olmoe(layers=3)
    batches = [{"input_ids": pico.tokens(rows=3)}, {"input_ids": pico.tokens(rows=1)}]
    whole = solidify.score_experts(model, ["model.layers.0.mlp", "model.layers.2.mlp"], batches, stream=False)
    streamed = solidify.score_experts(model, ["model.layers.0.mlp", "model.layers.2.mlp"], batches, stream=True)
    assert whole == streamed and list(whole.scores) == ["model.layers.0.mlp", "model.layers.2.mlp"]


def test_scoring_leaves_the_model_as_it_was() -> None:
    model = pico.olmoe()
    before, ids = {key: tensor.clone() for key, tensor in model.state_dict().items()}, pico.tokens()
    logits = experts.logits(model, ids)
    solidify.score_experts(model.train(), "**.mlp", [{"input_ids": ids}])
    assert model.training and torch.equal(experts.logits(model.eval(), ids), logits)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.model.layers.modules())


def test_the_best_are_kept_and_the_table_is_plain_values() -> None:
    scores = ExpertScores(
        "reap", {"a": [0.1, 0.5, 0.5, 0.2], "b": [4.0, 3.0, 2.0, 1.0]}, {"a": [1] * 4, "b": [2] * 4}, 7
    )
    choice = scores.keep(2)
    assert dict(choice) == {"a": [1, 2], "b": [0, 1]} and dict(scores.keep(1)) == {"a": [1], "b": [0]}
    again = ExpertScores.of(json.loads(json.dumps(scores.document())))
    assert again == scores and again.digest() == scores.digest() == choice.evidence["scores"]
    assert "a: 1 (0.5), 2 (0.5), 3 (0.2), 0 (0.1)" in str(scores)
    for count in (0, 5, True, 2.0):
        with pytest.raises(SurgeryError, match="cannot be chosen as asked"):
            scores.keep(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("counts", [{}, {"a": []}, {"a": [7, 0]}])
def test_a_table_is_shown_with_its_counts_and_without(counts: dict[str, list[int]]) -> None:
    shown = ExpertScores("reap", {"a": [0.5, 0.25]}, counts, 9)._repr_html_()
    assert "0.5" in shown and "0.25" in shown and (">7<" in shown) is bool(counts.get("a"))


def test_a_recipe_knows_every_score_that_there_is() -> None:
    assert get_args(RearrangeExperts.model_fields["by"].annotation) == tuple(METHODS)


@pytest.mark.parametrize("masked", [True, False])
def test_which_rows_are_tokens_is_found_where_the_block_runs(masked: bool) -> None:
    scorer = expert_calls.BlockScorer(pico.olmoe(), "model.layers.0.mlp")
    scorer.mask = torch.ones(2, 3) if masked else None
    assert scorer._find_tokens(6, torch.device("meta")).is_meta


def test_blocks_are_pruned_by_their_own_scores(tmp_path: Any) -> None:
    model = pico.olmoe()
    model.save_pretrained(tmp_path)
    scores = solidify.score_experts(tmp_path, "**.mlp", [{"input_ids": pico.tokens(rows=3)}])
    edits = solidify.rearrange_experts(model, "**.mlp", scores.keep(3))
    assert [edit.settings["order"] for edit in edits] == [scores.keep(3)[edit.name] for edit in edits]
    assert edits[0].arguments["by"] == "reap" and edits[0].arguments["scores"] == scores.digest()
    assert edits[0].settings["order"] != edits[1].settings["order"] and model.config.num_experts == 3


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"by": "magnitude"}, HealingError, "by is one of reap, frequency, but 'magnitude' was given"),
        ({"batches": []}, HealingError, "there are no batches"),
        ({"where": "**.self_attn"}, SurgeryError, "has no experts"),
        ({"where": "**.nothing"}, SurgeryError, "names no module"),
    ],
)
def test_what_cannot_be_scored_is_said(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    asked = {"where": "**.mlp", "batches": [{"input_ids": pico.tokens()}], **arguments}
    with pytest.raises(error, match=words):
        solidify.score_experts(pico.olmoe(), asked.pop("where"), asked.pop("batches"), **asked)


def test_a_token_that_skips_counts_for_no_expert() -> None:
    """ZAYA's router gives such a token the number 0, with the weight 0."""
    model, ids = experts.tiny("zaya", 8), experts.tokens()
    names = experts.blocks(model)
    for name in names:
        model.get_submodule(name).gate.balancing_biases[-1] = 0.1
    got: dict[str, torch.Tensor] = {}

    def count(name: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            _, weights, index, _ = output
            got[name] = torch.bincount(index[weights != 0], minlength=8)

        return hook

    hooks = [model.get_submodule(f"{name}.gate").register_forward_hook(count(name)) for name in names]
    experts.logits(model, ids)
    for hook in hooks:
        hook.remove()
    assert any(int(each.sum()) < ids.numel() for each in got.values())
    scores = solidify.score_experts(model, names, [{"input_ids": ids}], by="frequency")
    assert {name: list(counts) for name, counts in scores.counts.items()} == {n: c.tolist() for n, c in got.items()}
