"""Equal copies are the original, the routed sum is its formula, and the losses on routers read the router."""

from __future__ import annotations

from pathlib import Path

import families
import pico
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import solidify
from solidify import losses
from solidify.errors import SurgeryError
from solidify.modules.upcycled_experts import UpcycledExperts
from solidify.objective.capture import capture

FAMILIES = ["llama", "qwen3", "gemma3", "gpt2"]
EXACT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def block(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    made = zoo.model(name, dtype=dtype)
    return made.get_submodule(zoo.FAMILIES[name].feed_forward.replace("*", "1"))


@torch.no_grad()
def upcycled(original: nn.Module, **arguments: object) -> UpcycledExperts:
    made = UpcycledExperts(original, layer_idx=1, **arguments).eval()
    made.adopt(original)
    return made


def states(dtype: torch.dtype = torch.float32, rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).double().norm() / expected.double().norm()).detach())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", list(EXACT))
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equal_copies_are_the_original_up_to_rounding(name: str, dtype: torch.dtype, top_k: int) -> None:
    original = block(name, dtype)
    moe = upcycled(original, num_experts=4, top_k=top_k)
    assert error(moe(states(dtype)), original(states(dtype))) < EXACT[dtype]


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "phi", "nemotron", "gpt_bigcode", "starcoder2"])
def test_other_names_and_forms_of_a_feed_forward_are_taken(model_type: str) -> None:
    made = families.tiny(model_type)
    original = made.get_submodule(families.targets(made)["feed_forward"])
    assert error(upcycled(original)(states()), original(states())) < EXACT[torch.float32]


@pytest.mark.parametrize("name", FAMILIES)
def test_unequal_experts_add_up_as_the_formula_says(name: str) -> None:
    """Every expert is put into the original's own module, in float64, and weighed by hand."""
    original = block(name, torch.float64)
    moe = upcycled(original, num_experts=5, top_k=2, noise=0.5)
    x = states(torch.float64)
    p = F.softmax(x @ moe.gate.weight.T, dim=-1)
    chosen = p.topk(2, dim=-1)
    expected = torch.zeros_like(x)
    for expert in range(5):
        with torch.no_grad():
            for key in moe.experts.names:
                target = original.get_submodule(key)
                value = moe.experts.get_parameter(key)[expert]
                target.weight.copy_(value if isinstance(target, nn.Linear) else value.T)
        share = torch.where(chosen.indices == expert, chosen.values, 0.0).sum(-1) / chosen.values.sum(-1)
        expected += share[..., None] * original(x)
    assert error(moe(x), expected) < EXACT[torch.float64]


def test_without_data_dependent_shapes_it_computes_the_same() -> None:
    moe = upcycled(block("llama"), noise=0.5)
    tokens = states().reshape(-1, 64)
    _, weights, index = moe.gate(tokens)
    stacks = {key: (moe.experts.get_parameter(key), None) for key in moe.experts.names}
    assert error(moe.experts._run_all(stacks, tokens, index, weights), moe.experts(tokens, index, weights)) < 1e-6


def test_no_token_is_no_fault() -> None:
    assert upcycled(block("llama"))(states(rows=1, length=0)).shape == (1, 0, 64)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_drop_makes_a_share_of_every_expert_anew_and_keeps_its_statistics(model_type: str) -> None:
    made = families.tiny(model_type)
    original = made.get_submodule(families.targets(made)["feed_forward"])
    plain, moe = upcycled(original), upcycled(original, drop=0.5)
    *first, last = moe.experts.names
    gone = []
    for expert in range(4):
        columns = (plain.experts.get_parameter(last) != moe.experts.get_parameter(last))[expert].any(0)
        gone.append(columns)
        assert int(columns.sum()) == round(0.5 * len(columns))
        for key in first:
            rows = (plain.experts.get_parameter(key) != moe.experts.get_parameter(key))[expert].any(1)
            assert torch.equal(rows, columns.repeat(len(rows) // len(columns)))
    assert not torch.equal(gone[0], gone[1])
    for key in moe.experts.names:
        before, after = plain.experts.get_parameter(key).detach(), moe.experts.get_parameter(key).detach()
        assert abs(float(after.std() / before.std()) - 1) < 0.1
    assert torch.equal(plain.gate.weight, moe.gate.weight)


def test_layers_draw_other_routers_and_a_seed_draws_the_same_again() -> None:
    def routers(seed: int) -> list[torch.Tensor]:
        made = zoo.model("llama")
        solidify.replace(made, "model.layers.*.mlp", UpcycledExperts, arguments={"seed": seed})
        return [layer.mlp.gate.weight for layer in made.model.layers]

    first, again, other = routers(0), routers(0), routers(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gradient_reaches_the_router_and_every_expert(name: str) -> None:
    moe = upcycled(block(name), noise=0.3)
    moe(states()).square().sum().backward()
    assert bool(moe.gate.weight.grad.any())
    for key, parameter in moe.experts.named_parameters():
        assert parameter.grad.flatten(1).any(1).all(), key


def test_losses_on_routers_read_it_by_name() -> None:
    made = zoo.model("llama")
    solidify.replace(made, "model.layers.*.mlp", UpcycledExperts, arguments={"num_experts": 8})
    mask = torch.ones(24)
    for term in (losses.load_balance, losses.router_z, losses.router_entropy):
        loss = term(routers="model.layers.*.mlp.gate")
        with capture(made, {"router": loss.captures["router"]}) as seen:
            made(input_ids=pico.tokens(2, 12))
        told = {"trash": {}} if term is losses.load_balance else {}
        sums = loss.statistics(router=seen["router"], mask=mask, model=made, **told)
        value = loss.value(sums / (48 if term is losses.load_balance else 24))
        made.zero_grad()
        value.backward()
        assert torch.isfinite(value)
        assert made.model.layers[1].mlp.gate.weight.grad.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_keeps_the_behaviour_contract_away_from_its_start(name: str) -> None:
    made = zoo.model(name)
    more = {"num_experts": 4, "noise": 0.3, "drop": 0.25, "router_std": 0.5}
    edits = solidify.replace(made, zoo.FAMILIES[name].feed_forward, UpcycledExperts, arguments=more)
    assert [edit.probed for edit in edits] == [True, True]
    assert not any(edit.identical for edit in edits)
    zoo.assert_cache_changes_nothing(made)


@pytest.mark.slow
def test_its_whole_life(tmp_path: Path) -> None:
    made = zoo.model("qwen3")
    edits = solidify.replace(made, "model.layers.*.mlp", UpcycledExperts, arguments={"noise": 0.3, "router_std": 0.5})
    zoo.whole_life(
        made,
        edits,
        tmp_path,
        lora=["model.layers.*.self_attn.q_proj"],
        train=["model.layers.*.mlp.gate", "model.layers.*.mlp.experts"],
    )


class Scaled(nn.Module):
    """Has the parts of a gated feed-forward, and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 64)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="computes something else"):
        upcycled(Scaled())
    sparse = families.tiny("gemma3n_text").get_submodule("model.layers.0.mlp")  # keeps 5 % of its activations
    with pytest.raises(ValueError, match="computes something else"):
        upcycled(sparse)
    with pytest.raises(SurgeryError, match="takes the place of a dense feed-forward"):
        solidify.replace(zoo.model("olmoe"), "model.layers.*.mlp", UpcycledExperts)
    with pytest.raises(ValueError, match="top_k must be from 1 to num_experts"):
        upcycled(block("llama"), num_experts=2, top_k=3)
    with pytest.raises(ValueError, match="drop from 0 to 1"):
        upcycled(block("llama"), drop=1.5)
