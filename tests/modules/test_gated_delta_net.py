"""The gated delta rule: transformers' Qwen3-Next layer with the same weights, and the contract of five families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import zoo
from torch import nn
from transformers import DynamicCache, LlamaConfig, Qwen3NextConfig
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import solidify
from solidify.model import cache_layers
from solidify.modules.gated_delta_net import GatedDeltaNet, apply_delta_rule

NAMES = ("llama", "qwen3", "gemma3", "olmoe", "mistral")
NEW = ["conv1d.weight", "z_proj.weight", "z_proj.bias", "a_proj.weight", "b_proj.weight", "A_log", "dt_bias", "norm"]


@pytest.mark.parametrize("key_heads", [4, 2])
def test_it_is_the_layer_of_qwen3_next(key_heads: int) -> None:
    """The same weights, laid out as theirs, give the same outputs: a prefill, pieces, and single steps."""
    module, theirs = same(key_heads)
    hidden = torch.randn(2, 90, 32)
    with torch.no_grad():
        wanted, (found, _) = theirs(hidden), module(hidden)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        ours, other = cache(module), DynamicCache(config=theirs_config())
        at = 0
        for size in (70, 1, 1, 5, 1):
            piece = hidden[:, at : at + size]
            wanted = theirs(piece, cache_params=other)
            found, _ = module(piece, past_key_values=ours)
            cache_layers.count_positions(module, (piece,), {"past_key_values": ours}, None)
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), at
            at += size
        assert torch.allclose(ours.layers[0].recurrent_states[0], other.layers[0].recurrent_states[0], atol=1e-5)


def test_chunks_are_the_recurrence() -> None:
    """In float64, position by position as the formula says."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 21, 3, 4, dtype=torch.float64)
    log_decay, beta = -torch.rand(2, 21, 3, dtype=torch.float64), torch.rand(2, 21, 3, dtype=torch.float64)
    state = start = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    unit_q, unit_k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    wanted = []
    for at in range(21):
        state = state * log_decay[:, at].exp()[..., None, None]
        correction = beta[:, at, :, None] * (v[:, at] - (state.mT @ unit_k[:, at, ..., None])[..., 0])
        state = state + unit_k[:, at, ..., None] * correction[..., None, :]
        wanted.append((state.mT @ unit_q[:, at, ..., None])[..., 0] / 2)
    for chunk in (1, 8, 64):
        found, last = apply_delta_rule(q, k, v, log_decay, beta, start, chunk)
        assert torch.allclose(found, torch.stack(wanted, 1), rtol=1e-12, atol=1e-12)
        assert torch.allclose(last, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract_and_generates(name: str) -> None:
    model, edits = changed(name)
    assert edits[0].declares == {"attentions": False, "crop": False}
    assert edits[0].bypass
    zoo.assert_cache_changes_nothing(model)
    asked = {"num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    assert torch.equal(
        model.generate(**zoo.prompts(14), **asked), model.generate(**zoo.prompts(14), **asked, use_cache=False)
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral"])
def test_bypass_generates_what_the_original_generates(name: str) -> None:
    (model, _), base = changed(name), zoo.model(name)
    for layer in model.model.layers:
        layer.self_attn.bypass = True
    asked = {"num_beams": 3, "max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**zoo.prompts(14), **asked), base.generate(**zoo.prompts(14), **asked))


def test_the_projections_are_the_attentions_own() -> None:
    model = zoo.model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits = solidify.replace(model, "model.layers.0.self_attn", GatedDeltaNet)
    assert edits[0].dropped == ()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_texts_that_are_packed_into_a_row_are_refused(name: str) -> None:
    model = changed(name)[0]
    ids, positions = pico.tokens(1, 12, seed=1), torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=positions, use_cache=False)


def test_every_new_parameter_learns() -> None:
    module, _ = same(2)
    module(torch.randn(2, 9, 32))[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


def test_what_it_cannot_take_over_is_refused() -> None:
    original = LlamaAttention(tiny(2), 0)
    original.add_module("sinks", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a part 'sinks'"):
        GatedDeltaNet(tiny(2), 0, original)


@pytest.mark.slow
def test_the_whole_life(tmp_path: Path) -> None:
    model, edits = changed("qwen3")
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj"], train=["**.z_proj", "**.A_log"])


def changed(name: str) -> tuple[Any, Any]:
    """A tiny model with the recurrence everywhere, away from its start, computed in short chunks."""
    model = zoo.model(name)
    edits = solidify.replace(model, zoo.FAMILIES[name].attention, GatedDeltaNet, arguments={"chunk": 4})
    zoo.stir(model, NEW, scale=0.2)
    return model, edits


def tiny(key_heads: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=key_heads, rms_norm_eps=1e-6)


def theirs_config() -> Qwen3NextConfig:
    sizes = {f"linear_num_{kind}_heads": 4 for kind in ("key", "value")}
    widths = {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    return Qwen3NextConfig(
        hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], **sizes, **widths, rms_norm_eps=1e-6
    )


def same(key_heads: int) -> tuple[GatedDeltaNet, Qwen3NextGatedDeltaNet]:
    """Our module away from its start, and transformers' layer with its weights: heads side by side, groups repeated."""
    torch.manual_seed(0)
    module = GatedDeltaNet(tiny(key_heads), 0, LlamaAttention(tiny(key_heads), 0))
    zoo.stir(module, NEW)
    theirs = Qwen3NextGatedDeltaNet(theirs_config(), 0)
    with torch.no_grad():
        module.z_proj.bias.zero_()
        repeat = 4 // key_heads

        def spread(weight: torch.Tensor) -> torch.Tensor:
            return weight.unflatten(0, (-1, 8)).repeat_interleave(4 * 8 // weight.shape[0], 0)

        weights = [spread(part.weight) for part in (module.q_proj, module.k_proj, module.v_proj, module.z_proj)]
        theirs.in_proj_qkvz.weight.copy_(torch.stack(weights, 1).flatten(0, 2))
        theirs.in_proj_ba.weight.copy_(torch.stack([module.b_proj.weight, module.a_proj.weight], 1).flatten(0, 1))
        parts = module.conv1d.weight.split([32, 32 // repeat, 32 // repeat])
        theirs.conv1d.weight.copy_(torch.cat([spread(part).flatten(0, 1) for part in parts]))
        theirs.A_log.copy_(module.A_log)
        theirs.dt_bias.copy_(module.dt_bias)
        theirs.norm.weight.copy_(module.norm)
        theirs.out_proj.weight.copy_(module.o_proj.weight)
    return module, theirs


def cache(module: GatedDeltaNet) -> Any:
    """A cache with the layer that surgery would have it find."""
    found = DynamicCache()
    cache_layers.give_layer(module, (), {"past_key_values": found})
    return found
