"""At taper 0 it is the norm bit for bit, at 1 a squashed scale whose slope is the norm's, in between a mix."""

from __future__ import annotations

import copy
from pathlib import Path

import pico
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import solidify
from solidify.errors import SurgeryError
from solidify.modules.dynamic_tanh import DynamicTanh, measure

NORMS = {
    "llama": ["model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm", "model.norm"],
    "qwen3": ["model.layers.*.self_attn.q_norm", "model.layers.*.self_attn.k_norm", "model.layers.*.input_layernorm"],
    "gemma3": ["model.layers.*.pre_feedforward_layernorm", "model.layers.*.post_feedforward_layernorm", "model.norm"],
    "gpt2": ["transformer.h.*.ln_1", "transformer.h.*.ln_2", "transformer.ln_f"],
    "olmoe": ["model.layers.*.self_attn.q_norm", "model.layers.*.post_attention_layernorm"],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def norm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns a norm whose weight says something."""
    made = zoo.model(name, dtype=dtype).get_submodule(NORMS[name][0].replace("*", "1"))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(dtype))
    return made


def states(size: int = 64, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(3, 10, size, generator=torch.Generator().manual_seed(0))).to(dtype)


@torch.no_grad()
def adopted(original: nn.Module, **arguments: object) -> DynamicTanh:
    made = DynamicTanh(original, **arguments)
    made.adopt(original)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(NORMS))
def test_without_taper_it_is_the_norm_bit_for_bit_with_gradients(name: str, dtype: torch.dtype) -> None:
    original = norm(name, dtype)
    made = adopted(copy.deepcopy(original))
    size = len(original.weight)
    x, y = states(size, dtype).requires_grad_(), states(size, dtype).requires_grad_()
    expected, found = original(x), made(y)
    assert torch.equal(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    expected.backward(direction)
    found.backward(direction)
    assert torch.equal(x.grad, y.grad)
    for key, parameter in original.named_parameters():
        assert torch.equal(parameter.grad, made.norm.get_parameter(key).grad), key


@pytest.mark.parametrize("name", list(NORMS))
def test_the_gain_is_what_the_family_makes_of_its_weight(name: str) -> None:
    original = norm(name)
    gain, bias = measure(original)
    assert torch.allclose(gain, original.weight + (1 if name == "gemma3" else 0), atol=1e-5)
    assert torch.allclose(bias, original.bias if name == "gpt2" else torch.zeros(()), atol=1e-5)


@pytest.mark.parametrize("function", ["tanh", "identity"])
@pytest.mark.parametrize("name", list(NORMS))
def test_its_slope_at_zero_is_the_norms_for_a_token_of_that_size(name: str, function: str) -> None:
    """The norm of a token plus a tiny step, taken through its formula with the token's own size held fixed."""
    original = norm(name, torch.float64)
    made = adopted(original, taper=1.0, function=function, input_rms=3.0)
    small = 1e-5 * states(len(original.weight), torch.float64)
    gain, bias = measure(original)
    expected = gain.double() * small / 3.0
    found = made(small) - made(torch.zeros_like(small))
    assert torch.allclose(found, expected, rtol=1e-5)
    assert torch.allclose(made(torch.zeros_like(small)).double(), bias.double().expand_as(small), atol=1e-5)
    if function == "identity":  # everywhere, for tokens of that size
        token = states(len(original.weight), torch.float64)
        token = token - token.mean(-1, keepdim=True)
        token = 3.0 * token / token.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(made(token), original(token), atol=1e-5)


@pytest.mark.parametrize("taper", [0.0, 0.3])
def test_the_mix_is_its_formula(taper: float) -> None:
    original = norm("gpt2", torch.float64)
    made = adopted(original, taper=taper)
    x = states(dtype=torch.float64)
    for share in (taper, 0.8, 1.0):
        made.taper.fill_(share)
        squashed = torch.tanh(made.alpha * x) * made.weight + made.bias
        mixed = (1 - float(made.taper)) * F.layer_norm(x, (64,), original.weight, original.bias, original.eps)
        assert torch.allclose(made(x), mixed + float(made.taper) * squashed, rtol=1e-12, atol=1e-12)
    assert torch.equal(made(x), squashed)


@torch.no_grad()
def test_calibrating_sets_alpha_from_the_usual_token() -> None:
    made = adopted(norm("llama"), taper=1.0)
    x = states(scale=5.0)
    x[0, 0] *= 1000
    made(x)
    assert float(made.alpha) == 0.5
    made.calibrating = True
    made(x)
    made.calibrating = False
    assert float(made.alpha) == pytest.approx(0.5 / 5.0, rel=0.1)
    before = float(made.alpha)
    made(states())
    assert float(made.alpha) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_reaches_alpha_weight_and_bias(dtype: torch.dtype) -> None:
    made = adopted(norm("gpt2", dtype), taper=0.5)
    made(states(dtype=dtype)).square().mean().backward()
    for name, parameter in made.named_parameters():
        assert bool(parameter.grad.any()), name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("taper", [0.6, 1.0])
@pytest.mark.parametrize("name", list(NORMS))
def test_it_keeps_the_behaviour_contract(name: str, taper: float) -> None:
    made = zoo.model(name)
    edits = solidify.replace(made, NORMS[name], DynamicTanh, arguments={"taper": taper})
    assert all(edit.probed and not edit.identical and edit.bypass == (taper < 1) for edit in edits)
    zoo.assert_cache_changes_nothing(made)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_whole_model_without_taper_is_the_model(name: str) -> None:
    expected = zoo.model(name)(**zoo.prompts()).logits
    made = zoo.model(name)
    edits = solidify.replace(made, NORMS[name], DynamicTanh)
    assert all(edit.identical for edit in edits)
    assert torch.equal(made(**zoo.prompts()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_taper_is_reloaded_and_when_it_is_over_the_norm_goes(dtype: torch.dtype, tmp_path: Path) -> None:
    made = zoo.model("llama", dtype=dtype)
    edits = solidify.replace(made, NORMS["llama"], DynamicTanh)
    for module in made.modules():
        if isinstance(module, DynamicTanh):
            module.taper.fill_(0.3)
    loaded = solidify.load(pico.artifact(made, edits, tmp_path / "tapering"))
    assert float(loaded.model.norm.taper) == pytest.approx(0.3)
    assert torch.equal(loaded(**zoo.prompts()).logits, made(**zoo.prompts()).logits)
    for module in loaded.modules():
        if type(module).__name__ == "DynamicTanh":
            module.taper.fill_(1.0)
    expected = loaded(**zoo.prompts()).logits
    again = solidify.replace(loaded, NORMS["llama"], DynamicTanh, arguments={"taper": 1.0})
    assert all(edit.identical for edit in again)
    assert torch.equal(loaded(**zoo.prompts()).logits, expected)
    assert not any("norm.norm" in key for key in loaded.state_dict())


@pytest.mark.slow
def test_its_whole_life(tmp_path: Path) -> None:
    made = zoo.model("gemma3")
    edits = solidify.replace(made, NORMS["gemma3"], DynamicTanh, arguments={"taper": 0.5})
    zoo.whole_life(made, edits, tmp_path, lora=["model.layers.*.self_attn.q_proj"], train=["model.norm"])


class Gain(nn.Module):
    """Has a norm's weight, but norms nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden_states


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="is no norm: a token four times as large"):
        adopted(Gain())
    broken = Gain()
    broken.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="is no norm: a token four times as large"):
        adopted(broken)
    with pytest.raises(SurgeryError, match="takes the place of a norm with a weight for each feature"):
        solidify.replace(zoo.model("llama"), "model.layers.*.mlp", DynamicTanh)
    with pytest.raises(ValueError, match="function must be one of tanh, identity"):
        adopted(norm("llama"), function="sin")
    with pytest.raises(ValueError, match="taper must be from 0 to 1"):
        adopted(norm("llama"), taper=2.0)
    with pytest.raises(ValueError, match="is no norm any more"):
        adopted(adopted(norm("llama")))
