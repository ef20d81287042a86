"""At strength 0 it is the original bit for bit; at 1 it is the product of integers, and transformers' own layer."""

from __future__ import annotations

import copy
from pathlib import Path

import pico
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import solidify
from solidify.errors import SurgeryError
from solidify.modules.bit_linear import BitLinear, round_activations, round_weight

OUTPUTS = {
    "llama": "model.layers.*.mlp.down_proj",
    "qwen3": "model.layers.*.self_attn.o_proj",
    "gemma3": "model.layers.*.mlp.*_proj",
    "gpt2": "transformer.h.*.mlp.c_proj",
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def linear(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = Conv1D(24, 40) if kind == "Conv1D" else nn.Linear(40, 24, bias=kind == "Linear")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.1)
    return made.to(dtype)


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1)).to(dtype)


KINDS = ["Linear", "without bias", "Conv1D"]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_without_strength_it_is_the_original_bit_for_bit_with_gradients(
    kind: str, dtype: torch.dtype, norm: bool
) -> None:
    original = linear(kind, dtype)
    made = BitLinear(copy.deepcopy(original), strength=0.0, norm=norm)
    x, y = states(dtype).requires_grad_(), states(dtype).requires_grad_()
    expected, found = original(x), made(y)
    assert torch.equal(found, expected)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected.backward(direction)
    found.backward(direction)
    assert torch.equal(x.grad, y.grad)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter.grad, made.get_parameter(name).grad), name


