"""The memory starts as nothing beside the feed-forward, finds what a search over all keys finds, and is its formula."""

from __future__ import annotations

import copy
from pathlib import Path

import families
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import solidify
from solidify.modules.memory_layer import MemoryLayer

FAMILIES = ["llama", "qwen3", "gemma3", "gpt2", "olmoe"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SMALL = {"num_keys": 16, "top_k": 4, "heads": 2, "key_size": 8}


def layer(
    name: str = "llama", dtype: torch.dtype = torch.float32, **arguments: object
) -> tuple[MemoryLayer, nn.Module]:
    """Returns a memory layer at its start, and the feed-forward that it stands for."""
    made = zoo.model(name, dtype=dtype)
    original = made.get_submodule(zoo.FAMILIES[name].feed_forward.replace("*", "1"))
    memory = MemoryLayer(copy.deepcopy(original), made.config, 1, **{**SMALL, **arguments}).to(dtype).eval()
    memory.adopt(original)
    return memory, original


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_starts_as_the_feed_forward_bit_for_bit_with_gradients(name: str, dtype: torch.dtype) -> None:
    memory, original = layer(name, dtype)
    x, y = states(dtype).requires_grad_(), states(dtype).requires_grad_()
    expected, found = original(x), memory(y)
    assert torch.equal(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected.backward(direction)
    found.backward(direction)
    assert torch.equal(x.grad, y.grad)
    for key, parameter in original.named_parameters():
        assert torch.equal(parameter.grad, memory.feed_forward.get_parameter(key).grad), key
    assert memory.memory.output.weight.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_reaches_all_of_the_memory_once_it_says_something(dtype: torch.dtype) -> None:
    memory, _ = layer(dtype=dtype)
    zoo.stir(memory, ["output.weight"])
    memory(states(dtype)).square().mean().backward()
    for name, parameter in memory.memory.named_parameters():
        assert bool(parameter.grad.any()), name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("top_k", [1, 4, 16])
def test_it_finds_what_a_search_over_all_keys_finds(top_k: int, heads: int) -> None:
    memory, _ = layer(dtype=torch.float64, top_k=top_k, heads=heads)
    tokens = states(torch.float64).reshape(-1, 64)
    scores, index = memory.memory.search(tokens)
    query = F.rms_norm(F.linear(tokens, memory.memory.query.weight).view(60, heads, 8), (8,), eps=1e-6)
    keys = memory.memory.keys.view(2, heads, 16, 4)
    for head in range(heads):
        pairs = torch.cat(  # every key written out, (256, 8)
            [keys[0, head].repeat_interleave(16, dim=0), keys[1, head].repeat(16, 1)], dim=-1
        )
        best = (query[:, head] @ pairs.T).topk(top_k, dim=-1)
        assert torch.allclose(scores[:, head], best.values, atol=1e-12)
        assert torch.equal(index[:, head], best.indices)


def test_it_is_its_formula() -> None:
    memory, original = layer(dtype=torch.float64, value_size=24)
    zoo.stir(memory, ["output.weight"])
    inner, x = memory.memory, states(torch.float64)
    scores, index = inner.search(x.reshape(-1, 64))
    read = (F.softmax(scores, dim=-1)[..., None] * inner.values.weight[index]).sum(dim=(1, 2)).view(3, 20, 24)
    gate = x @ inner.gate.weight.T
    expected = original(x) + (read * gate * torch.sigmoid(gate)) @ inner.output.weight.T
    assert torch.allclose(memory(x), expected, rtol=1e-12, atol=1e-12)


def test_ablated_or_bypassed_it_is_the_feed_forward() -> None:
    memory, original = layer()
    zoo.stir(memory, ["output.weight"])
    assert not torch.allclose(memory(states()), original(states()), atol=1e-2)
    for switch in ("ablate", "bypass"):
        setattr(memory, switch, True)
        assert torch.equal(memory(states()), original(states()))
        setattr(memory, switch, False)


def test_values_that_no_token_reads_change_nothing() -> None:
    memory, _ = layer()
    zoo.stir(memory, ["output.weight"])
    before = memory(states())
    _, index = memory.memory.search(states().reshape(-1, 64))
    unread = torch.ones(256, dtype=torch.bool)
    unread[index.flatten()] = False
    assert bool(unread.any())
    with torch.no_grad():
        memory.memory.values.weight[unread] = 100.0
    assert torch.equal(memory(states()), before)


def test_layers_draw_other_memories_and_a_seed_draws_the_same_again() -> None:
    def keys(seed: int) -> list[torch.Tensor]:
        made = zoo.model("llama")
        edits = solidify.replace(made, "model.layers.*.mlp", MemoryLayer, arguments={**SMALL, "seed": seed})
        assert all(edit.identical and edit.bypass for edit in edits)
        return [each.mlp.memory.keys for each in made.model.layers]

    first, again, other = keys(0), keys(0), keys(1)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_it_keeps_the_behaviour_contract_away_from_its_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = MemoryLayer.adopt

    def awake(self: MemoryLayer, original: nn.Module) -> None:
        draw(self, original)
        zoo.stir(self, ["memory.output.weight"])

    monkeypatch.setattr(MemoryLayer, "adopt", awake)
    made = zoo.model(name)
    edits = solidify.replace(made, zoo.FAMILIES[name].feed_forward, MemoryLayer, arguments=SMALL)
    assert all(edit.probed and not edit.identical for edit in edits)
    zoo.assert_cache_changes_nothing(made)


@pytest.mark.parametrize("model_type", ["bloom", "llama4_text", "gpt_oss", "deepseek_v3"])
def test_it_stands_beside_feed_forwards_that_are_called_otherwise(model_type: str) -> None:
    """Of a residual, of tokens without their batch, of a tuple, of experts."""
    made = families.tiny(model_type)
    edits = solidify.replace(made, families.targets(made)["feed_forward"], MemoryLayer, arguments=SMALL)
    assert all(edit.identical and edit.bypass for edit in edits)


@pytest.mark.slow
def test_its_whole_life(tmp_path: Path) -> None:
    made = zoo.model("llama")
    edits = solidify.replace(made, "model.layers.*.mlp", MemoryLayer, arguments=SMALL)
    zoo.stir(made, ["memory.output.weight"])
    zoo.whole_life(
        made,
        edits,
        tmp_path,
        lora=["model.layers.*.mlp.feed_forward.down_proj"],
        train=["model.layers.*.mlp.memory"],
    )


def test_what_it_cannot_make_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k must be from 1 to num_keys"):
        layer(top_k=17)
    with pytest.raises(ValueError, match="key_size even"):
        layer(key_size=7)
