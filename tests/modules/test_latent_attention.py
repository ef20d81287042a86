"""`LatentAttention` is the original at full rank, and below it loses what the singular values say."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import numpy
import pytest
import torch
import zoo
from torch import nn
from transformers.pytorch_utils import Conv1D

import solidify
from solidify.modules.gated_attention import GatedAttention
from solidify.modules.latent_attention import LatentAttention
from solidify.modules.window_attention import WindowAttention

BIASED = {"llama": {"attention_bias": True}, "gemma3": {"attention_bias": True}}


def put(name: str, rank: int | None = None, **settings: Any):
    """Returns a model with latents in every attention, and an equal one without."""
    model = zoo.model(name, **BIASED.get(name, {}), **settings)
    base = copy.deepcopy(model)
    arguments = {} if rank is None else {"rank": rank}
    return model, base, solidify.replace(model, zoo.FAMILIES[name].attention, LatentAttention, arguments=arguments)


EXACT = [(torch.float64, "sdpa", 1e-10), (torch.float32, "sdpa", 5e-6), (torch.float32, "eager", 5e-6)]


@pytest.mark.parametrize(("dtype", "attention", "most"), [*EXACT, (torch.bfloat16, "sdpa", 0.1)])
@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_at_full_rank_it_is_the_original(name: str, dtype: torch.dtype, attention: str, most: float) -> None:
    """In float64 only by sdpa: eager attention computes its softmax in float32."""
    model, base, _ = put(name, dtype=dtype, attention=attention)
    expected, found = (made(**zoo.prompts(16)).logits.double() for made in (base, model))
    assert float((found - expected).norm() / expected.norm()) < most


@torch.no_grad()
def test_keys_of_attention_across_come_from_the_encoder() -> None:
    model = families.tiny("bart", "AutoModelForSeq2SeqLM").double()
    inputs = {"input_ids": zoo.prompts()["input_ids"], "decoder_input_ids": zoo.prompts(7)["input_ids"]}
    expected = model(**inputs).logits
    solidify.replace(model, ["**.encoder_attn", "**.self_attn"], LatentAttention)
    assert torch.allclose(model(**inputs).logits, expected, atol=1e-9)


@torch.no_grad()
def test_it_compiles_without_a_break() -> None:
    model, *_ = put("llama", 8)
    for kind, arguments in ((GatedAttention, {}), (WindowAttention, {"window": 3})):
        solidify.replace(model, zoo.FAMILIES["llama"].attention, kind, arguments=arguments)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**zoo.prompts()).logits, model(**zoo.prompts()).logits)


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Cuts a matrix to a rank, by numpy in float64."""
    left, strengths, right = numpy.linalg.svd(matrix.detach().double().numpy(), full_matrices=False)
    strengths[rank:] = 0
    return torch.from_numpy(left @ numpy.diag(strengths) @ right)


@torch.no_grad()
def cut(attention: nn.Module, rank: int) -> float:
    """Cuts keys and values of an attention together to a rank; returns the share of squares that is lost."""
    if hasattr(attention, "c_attn"):
        size = attention.split_size
        stacked = attention.c_attn.weight[:, size:].T
    else:
        size = len(attention.k_proj.weight)
        stacked = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    found = truncated(stacked, rank)
    lost = float((found - stacked).norm() ** 2)
    if hasattr(attention, "c_attn"):
        attention.c_attn.weight[:, size:] = found.T
    else:
        attention.k_proj.weight.copy_(found[:size])
        attention.v_proj.weight.copy_(found[size:])
    return lost


@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_below_full_rank_it_is_the_original_with_a_cut_matrix(name: str) -> None:
    model, base, _ = put(name, 24, dtype=torch.float64)
    assert not torch.allclose(model(**zoo.prompts()).logits, base(**zoo.prompts()).logits, atol=1e-2)
    for layer in range(2):
        place = zoo.FAMILIES[name].attention.replace("*", str(layer))
        old, new = base.get_submodule(place), model.get_submodule(place)
        fused = hasattr(old, "c_attn")
        stacked = old.c_attn.weight[:, 64:].T if fused else torch.cat([old.k_proj.weight, old.v_proj.weight])
        approximate = torch.cat([new.k_up.weight, new.v_up.weight]) @ new.kv_down.weight
        tail = float(torch.linalg.svdvals(stacked)[24:].pow(2).sum())
        assert tail > 0.1
        assert float((stacked - approximate).norm() ** 2) == pytest.approx(tail, rel=1e-10)
        assert cut(old, 24) == pytest.approx(tail, rel=1e-10)
    assert torch.allclose(model(**zoo.prompts()).logits, base(**zoo.prompts()).logits, atol=1e-9)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_it_generates_with_a_cache_what_it_generates_without(name: str, attention: str) -> None:
    model, *_ = put(name, 8, attention=attention)
    zoo.assert_cache_changes_nothing(model)
    model(**zoo.prompts()).logits.pow(2).mean().backward()
    new = [p for key, p in model.named_parameters() if key.endswith(("kv_down.weight", "_up.weight"))]
    assert len(new) == 6 and all(bool(p.grad.any()) for p in new)


def test_it_takes_what_is_left_unchanged_and_says_what_is_new() -> None:
    _, _, edits = put("llama", 8)
    new = {name.rsplit("self_attn.", 1)[1] for name, origin in edits[0].tensors.items() if origin is None}
    assert new == {"kv_down.weight", "k_up.weight", "v_up.weight"}
    assert {name.rsplit("self_attn.", 1)[1] for name in edits[0].dropped} == {"k_proj.weight", "v_proj.weight"}


def test_what_it_cannot_factor_is_refused() -> None:
    attention = zoo.model("llama").model.layers[0].self_attn
    for rank in (0, 65):
        with pytest.raises(ValueError, match=f"rank must be between 1 and 64, .* LlamaAttention, but is {rank}"):
            LatentAttention(attention, rank=rank)
    attention.k_proj = Conv1D(32, 64)
    with pytest.raises(ValueError, match=r"needs an attention with linear layers k_proj and v_proj, .*: q_"):
        LatentAttention(attention)


def test_it_stands_with_its_neighbours() -> None:
    """Several changes of one attention, one around the other, each exact: together they are the original."""
    model = zoo.model("qwen3")
    base, place = copy.deepcopy(model), zoo.FAMILIES["qwen3"].attention
    for kind, arguments in ((LatentAttention, {}), (GatedAttention, {}), (WindowAttention, {"window": 16})):
        solidify.replace(model, place, kind, arguments=arguments)
    expected = base(**zoo.prompts(16)).logits
    assert torch.allclose(model(**zoo.prompts(16)).logits, expected, atol=1e-4)
    zoo.stir(model, ["output_gate.weight"])
    assert not torch.allclose(model(**zoo.prompts(16)).logits, expected, atol=1e-2)
    zoo.assert_cache_changes_nothing(model)


@pytest.mark.slow
def test_it_lives_a_whole_life(tmp_path: Path) -> None:
    model, _, edits = put("gemma3", 16)
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj", "**.kv_down"], train=["**.k_up", "**.v_up"])


def test_the_example_is_what_it_says(tiny_base: Path) -> None:
    zoo.assert_example_plans("latent_attention", "LatentAttention", 4)
