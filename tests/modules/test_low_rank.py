"""`LowRank` is the linear layer at full rank, and below it loses what Eckart and Young say."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy
import pytest
import torch
import zoo
from torch import nn
from transformers.pytorch_utils import Conv1D

import solidify
from solidify.modules.low_rank import LowRank

LINEAR = {name: ["q_proj", "o_proj"] for name in zoo.FAMILIES} | {"gpt2": ["c_attn", "c_proj"]}


def put(name: str, **arguments: float):
    """Returns a model with factors in every attention and output projection, and an equal one without."""
    dtype = arguments.pop("dtype", torch.float32)
    model = zoo.model(name, dtype=dtype)
    base = copy.deepcopy(model)
    places = [f"{zoo.FAMILIES[name].attention}.{linear}" for linear in LINEAR[name]]
    return model, base, solidify.replace(model, places, LowRank, arguments=arguments)


def layers() -> list[nn.Module]:
    torch.manual_seed(3)
    made = [nn.Linear(48, 20), nn.Linear(20, 48, bias=False), Conv1D(48, 20), Conv1D(20, 48)]
    return [layer.double() for layer in made]


@pytest.mark.parametrize("place", range(4))
@torch.no_grad()
def test_what_is_lost_is_what_the_singular_values_say(place: int) -> None:
    original = layers()[place]
    full = original.weight.numpy()
    strengths = numpy.linalg.svd(full, compute_uv=False)
    inputs = torch.randn(7, original.weight.shape[int(isinstance(original, nn.Linear))], dtype=torch.float64)
    for rank in (1, 5, 19, 20):
        new = LowRank(original, rank=rank).double()
        new.adopt(original)
        lost = full - new.weight.numpy()
        assert numpy.square(lost).sum() == pytest.approx(numpy.square(strengths[rank:]).sum(), abs=1e-12)
        assert numpy.linalg.norm(lost, 2) == pytest.approx([*strengths, 0.0][rank], abs=1e-12)
        cut = copy.deepcopy(original)
        cut.weight.copy_(torch.from_numpy(full - lost))
        assert torch.allclose(new(inputs), cut(inputs), atol=1e-12)
    assert torch.allclose(new(inputs), original(inputs), atol=1e-12)


@pytest.mark.parametrize("place", range(4))
def test_a_share_is_the_largest_rank_that_keeps_to_it(place: int) -> None:
    original = layers()[place]
    for share in (0.1, 0.5, 1.0):
        new = LowRank(original, share=share)
        numbers = new.down.weight.numel() + new.up.weight.numel()
        assert numbers <= share * original.weight.numel() < numbers + 48 + 20
    assert LowRank(original, share=5.0).rank == 20


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 5e-6), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("name", zoo.FAMILIES)
@torch.no_grad()
def test_at_full_rank_the_model_is_the_original(name: str, dtype: torch.dtype, most: float) -> None:
    model, base, _ = put(name, rank=64, dtype=dtype)
    expected, found = (made(**zoo.prompts(16)).logits.double() for made in (base, model))
    assert float((found - expected).norm() / expected.norm()) < most


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_it_generates_with_a_cache_what_it_generates_without(name: str) -> None:
    model, base, edits = put(name, share=0.5)
    assert sum(edit.parameters_after for edit in edits) < 0.51 * sum(edit.parameters_before for edit in edits)
    assert not torch.allclose(model(**zoo.prompts()).logits, base(**zoo.prompts()).logits, atol=1e-2)
    zoo.assert_cache_changes_nothing(model)
    model(**zoo.prompts()).logits.pow(2).mean().backward()
    assert all(bool(p.grad.any()) for key, p in model.named_parameters() if key.endswith(("down.weight", "up.weight")))


def test_what_cannot_be_is_refused() -> None:
    linear = nn.Linear(8, 4)
    for arguments in ({}, {"rank": 2, "share": 0.5}):
        with pytest.raises(ValueError, match="either rank or share is given"):
            LowRank(linear, **arguments)
    with pytest.raises(ValueError, match="the rank of a layer from 8 to 4 is between 1 and 4, but is 5"):
        LowRank(linear, rank=5)
    with pytest.raises(ValueError, match=r"between 1 and 4, but is 0 for share 0\.1"):
        LowRank(linear, share=0.1)
    with pytest.raises(ValueError, match=r"takes the place of a linear layer .* found LayerNorm"):
        LowRank(nn.LayerNorm(8), rank=2)


@pytest.mark.slow
def test_it_lives_a_whole_life(tmp_path: Path) -> None:
    model, _, edits = put("gpt2", share=0.5)
    zoo.whole_life(model, edits, tmp_path, lora=["**.c_proj.down", "**.c_attn.down"], train=["**.c_attn.up"])


def test_the_example_is_what_it_says(tiny_base: Path) -> None:
    zoo.assert_example_plans("low_rank", "LowRank", 4)
