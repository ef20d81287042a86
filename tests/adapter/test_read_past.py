"""LoRA on a layer whose weight another module reads, without calling the layer, has no effect there: it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import families
import past_nets
import pico
import pytest
import torch
from torch import nn
from transformers import RwkvConfig, RwkvForCausalLM

import solidify
from solidify.errors import AdapterError
from solidify.model import weight_reads

ROWS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


def make_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5))


@pytest.mark.parametrize(
    "target",
    [{"target_modules": ["module.0.linear1", "module.0.linear2"]}, {"target_parameters": ["**.linear1.weight"]}],
)
def test_a_layer_that_is_read_past_is_refused_by_name(target: dict[str, list[str]]) -> None:
    model = solidify.wrap(make_encoder(), ROWS)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state, classes = torch.get_rng_state(), [type(part) for part in model.modules()]
    with pytest.raises(AdapterError, match=r"module.0.linear1.* does not call it.*name module.0 in `train`"):
        solidify.attach(model, lora={"r": 2, **target})
    assert [type(part) for part in model.modules()] == classes
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_layer_that_is_read_past_inside_a_text_model_is_refused() -> None:
    """Of a text model the inputs are known, and nothing is tried with it."""
    model = pico.llama()
    model.model.layers[0].mlp = nn.TransformerEncoderLayer(model.config.hidden_size, 2, 16, batch_first=True).eval()
    with pytest.raises(AdapterError, match=r"model\.layers\.0\.mlp\.linear1.* does not call it"):
        solidify.attach(model, lora={"r": 2, "target_modules": ["model.layers.0.mlp.linear1"]})


def test_a_layer_that_only_a_failed_try_reads_is_taken() -> None:
    """Inkling2 asks this layer for its dtype, with images that it then cannot place: the model runs with text alone."""
    name = "model.vision_tower.embeddings.patch_embedding"
    model = families.tiny("inkling2", "AutoModelForImageTextToText")
    assert name not in weight_reads.read_by_others(model)
    adapted = solidify.attach(model, lora={"r": 2, "target_modules": [name]})
    assert any(f"{name}.lora_A" in key for key, _ in adapted.named_parameters())


def test_what_the_sentence_advises_has_an_effect() -> None:
    model = solidify.wrap(make_encoder(), ROWS)
    with torch.no_grad():
        before = model(ROWS).logits
    adapted = solidify.attach(model, lora={"r": 2, "target_modules": ["module.1"]}, train=["module.0"])
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted.train()(ROWS).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert (adapted.eval()(ROWS).logits - before).abs().max() > 1e-3
    linear1 = adapted.get_submodule("base_model.model.module.0").modules_to_save["default"].linear1
    assert linear1.weight.requires_grad


def test_a_layer_that_is_read_for_its_dtype_and_called_is_taken(tmp_path: Path) -> None:
    """T5 asks `wo` for its dtype, and calls it."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in weight_reads.read_by_others(model)  # and called
    adapted = solidify.attach(model, lora={"r": 2, "target_modules": ["encoder.block.*.layer.1.DenseReluDense.wo"]})
    assert any("wo.lora_A" in name for name, _ in adapted.named_parameters())


def test_a_second_adapter_is_refused_too() -> None:
    model = solidify.attach(solidify.wrap(make_encoder(), ROWS), lora={"r": 2, "target_modules": ["module.1"]})
    with pytest.raises(AdapterError, match=r"module.0.linear2"):
        solidify.attach(model, lora={"r": 2, "target_modules": ["module.0.linear2"]}, name="second")


FLAT = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (past_nets.ByParameters, "in evaluation"),
        (past_nets.ByTable, "in evaluation"),
        (past_nets.InTraining, "in training"),
        (past_nets.Both, "in evaluation"),
    ],
)
def test_a_weight_is_not_read_past_its_layer_in_any_way(kind: type[nn.Module], mode: str) -> None:
    model = solidify.wrap(kind(), FLAT)
    with pytest.raises(AdapterError, match=rf"computes with the weight of module\.up past the layer \({mode}\)"):
        solidify.attach(model, lora={"r": 2, "target_modules": ["module.up"]})
    assert not model.training and all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("kind", [past_nets.Called, past_nets.ByForward, past_nets.Asking, past_nets.Counting])
def test_layers_that_are_called_are_taken(kind: type[nn.Module]) -> None:
    model = solidify.wrap(kind(), FLAT)
    adapted = solidify.attach(model, lora={"r": 2, "target_modules": ["module.up"]})
    assert not vars(model.module).get("calls")
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        f"base_model.model.module.up.lora_{factor}.default.weight" for factor in "AB"
    }
    assert not model.training and type(model.module.up.base_layer.weight) is nn.Parameter


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        (past_nets.WithoutGradients, "in evaluation"),
        (past_nets.ByNumber, "in evaluation"),
        (past_nets.ByNumpy, "in evaluation"),
        (past_nets.WhereNothingLearns, "in evaluation, without gradients"),
        (past_nets.InTrainingByData, "in training"),
    ],
)
def test_a_weight_is_not_read_past_its_layer_where_no_graph_shows_it(kind: type[nn.Module], mode: str) -> None:
    model = solidify.wrap(kind(), FLAT)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    chance = torch.get_rng_state()
    with pytest.raises(AdapterError, match=rf"depends on the weight of module\.up, and not on .* \({mode}\)"):
        solidify.attach(model, lora={"r": 2, "target_modules": ["module.up", "module.down"]})
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    solidify.attach(model, lora={"r": 2, "target_modules": ["module.down"]})