def product_of_integers(original: nn.Module, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
    """Computes the rounded product in float64: integers times ternary numbers, then the two scales."""
    weight = original.weight.detach().double()
    weight = weight.T if isinstance(original, Conv1D) else weight
    g = weight.abs().mean()
    ternary = (weight > g / 2).double() - (weight < -g / 2).double()
    x = x.double()
    if gain is not None:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain.detach().double()
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        step = float(token.abs().max()) / 127
        integers = torch.tensor([round(float(value) / step) for value in token])
        assert int(integers.abs().max()) == 127
        rows.append(ternary @ integers.double() * step * g)
    y = torch.stack(rows).view(*x.shape[:-1], -1)
    return y if original.bias is None else y + original.bias.detach().double()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_at_full_strength_it_is_a_product_of_integers(kind: str, norm: bool) -> None:
    made = BitLinear(linear(kind, torch.float64), norm=norm)
    gain = None
    if norm:
        zoo.stir(made, ["norm.weight"])
        gain = made.norm.weight
    expected = product_of_integers(linear(kind, torch.float64), states(torch.float64), gain)
    assert torch.allclose(made(states(torch.float64)), expected, rtol=1e-12, atol=1e-12)
    single = BitLinear(linear(kind), norm=norm)
    if norm:
        zoo.stir(single, ["norm.weight"])
    assert torch.allclose(single(states()).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing torch's compiler, for their decorators
def test_it_is_the_layer_of_transformers_bit_for_bit(dtype: torch.dtype, norm: bool) -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    original = linear("Linear", dtype)
    theirs = AutoBitLinear(40, 24, dtype=dtype, online_quant=True, use_rms_norm=norm).to(dtype)
    theirs.load_state_dict(original.state_dict(), strict=False)
    with torch.compiler.set_stance("force_eager"):
        expected = theirs(states(dtype))
    assert torch.equal(BitLinear(original, norm=norm)(states(dtype)), expected)


def test_in_between_it_moves_by_the_share() -> None:
    original = linear("Linear", torch.float64)
    made = BitLinear(original, strength=0.25)
    x, weight = states(torch.float64), original.weight
    mixed = 0.75 * x + 0.25 * round_activations(x)
    expected = F.linear(mixed, 0.75 * weight + 0.25 * round_weight(weight), original.bias)
    assert torch.allclose(made(x), expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_passes_straight_through_the_rounding() -> None:
    original = linear("without bias")
    made = BitLinear(original)
    x = states().requires_grad_()
    direction = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(2))
    made(x).backward(direction)
    assert torch.allclose(x.grad, direction @ round_weight(original.weight.detach()), atol=1e-6)
    wanted = torch.einsum("bto,bti->oi", direction, round_activations(states()))
    assert torch.allclose(made.weight.grad, wanted, atol=1e-5)


def test_the_gradient_reaches_the_norm() -> None:
    made = BitLinear(linear("Linear"), norm=True)
    made(states()).square().sum().backward()
    assert made.norm.weight.grad.all()


@torch.no_grad()
def test_calibrated_the_norm_keeps_the_size_of_the_usual_token() -> None:
    made, x = BitLinear(linear("Linear"), norm=True), 0.2 * states()
    x[0, 0] *= 1000
    made.calibrating = True
    made(x)
    made.calibrating = False
    assert float(made.norm.weight[0]) == pytest.approx(0.2, rel=0.1)
    assert torch.equal(made.norm.weight, made.norm.weight[:1].expand(40))
    before = made.norm.weight.clone()
    made(states())
    assert torch.equal(made.norm.weight, before)
    assert torch.equal(BitLinear(linear("Linear"), norm=True, input_rms=0.5).norm.weight, torch.full((40,), 0.5))


def test_zeros_and_an_empty_batch_are_no_fault() -> None:
    made = BitLinear(linear("Conv1D"))
    assert torch.equal(made(torch.zeros(2, 40)), made.bias.expand(2, 24))
    assert made(torch.zeros(2, 0, 40)).shape == (2, 0, 24)


@pytest.mark.parametrize("name", list(OUTPUTS))
def test_it_keeps_the_behaviour_contract(name: str) -> None:
    made = zoo.model(name)
    edits = solidify.replace(made, OUTPUTS[name], BitLinear, arguments={"norm": True})
    assert all(edit.probed and edit.bypass and not edit.identical for edit in edits)
    origins = {key: origin for edit in edits for key, origin in edit.tensors.items()}
    assert all(origins[key] == key for key in origins if key.endswith("proj.weight"))  # taken over, byte for byte
    zoo.assert_cache_changes_nothing(made)


def test_a_whole_model_without_strength_is_the_model() -> None:
    expected = zoo.model("llama")(**zoo.prompts()).logits
    made = zoo.model("llama")
    edits = solidify.replace(made, "model.layers.*.*.*_proj", BitLinear, arguments={"strength": 0.0, "norm": True})
    assert len(edits) == 14
    assert all(edit.identical for edit in edits)
    assert torch.equal(made(**zoo.prompts()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strength_in_between_is_reloaded(dtype: torch.dtype, tmp_path: Path) -> None:
    made = zoo.model("llama", dtype=dtype)
    edits = solidify.replace(made, OUTPUTS["llama"], BitLinear, arguments={"strength": 0.0})
    for module in made.modules():
        if isinstance(module, BitLinear):
            module.strength.fill_(0.3)
    loaded = solidify.load(pico.artifact(made, edits, tmp_path / "artifact"))
    assert torch.equal(loaded(**zoo.prompts()).logits, made(**zoo.prompts()).logits)
    assert float(loaded.model.layers[0].mlp.down_proj.strength) == pytest.approx(0.3)


@pytest.mark.slow
def test_its_whole_life(tmp_path: Path) -> None:
    made = zoo.model("llama")
    edits = solidify.replace(made, OUTPUTS["llama"], BitLinear, arguments={"norm": True})
    zoo.whole_life(
        made,
        edits,
        tmp_path,
        lora=["model.layers.*.self_attn.q_proj"],
        train=["model.layers.*.mlp.down_proj"],
    )


def test_lora_on_the_parameter_is_merged_before_the_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    made = zoo.model("llama")
    edits = solidify.replace(made, OUTPUTS["llama"], BitLinear)
    loaded = solidify.load(pico.artifact(made, edits, tmp_path / "artifact"))
    lora = {"r": 4, "lora_alpha": 8, "target_parameters": ["model.layers.*.mlp.down_proj.weight"]}
    attached = solidify.attach(loaded, lora=lora)
    zoo.stir(attached, ["lora_B.default.weight"])
    expected = attached(**zoo.prompts()).logits
    solidify.save_adapter(attached, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    found = solidify.load(tmp_path / "merged")(**zoo.prompts()).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, made(**zoo.prompts()).logits, atol=1e-2)


@pytest.mark.parametrize("train", [[], ["model.layers.*.mlp.down_proj"]])
def test_a_strength_that_was_ramped_beside_an_adapter_is_merged(
    train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a loop over the modules, as the module's docstring has it."""
    pico.unwitnessed(monkeypatch)
    made = zoo.model("llama")
    edits = solidify.replace(made, OUTPUTS["llama"], BitLinear, arguments={"strength": 0.0})
    loaded = solidify.load(pico.artifact(made, edits, tmp_path / "artifact"))
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["model.layers.*.self_attn.q_proj"]}
    attached = solidify.attach(loaded, lora=lora, train=train)
    before = attached(**zoo.prompts()).logits
    for name, module in attached.named_modules():
        if hasattr(module, "strength") and "original_module" not in name:
            module.strength.fill_(0.7)
    expected = attached(**zoo.prompts()).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    solidify.save_adapter(attached, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = solidify.load(tmp_path / "merged")
    assert float(merged.model.layers[0].mlp.down_proj.strength) == pytest.approx(0.7)
    assert torch.allclose(merged(**zoo.prompts()).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(SurgeryError, match="takes the place of a Linear or Conv1D, but this is a LlamaMLP"):
        solidify.replace(zoo.model("llama"), "model.layers.*.mlp", BitLinear)
    with pytest.raises(ValueError, match="strength must be from 0"):
        BitLinear(linear("Linear"), strength=1.5)
    with pytest.raises(ValueError, match="input_rms must be above 0"):
        BitLinear(linear("Linear"), input_rms=0.0)
    with pytest.raises(ValueError, match="activation_bits must be from 2 to 16"):
        BitLinear(linear("Linear"), activation_bits=1)
    packed = linear("Linear")
    packed.weight = nn.Parameter(torch.zeros(480, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="is quantised already"):
        BitLinear(packed)
