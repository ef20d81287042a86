"""`WindowAttention` lets through what it says, found by influence; with a window of the length it is the original."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import zoo
from transformers import StaticCache

import solidify
from solidify.modules.gated_attention import GatedAttention
from solidify.modules.window_attention import WindowAttention

ONE = {
    **{name: {"num_hidden_layers": 1} for name in zoo.FAMILIES},
    "gemma3": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "mistral": {"num_hidden_layers": 1, "sliding_window": None},
}
SLIDING = {
    "gemma3": {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "sliding_window": 5},
    "mistral": {"num_hidden_layers": 1, "sliding_window": 5},
}


def put(name: str, window: int, sinks: int = 0, **settings: Any):
    """Returns a model with windows in every attention, and an equal one without."""
    model = zoo.model(name, **settings)
    base = copy.deepcopy(model)
    arguments = {"window": window, "sinks": sinks}
    return model, base, solidify.replace(model, zoo.FAMILIES[name].attention, WindowAttention, arguments=arguments)


@torch.no_grad()
def influence(model: Any, mask: torch.Tensor) -> torch.Tensor:
    """Returns, by row, query and key, whether a change at the key moves the output at the query."""
    rows, length = mask.shape
    inputs = torch.randn(rows, length, 64, generator=torch.Generator().manual_seed(3), dtype=model.dtype)
    plain = model(inputs_embeds=inputs, attention_mask=mask).logits
    found = torch.zeros(rows, length, length, dtype=torch.bool)
    for key in range(length):
        moved = inputs.clone()
        moved[:, key] += torch.linspace(-1, 1, 64)
        found[:, :, key] = (model(inputs_embeds=moved, attention_mask=mask).logits - plain).abs().amax(-1) > 1e-9
    return found


def allowed(mask: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Says the same, position by position."""
    found = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for row, seen in enumerate(mask.tolist()):
        start = seen.index(1)
        for query in range(start, len(seen)):
            for key in range(start, query + 1):
                found[row, query, key] = query - key < window or key - start < sinks
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("name", ONE)
def test_a_change_moves_exactly_what_the_window_lets_see_it(name: str, sinks: int, attention: str) -> None:
    model, *_ = put(name, 3, sinks, dtype=torch.float64, attention=attention, **ONE[name])
    for padding in (0, 4):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, :padding] = 0
        real = mask.bool()[:, :, None] & mask.bool()[:, None, :]
        found = influence(model, mask) & real
        assert torch.equal(found, allowed(mask, 3, sinks))
        assert not torch.equal(found, allowed(mask, 4, sinks))


