"""`GatedAttention` starts as the original bit for bit, computes what its docstring says, and lives a whole life."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import solidify
from solidify.adapter.adapters import switched_off
from solidify.modules.gated_attention import GatedAttention
from solidify.modules.latent_attention import LatentAttention
from solidify.modules.window_attention import WindowAttention


def put(name: str, *, per: str = "head", **settings: object):
    """Returns a model with gates in every attention, and an equal one without."""
    model = zoo.model(name, **settings)
    base = copy.deepcopy(model)
    return model, base, solidify.replace(model, zoo.FAMILIES[name].attention, GatedAttention, arguments={"per": per})


@pytest.mark.parametrize("per", ["head", "element"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_it_starts_as_the_original_bit_for_bit_with_gradients(name: str, dtype: torch.dtype, per: str) -> None:
    model, base, edits = put(name, per=per, dtype=dtype)
    assert all(edit.identical and edit.bypass for edit in edits)
    expected, found = (made(**zoo.prompts(16)).logits for made in (base, model))
    assert torch.equal(found, expected)
    expected.float().pow(2).mean().backward()
    found.float().pow(2).mean().backward()
    for key, parameter in base.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(key).grad), key  # all keep their names
    for key, parameter in model.named_parameters():
        assert "output_gate" not in key or bool(parameter.grad.any()), key


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_away_from_its_start_it_generates_with_a_cache_what_it_generates_without(name: str, attention: str) -> None:
    model, base, _ = put(name, attention=attention)
    zoo.stir(model, ["output_gate.weight"])
    expected, found = (made(**zoo.prompts()).logits for made in (base, model))
    assert not torch.allclose(found, expected, atol=1e-2)
    zoo.assert_cache_changes_nothing(model)
    for module in model.modules():
        if isinstance(module, GatedAttention):
            module.bypass = True
    assert torch.equal(model(**zoo.prompts()).logits, expected)


@pytest.mark.parametrize("per", ["head", "element"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_the_gate_is_twice_the_sigmoid_of_what_the_token_says(name: str, per: str) -> None:
    model, base, _ = put(name, per=per, dtype=torch.float64)
    zoo.stir(model, ["output_gate.weight"])
    place = zoo.FAMILIES[name].attention.replace("*", "0")
    seen: dict[str, torch.Tensor] = {}
    output = base.get_submodule(f"{place}.{zoo.FAMILIES[name].output_name}")
    output.register_forward_pre_hook(lambda _, args: seen.update(heads=args[0]))
    base.get_submodule(place).register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    model.get_submodule(place).register_forward_hook(lambda _, args, result: seen.update(found=result[0]))
    base(**zoo.prompts())
    model(**zoo.prompts())
    logits = seen["hidden"] @ model.get_submodule(place).output_gate.weight.T
    heads = seen["heads"].unflatten(-1, (-1, 16 if per == "head" else 1))
    gated = (heads * (2 / (1 + torch.exp(-logits)))[..., None]).flatten(-2)
    assert torch.allclose(seen["found"], output(gated), atol=1e-12)


@torch.no_grad()
def test_each_of_several_changes_has_a_bypass_of_its_own() -> None:
    """A window around a gate: the window alone is switched off, or all that was changed, and then it is the base."""
    model, base, _ = put("llama")
    zoo.stir(model, ["output_gate.weight"])
    gated = model(**zoo.prompts()).logits
    edits = solidify.replace(model, zoo.FAMILIES["llama"].attention, WindowAttention, arguments={"window": 3})
    assert all(edit.bypass for edit in edits)
    both = model(**zoo.prompts()).logits
    for layer in model.model.layers:
        layer.self_attn.bypass = True
    assert torch.equal(model(**zoo.prompts()).logits, gated)
    with switched_off(model):
        assert torch.equal(model(**zoo.prompts()).logits, base(**zoo.prompts()).logits)
    for layer in model.model.layers:
        layer.self_attn.bypass = False
    assert torch.equal(model(**zoo.prompts()).logits, both) and not torch.allclose(both, gated, atol=1e-2)


def test_what_has_no_bypass_gets_none_from_what_is_inside() -> None:
    model, *_ = put("llama")
    edits = solidify.replace(model, zoo.FAMILIES["llama"].attention, LatentAttention, arguments={"rank": 8})
    assert not any(edit.bypass for edit in edits)


class WithoutOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)


def test_what_has_no_output_projection_or_no_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs an attention with an output projection .* consists of: q_proj"):
        GatedAttention(WithoutOutput())
    attention = zoo.model("llama").model.layers[0].self_attn
    with pytest.raises(ValueError, match="per must be head or element"):
        GatedAttention(attention, per="row")
    with pytest.raises(ValueError, match="has an output_gate already"):
        GatedAttention(GatedAttention(attention))
    attention.head_dim = None
    with pytest.raises(ValueError, match=r"needs the size of a head .* use per: element"):
        GatedAttention(attention)
    GatedAttention(attention, per="element")


@pytest.mark.slow
def test_it_lives_a_whole_life(tmp_path: Path) -> None:
    model, _, edits = put("qwen3")
    zoo.stir(model, ["output_gate.weight"])
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj", "**.o_proj"], train=["**.output_gate"])


def test_the_example_is_what_it_says(tiny_base: Path) -> None:
    zoo.assert_example_plans("gated_attention", "GatedAttention", 4)
