"""Linear attention: exact within its window, one sum beyond it, and the contract of four families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import zoo
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import solidify
from solidify.modules.linear_attention import LinearAttention

NAMES = ("llama", "qwen3", "gemma3", "olmoe", "mistral")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_original_while_the_window_is_as_long_as_the_text(name: str) -> None:
    model, inputs = zoo.model(name), zoo.prompts(40)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        before = model(**inputs).logits[real]
        solidify.replace(model, zoo.FAMILIES[name].attention, LinearAttention, arguments={"window": 40, "chunk": 16})
        after = model(**inputs).logits[real]
    assert float((after - before).abs().max()) < 2e-6 * float(before.abs().max())


def test_it_computes_its_formula() -> None:
    """Term by term in float64, with padding on the left, and chunks that end within the window and after the text."""
    module, states, positions = make(window=5, chunk=4)
    keep = torch.ones(2, 19, dtype=torch.bool)
    keep[1, :3] = False
    q, k, v = module._project(states, positions)
    found = module._attend(q, k, v, keep)
    phi_q, a = module.query_map(q)
    phi_k, b = module.key_map(k)
    near_k, far_k, values, b = (t.repeat_interleave(2, 1) for t in (k, phi_k, v, b))
    age = torch.arange(19)[:, None] - torch.arange(19)
    near = (q @ near_k.mT * module.scaling).exp() * ((age >= 0) & (age < 5))
    far = (a[..., None] + b[..., None, :]).exp() * (phi_q @ far_k.mT) * (age >= 5)
    weights = (near + far) * keep[:, None, None]
    wanted = weights @ values / weights.sum(-1, keepdim=True)
    rows = keep[:, None, :, None].expand_as(wanted)
    assert torch.allclose(found[rows], wanted[rows], rtol=1e-12, atol=1e-12)
    module.ablate = True
    weights = near * keep[:, None, None]
    wanted = weights @ values / weights.sum(-1, keepdim=True)
    assert torch.allclose(module._attend(q, k, v, keep)[rows], wanted[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_contract_of_every_family(name: str) -> None:
    model = zoo.model(name)
    edits = solidify.replace(
        model, zoo.FAMILIES[name].attention, LinearAttention, arguments={"window": 3, "chunk": 4, "feature_dim": 8}
    )
    assert all(edit.bypass and edit.probed for edit in edits)


@pytest.mark.parametrize("name", NAMES)
def test_it_generates_with_a_window_and_a_sum(name: str) -> None:
    model = changed(name)
    zoo.assert_cache_changes_nothing(model)
    asked = {"num_beams": 3, "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    beams = model.generate(**zoo.prompts(14), **asked)
    assert torch.equal(beams, model.generate(**zoo.prompts(14), **asked, use_cache=False))
    assert torch.equal(beams, model.generate(**zoo.prompts(14), **asked, cache_implementation="static"))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_it_takes_the_place_of_eager_attention(name: str) -> None:
    """It returns no weights, as it declares, and the model refuses to be asked for them."""
    model = zoo.model(name, attention="eager")
    solidify.replace(model, zoo.FAMILIES[name].attention, LinearAttention, arguments={"window": 3, "chunk": 4})
    zoo.assert_cache_changes_nothing(model)
    with pytest.raises(ValueError, match="does not record all attentions"):
        model(**zoo.prompts(), output_attentions=True)


def test_what_it_keeps_does_not_grow() -> None:
    model = changed("llama")
    cache = DynamicCache(config=model.config)
    for length in (12, 40):
        model(pico.tokens(2, length, seed=1), past_key_values=cache)
        layer = cache.layers[0]
        assert layer.keys.shape == (2, 2, 2 + 4, 16)
        assert layer.recurrent_states[0].shape == (2, 2, 16, 17)
    assert cache.get_seq_length() == 52
    assert model.config.layer_types == ["hybrid", "hybrid"]


@pytest.mark.parametrize("pieces", [(5, 2, 3), (9, 1, 1), (1, 1, 1)])
@torch.no_grad()
def test_positions_are_taken_back(pieces: tuple[int, ...]) -> None:
    """While the past is recorded, as many as came since; then it goes on as if they had not been there."""
    model, ids = changed("llama"), pico.tokens(2, 30, seed=1)
    cache = DynamicCache(config=model.config)
    model(ids[:, :10], past_key_values=cache)
    cache.activate_past_recording()
    at = 10
    for piece in pieces:
        model(ids[:, at : at + piece], past_key_values=cache)
        at += piece
    cache.crop(-(at - 11))
    model(ids[:, 11:15], past_key_values=cache)
    cache.crop(0)
    after = model(ids[:, 15:20], past_key_values=cache).logits
    assert torch.allclose(after, model(ids[:, :20]).logits[:, 15:], atol=1e-5)
    assert cache.layers[0].keys.shape[2] <= 6 + 5
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-4)
    again = model(ids[:, 26:], past_key_values=cache).logits
    assert torch.allclose(again, model(ids).logits[:, 26:], atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        cache.crop(-5)


def test_assisted_text_is_the_text() -> None:
    model, ids = changed("qwen3"), pico.tokens(1, 12, seed=3).repeat(1, 2)
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **asked), model.generate(ids, **asked))


def test_bypass_generates_what_the_original_generates() -> None:
    model, base = changed("llama"), zoo.model("llama")
    for layer in model.model.layers:
        layer.self_attn.bypass = True
    asked = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**zoo.prompts(14), **asked), base.generate(**zoo.prompts(14), **asked))


@pytest.mark.slow
def test_the_whole_life(tmp_path: Path) -> None:
    model, family = zoo.model("llama"), zoo.FAMILIES["llama"]
    edits = solidify.replace(model, family.attention, LinearAttention, arguments={"window": 3, "chunk": 4})
    zoo.stir(model, ["_map.weight", "direction", "gate"])
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj"], train=["**.query_map", "**.key_map.weight"])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_texts_that_are_packed_into_a_row_are_refused(name: str) -> None:
    model = changed(name)
    ids, positions = pico.tokens(1, 12, seed=1), torch.cat([torch.arange(7), torch.arange(5)])[None]
    with pytest.raises(ValueError, match="packed"):
        model(ids, position_ids=positions, use_cache=False)


def test_every_new_parameter_learns() -> None:
    module, states, positions = make(window=5, chunk=4)
    module(states, positions)[0].square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.any())
        for n, p in module.named_parameters()
        if "_map" in n and n != "key_map.gate"
    )
    assert module.key_map.gate.grad is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.add_module("sinks", nn.Linear(2, 2)), "a part 'sinks'"),
        (lambda m: delattr(m, "q_proj"), "no q_proj"),
        (lambda m: setattr(m, "attn_logit_softcapping", 30.0), "caps its scores"),
        (lambda m: m.register_parameter("sink", nn.Parameter(torch.zeros(4))), "a parameter 'sink'"),
    ],
)
def test_what_it_cannot_compute_is_refused(change: Any, reason: str) -> None:
    original = LlamaAttention(tiny(), 0)
    change(original)
    with pytest.raises(ValueError, match=reason):
        LinearAttention(tiny(), 0, original)


def changed(name: str) -> Any:
    """A tiny model with linear attention everywhere, away from its start, whose window is short."""
    model = zoo.model(name)
    arguments = {"window": 3, "chunk": 4, "feature_dim": 8}
    solidify.replace(model, zoo.FAMILIES[name].attention, LinearAttention, arguments=arguments)
    zoo.stir(model, ["_map.weight", "direction", "gate"])
    return model


def tiny() -> LlamaConfig:
    """Two query heads to every key head."""
    return LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")


def make(**arguments: Any) -> tuple[LinearAttention, torch.Tensor, Any]:
    """A module in float64 away from its start, with inputs and positions."""
    torch.manual_seed(0)
    module = LinearAttention(tiny(), 0, LlamaAttention(tiny(), 0), **arguments).double()
    zoo.stir(module, ["weight", "direction", "gate"])
    states = torch.randn(2, 19, 32, dtype=torch.float64)
    positions = LlamaRotaryEmbedding(tiny())(states, torch.arange(19)[None])
    return module, states, positions


@pytest.mark.parametrize(
    "name", ["SmolLM3ForCausalLM", "Cohere2ForCausalLM", "Ministral3ForCausalLM", "Exaone4ForCausalLM"]
)
def test_families_that_treat_positions_otherwise_are_refused(name: str) -> None:
    """Some layers without positions, or queries that grow with them: it would not be exact in the window."""
    model = pico.make(name, **{**pico.SIZES, "num_key_value_heads": 2, "intermediate_size": 32})
    with pytest.raises(
        solidify.SurgeryError, match=r"in some layers, or calls, alone|scales its queries by their positions"
    ):
        solidify.replace(model, "model.layers.*.self_attn", LinearAttention, arguments={"window": 64})


@pytest.mark.parametrize("name", ["GraniteForCausalLM", "Qwen2ForCausalLM", "OlmoForCausalLM", "Glm4ForCausalLM"])
def test_families_that_rotate_in_every_layer_are_not(name: str) -> None:
    sizes = {**pico.SIZES, "num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8, "pad_token_id": 0}
    base = pico.make(name, **sizes)
    model = copy.deepcopy(base)
    solidify.replace(model, "model.layers.*.self_attn", LinearAttention, arguments={"window": 64})
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, base(ids).logits, atol=1e-5)