@pytest.mark.parametrize(
    ("kind", "mode"), [(past_nets.InSteps, "cache"), (past_nets.InStepsWithoutGradients, "cache, without gradients")]
)
def test_a_weight_is_not_read_past_its_layer_in_single_steps(kind: type[nn.Module], mode: str) -> None:
    model = pico.llama()
    solidify.replace(model, "model.layers.*.mlp", kind)
    with pytest.raises(AdapterError, match=rf"inner\.gate_proj, and not on .* \(in a single step over a {mode}\)"):
        solidify.attach(model, lora={"r": 2, "target_modules": ["model.layers.*.mlp.inner.*_proj"]})
    solidify.attach(model, lora={"r": 2, "target_modules": ["model.layers.*.mlp.inner.up_proj"]})


def test_a_weight_is_not_read_past_its_layer_by_its_data() -> None:
    with pytest.raises(AdapterError, match=r"reads the weight of module\.up and does not call it"):
        solidify.attach(solidify.wrap(past_nets.ByData(), FLAT), lora={"r": 2, "target_modules": ["module.up"]})


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (past_nets.Gated, False),
        (past_nets.Unreached, False),
        (past_nets.Skipping, True),
        (past_nets.Choosing, True),
    ],
)
def test_a_layer_of_which_nothing_is_seen_is_taken(
    kind: type[nn.Module], seen: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = solidify.wrap(kind(), FLAT)
    adapted = solidify.attach(model, lora={"r": 2, "lora_dropout": 0.1, "target_modules": ["module.up"]})
    words = " ".join(capsys.readouterr().err.split())
    assert ("not looked at whether an update of module.up has an effect" in words) is not seen
    factors = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(factors) == 2 and all(p.grad is None for p in adapted.parameters())
    assert not factors["base_model.model.module.up.lora_B.default.weight"].any()


def test_an_adapter_that_has_no_effect_is_not_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    pico.artifact(solidify.wrap(make_encoder(), ROWS), [], base)
    configuration = LoraConfig(r=2, target_modules=["linear1", "1"], init_lora_weights=False)
    get_peft_model(solidify.load(base), configuration).save_pretrained(tmp_path / "theirs")
    for trainable in (True, False):
        with pytest.raises(AdapterError, match=r"reads the weight of module\.0\.linear1"):
            solidify.load_adapter(solidify.load(base), tmp_path / "theirs", trainable=trainable)


def test_an_adapter_past_which_a_weight_is_read_without_a_graph_is_not_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tmp_path / "base"
    pico.artifact(solidify.wrap(past_nets.WhereNothingLearns(), FLAT), [], base)
    configuration = LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    get_peft_model(solidify.load(base), configuration).save_pretrained(tmp_path / "theirs")
    for trainable in (True, False):
        with pytest.raises(AdapterError, match=r"depends on the weight of module\.up"):
            solidify.load_adapter(solidify.load(base), tmp_path / "theirs", trainable=trainable)


def test_a_cache_that_cannot_be_copied_ends_no_attach() -> None:
    """No step over it is tried."""
    model = pico.llama()
    for layer in model.model.layers:
        layer.self_attn = past_nets.Noting(layer.self_attn)
    adapted = solidify.attach(model, lora={"r": 2, "target_modules": ["model.layers.*.self_attn.inner.q_proj"]})
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(model.model.layers) and all(".inner.q_proj.lora_" in name for name in trained)


def make_rescaled() -> nn.Module:
    """An RWKV, which divides weights by two as it evaluates, and multiplies them again as it trains."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    return RwkvForCausalLM(RwkvConfig(vocab_size=128, context_length=64, rescale_every=2, **sizes))


def make_merging() -> nn.Module:
    model = pico.llama()
    for layer in model.model.layers:
        layer.mlp.up_proj = past_nets.SelfMerging(layer.mlp.up_proj)
    return model


@pytest.mark.parametrize(
    ("make", "target"),
    [(make_rescaled, "rwkv.blocks.*.attention.key"), (make_merging, "model.layers.*.self_attn.q_proj")],
)
def test_weights_that_change_with_the_mode_are_what_they_were(make: Callable[[], nn.Module], target: str) -> None:
    tokens = torch.randint(3, 128, (2, 9))
    model = make().eval()
    with torch.no_grad():
        before = model(input_ids=tokens, use_cache=False).logits
        weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
        peft_model = solidify.attach(model, lora={"r": 2, "target_modules": [target]}).eval()
        assert torch.equal(peft_model(input_ids=tokens, use_cache=False).logits, before)
    now = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(now[name], value) for name, value in weights.items())
