"""Linear attention: exact within its window, one sum beyond it, and the contract of four families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers import LlamaConfig
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
