"""A model without some experts is the model in which its routers cannot choose them, bit for bit."""

from __future__ import annotations

import copy

import experts
import pytest
import torch

import solidify

OFTEN = ("olmoe", "qwen2_moe", "gpt_oss", "ernie4_5_moe")
SELDOM = ("qwen3_moe", "mixtral", "granitemoe", "deepseek_v2", "glm4_moe", "dots1", "lfm2_moe", "minimax_m2", "hy_v3")
FAMILIES = [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)]


def some(count: int) -> list[int]:
    return torch.randperm(32, generator=torch.Generator().manual_seed(count))[:count].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_equals_masked_bit_for_bit(family: str) -> None:
    """Kernels add up 16 numbers as they add up 32 of which the last 16 are zero; so those that go come last first."""
    model = experts.tiny(family, 32)
    names, ids = experts.blocks(model), experts.tokens()
    kept = some(16)
    gone = [expert for expert in range(32) if expert not in kept]
    pruned = copy.deepcopy(model)
    solidify.rearrange_experts(pruned, names, kept)
    solidify.rearrange_experts(model, names, [*kept, *gone])
    unmasked = experts.logits(model, ids)
    masked = experts.masked_logits(model, names, range(16, 32), ids)
    assert torch.equal(experts.logits(pruned, ids), masked)
    assert float((masked - unmasked).abs().max()) > 1e-2 * float(masked.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_any_list_equals_the_masked_model_up_to_the_rounding_of_its_router(family: str) -> None:
    """The router's product and its sum are those of other numbers of experts; all else is the same."""
    model = experts.tiny(family, 32)
    names, ids = experts.blocks(model), experts.tokens()
    kept = some(9)
    pruned = copy.deepcopy(model)
    solidify.rearrange_experts(pruned, names, kept)
    masked = experts.masked_logits(model, names, [expert for expert in range(32) if expert not in kept], ids)
    assert float((experts.logits(pruned, ids) - masked).abs().max()) < 2e-6 * float(masked.abs().max())