@pytest.mark.parametrize(("window", "width"), [(3, 3), (8, 5)])
@pytest.mark.parametrize("name", SLIDING)
def test_one_that_slides_already_gets_the_narrower_window(name: str, window: int, width: int) -> None:
    model, *_ = put(name, window, 2, dtype=torch.float64, **SLIDING[name])
    mask = torch.ones(1, 12, dtype=torch.long)
    assert torch.equal(influence(model, mask), allowed(mask, width, 0))
    zoo.assert_cache_changes_nothing(model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_window_of_the_length_is_the_original_bit_for_bit(name: str, dtype: torch.dtype, attention: str) -> None:
    for window, sinks in ((16, 0), (13, 3)):
        model, base, edits = put(name, window, sinks, dtype=dtype, attention=attention)
        assert all(edit.bypass and not edit.dropped for edit in edits)
        for inputs in (zoo.prompts(16), {"input_ids": zoo.prompts(16)["input_ids"]}):
            assert torch.equal(model(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_sinks_it_is_transformers_own_window_bit_for_bit(attention: str) -> None:
    model, *_ = put("mistral", 5, attention=attention, sliding_window=None)
    own = zoo.model("mistral", attention=attention, sliding_window=5)
    for inputs in (zoo.prompts(16), {"input_ids": zoo.prompts(16)["input_ids"]}):
        assert torch.equal(model(**inputs).logits, own(**inputs).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_it_generates_with_a_cache_what_it_generates_without(name: str, attention: str) -> None:
    model, base, _ = put(name, 3, 2, attention=attention)
    assert not torch.allclose(model(**zoo.prompts()).logits, base(**zoo.prompts()).logits, atol=1e-2)
    zoo.assert_cache_changes_nothing(model)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_static_cache_is_longer_than_what_is_seen(name: str) -> None:
    model, *_ = put(name, 3, 2)
    inputs = zoo.prompts(16)
    for padded in (True, False):
        ids, mask = inputs["input_ids"], inputs["attention_mask"] if padded else torch.ones(2, 16, dtype=torch.long)
        whole = model(input_ids=ids, attention_mask=mask).logits
        cache = StaticCache(model.config, max_cache_len=32)
        pieces = [slice(0, 9), slice(9, 13), slice(13, 14), slice(14, 15), slice(15, 16)]
        found = [
            model(input_ids=ids[:, p], attention_mask=mask[:, : p.stop], past_key_values=cache).logits for p in pieces
        ]
        real = mask.bool()
        assert torch.allclose(torch.cat(found, 1)[real], whole[real], atol=1e-4)


@torch.no_grad()
def test_each_of_several_packed_texts_has_its_own_sinks() -> None:
    model, *_ = put("llama", 3, 2)
    ids = zoo.prompts(20)["input_ids"][:1]
    places = torch.cat([torch.arange(9), torch.arange(11)])[None]
    packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
    alone = [model(input_ids=part).logits for part in (ids[:, :9], ids[:, 9:])]
    assert torch.allclose(packed, torch.cat(alone, 1), atol=1e-4)


def test_learned_sinks_of_the_original_stay_what_they_are() -> None:
    model = families.tiny("gpt_oss")
    expected = model(**zoo.prompts(7)).logits
    solidify.replace(model, "**.self_attn", WindowAttention, arguments={"window": 7, "sinks": 4})
    assert torch.equal(model(**zoo.prompts(7)).logits, expected)
    zoo.assert_cache_changes_nothing(model)


def test_what_it_cannot_do_is_refused() -> None:
    model = zoo.model("llama")
    attention = model.model.layers[0].self_attn
    with pytest.raises(ValueError, match="window must be at least 1 and sinks at least 0, but they are 0 and 4"):
        WindowAttention(attention, window=0)
    attention.is_causal = False
    with pytest.raises(ValueError, match=r"needs a causal attention .* is_causal=False"):
        WindowAttention(attention, window=4)
    attention.is_causal = True
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"needs a causal attention .* is_causal=False"):
        WindowAttention(attention, window=4)
    del model.config.is_causal
    windowed = WindowAttention(attention, window=4)
    hidden, places = torch.randn(1, 12, 64), torch.arange(12)[None]
    rotary = model.model.rotary_emb(hidden, places)
    with pytest.raises(ValueError, match="load the model with attn_implementation='sdpa' or 'eager'"):
        windowed(hidden, position_embeddings=rotary, attention_mask=torch.ones(1, 12))
    with pytest.raises(ValueError, match="looks back only, but the model is called with is_causal=False"):
        windowed(hidden, position_embeddings=rotary, attention_mask=None, is_causal=False)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attention by flex_attention does not take"):
        windowed(hidden, position_embeddings=rotary, attention_mask=None)


@pytest.mark.slow
def test_it_lives_a_whole_life_around_a_gate(tmp_path: Path) -> None:
    """A gated window, as it is grafted today: two changes of one place, one after the other."""
    model = zoo.model("llama")
    edits = solidify.replace(model, zoo.FAMILIES["llama"].attention, GatedAttention)
    zoo.stir(model, ["output_gate.weight"])
    edits += solidify.replace(
        model, zoo.FAMILIES["llama"].attention, WindowAttention, arguments={"window": 4, "sinks": 2}
    )
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj", "**.v_proj"], train=["**.output_gate"])


def test_the_example_is_what_it_says(tiny_base: Path) -> None:
    zoo.assert_example_plans("window_attention", "WindowAttention", 2)
