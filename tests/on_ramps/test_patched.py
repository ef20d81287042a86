"""A model that was patched by hand: what differs is found, made again by edits, and proved in a fresh process."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hand_patches
import pico
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import solidify
from solidify.errors import AdapterError, SurgeryError

IDS = pico.tokens()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def wrap_all(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = hand_patches.Wrapper(layer.mlp, 0.5)


def swap_from_config(model: Any) -> None:
    model.model.layers[0].mlp = hand_patches.FromConfig(model.config, 8)


def bind_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(hand_patches.swiglu_twice, mlp)


def change_attribute(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 0.3


def change_epsilon(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.1


def change_activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def hook_layer(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.register_forward_hook(hand_patches.halve)


def grow_mlp(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj = nn.Linear(32, 64, bias=False)
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 64, bias=False)
    model.model.layers[0].mlp.down_proj = nn.Linear(64, 32, bias=False)


def several(model: Any) -> None:
    for patch in (swap_from_config, bind_forward, change_attribute, change_activation, hook_layer):
        patch(model)


PATCHES: dict[str, tuple[Callable[[Any], None], str]] = {
    "wrapped": (wrap_all, r"model.layers.\*.mlp x 2: LlamaMLP -> Wrapper\(inner, scale=0.5\)"),
    "from config": (swap_from_config, r"model.layers.0.mlp: LlamaMLP -> FromConfig\(config, width=8\)"),
    "forward": (bind_forward, r"model.layers.1.mlp: LlamaMLP -> forward is swiglu_twice of hand_patches"),
    "attribute": (change_attribute, r"model.layers.1.self_attn: LlamaAttention -> scaling=0.3"),
    "shown attribute": (change_epsilon, r"input_layernorm x 2: LlamaRMSNorm -> variance_epsilon=0.1"),
    "activation": (change_activation, r"act_fn: SiLUActivation -> GELU\(\)"),
    "hook": (hook_layer, r"o_proj: Linear -> hook halve"),
    "sizes": (grow_mlp, r"gate_proj: Linear -> Linear\(in_features=32, out_features=64, bias=False\)"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_was_patched_is_found_and_comes_back(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, words = PATCHES[name]
    model = pico.llama()
    patch(model)
    expected = logits(model)
    assert not torch.equal(expected, logits(pico.llama()))
    found = solidify.from_patched(pico.llama(), model)
    assert found.unexplained == []
    assert re.search(words, str(found)), str(found)
    pico.unwitnessed(monkeypatch)
    found.build(tmp_path / "made")
    torch.testing.assert_close(logits(solidify.load(tmp_path / "made")), expected, rtol=0, atol=1e-6)


def test_all_together_is_proved_in_a_fresh_process(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    several(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    found = solidify.from_patched(tmp_path / "base", model)
    assert "1 tensors of the base have other values (lm_head.weight)" in str(found)
    made = found.build(tmp_path / "made")
    proved = {finding.name for finding in made.findings if finding.passed}
    assert {"outputs identical (AutoModelForCausalLM)", "loads without us", "behaviour: causal"} <= proved
    assert (tmp_path / "made" / "hand_patches.py").is_file()
    assert made.manifest.base["model"] == str(tmp_path / "base")


def test_a_second_surgery_adds_to_a_patched_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    model = pico.llama()
    several(model)
    solidify.from_patched(pico.llama(), model).build(tmp_path / "first")
    again = solidify.load(tmp_path / "first")
    edits = solidify.replace(again, "model.layers.*.input_layernorm", pico.wrappers.Scaled)
    pico.artifact(again, edits, tmp_path / "second")
    torch.testing.assert_close(logits(solidify.load(tmp_path / "second")), logits(model), rtol=0, atol=1e-6)


@pytest.fixture
def patched_class() -> Iterator[None]:
    before = LlamaMLP.forward
    LlamaMLP.forward = hand_patches.swiglu_twice
    yield
    LlamaMLP.forward = before


def test_a_method_that_was_set_on_a_class_of_transformers(
    tmp_path: Path, patched_class: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pico.llama()
    expected = logits(model)
    found = solidify.from_patched(pico.llama(), model)
    assert "model.layers.*.mlp x 2: LlamaMLP -> forward is swiglu_twice of hand_patches" in str(found)
    pico.unwitnessed(monkeypatch)
    found.build(tmp_path / "made")
    monkeypatch.undo()
    with monkeypatch.context() as context:  # as in a process whose class is as it was
        context.setattr(LlamaMLP, "forward", lambda self, x: x)
        torch.testing.assert_close(logits(solidify.load(tmp_path / "made")), expected, rtol=0, atol=1e-6)


def closure_forward(model: Any) -> None:
    factor = 3
    model.model.layers[0].mlp.forward = lambda_of(factor)


def lambda_of(factor: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return forward


def set_lambda(model: Any) -> None:
    model.model.layers[0].mlp.forward = lambda x: x


def hook_lambda(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def forget(model: Any) -> None:
    model.model.layers[0].mlp = hand_patches.Forgetful(model.model.layers[0].mlp, 32)


def add_module(model: Any) -> None:
    model.model.extra = nn.Linear(2, 2)


def look_ahead(model: Any) -> None:
    model.model.layers[0].mlp = hand_patches.LooksAhead(model.model.layers[0].mlp)


def share_module(model: Any) -> None:
    model.model.layers[0].mlp = hand_patches.FromConfig(model.config, 8)
    model.model.layers[1].mlp = model.model.layers[0].mlp


def drop_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def bind_to_another(model: Any) -> None:
    model.model.layers[0].mlp.forward = model.model.layers[1].mlp.forward


def patch_model(model: Any) -> None:
    model.forward = types.MethodType(hand_patches.swiglu_twice, model)


def hook_gradient(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * 0)


def hook_accumulated(model: Any) -> None:
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda _: None)


def scale_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def set_theta(model: Any) -> None:
    model.config.rope_parameters["rope_theta"] = 5.0


def resize(model: Any) -> None:
    model.resize_token_embeddings(131)


def set_epsilon(model: Any) -> None:
    model.config.rms_norm_eps = 0.1


def set_dropout(model: Any) -> None:
    model.config.attention_dropout = 0.4


def set_tensor(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = torch.tensor(0.3)


def set_parameter(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = nn.Parameter(torch.tensor(0.3))


def set_buffer(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.register_buffer("scale", torch.ones(3), persistent=False)


class Local(nn.Module):
    """Its instances are changed after they were made."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found


def change_new_module(model: Any) -> None:
    model.model.layers[0].mlp = Local(model.model.layers[0].mlp)
    model.model.layers[0].mlp.more = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (set_lambda, r"mlp.forward is a lambda \(test_patched.py, line \d+\).* write a function"),
        (
            closure_forward,
            r"mlp.forward is a closure \(lambda_of.<locals>.*\) over factor, which no file holds",
        ),
        (hook_lambda, r"layers.0.mlp: a hook is a lambda"),
        (forget, r"made with 'width'.* say it: arguments={'model.layers.0.mlp': {'width': ...}}"),
        (add_module, r"model.extra \(Linear\) is a module that no class puts there"),
        (look_ahead, r"the model is causal, but the patch looks ahead.*declare {causal: false}"),
        (share_module, r"layers.1.mlp is the very module that stands at model.layers.0.mlp: use solidify.share"),
        (drop_layer, r"model.layers.1 \(LlamaDecoderLayer\) is gone: use solidify.remove"),
        (bind_to_another, r"mlp.forward is a method of another object \(LlamaMLP\)"),
        (patch_model, r"the model itself was changed.*write a subclass of LlamaForCausalLM"),
        (hook_gradient, r"layers.1.mlp.up_proj.weight have hooks of their own .*remove them"),
        (hook_accumulated, r"model.norm.weight have hooks of their own"),
        (scale_frequencies, r"rotary_emb.inv_freq have other values .*no file of weights holds"),
        (set_theta, r"rope_theta is 5.0, and 10000.0 in the base, but .*rotary_emb.inv_freq"),
        (resize, r"the vocabulary has 131 rows, and 128 in the base .*solidify.add_tokens"),
        (set_epsilon, r"config.rms_norm_eps is 0.1, and 1e-06 in the base, but .*model.norm are as the base has them"),
        (set_dropout, r"config.attention_dropout is 0.4, and 0.0 in the base, but .*self_attn are as the base"),
        (set_tensor, r"self_attn.scaling is a tensor of shape \(\), which config.json cannot hold"),
        (set_parameter, r"self_attn.scaling: LlamaAttention makes no such parameter"),
        (set_buffer, r"gate_proj.scale: Linear makes no such parameter or buffer"),
        (change_new_module, r"model.layers.0.mlp.more is Linear, and nothing when it is made again"),
    ],
)
def test_what_cannot_be_solid_is_said_and_not_built(tmp_path: Path, patch: Callable[[Any], None], words: str) -> None:
    model = pico.llama()
    patch(model)
    found = solidify.from_patched(pico.llama(), model)
    assert any(re.search(words, each) for each in found.unexplained), found.unexplained
    once = (resize, set_epsilon, set_dropout, set_tensor, set_parameter, set_buffer, scale_frequencies, set_theta)
    assert len(found.unexplained) == 1 or patch not in once, found.unexplained
    with pytest.raises(SurgeryError, match="the patched model cannot be made solid"):
        found.build(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_what_is_not_kept_may_be_said() -> None:
    model = pico.llama()
    forget(model)
    arguments = {"model.layers.*.mlp": {"width": 32}}
    found = solidify.from_patched(pico.llama(), model, arguments=arguments)
    assert found.unexplained == [] and "Forgetful(inner, width=32)" in str(found)
    wrong = solidify.from_patched(pico.llama(), model, arguments={"lm_head": {"width": 32}})
    assert any("arguments names 'lm_head'" in each for each in wrong.unexplained)


def test_frequencies_that_the_changed_configuration_makes_need_no_edit() -> None:
    model = pico.llama()
    set_theta(model)
    found = solidify.from_patched(pico.llama(), type(model)(model.config).to(torch.bfloat16))
    assert found.edits == [] and found.unexplained == [] and "rope_theta is 5.0" in str(found)


def test_a_token_to_pad_with_is_noticed_and_no_fault() -> None:
    model = pico.llama()
    model.config.pad_token_id = 7
    found = solidify.from_patched(pico.llama(), model)
    assert found.edits == [] and found.unexplained == [] and "pad_token_id is 7" in str(found)


def test_a_plain_model_needs_no_edit(tmp_path: Path) -> None:
    found = solidify.from_patched(pico.llama(), pico.llama())
    assert found.edits == [] and found.unexplained == []
    with pytest.raises(SurgeryError, match="no module was patched: save it with save_pretrained"):
        found.build(tmp_path / "made")


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (lambda model: model, "its base is the same object"),
        (lambda model: pico.olmoe(), "is LlamaForCausalLM, and its base is OlmoeForCausalLM"),
    ],
)
def test_another_base_is_refused(base: Callable[[Any], PreTrainedModel], words: str) -> None:
    model = pico.llama()
    with pytest.raises(SurgeryError, match=words):
        solidify.from_patched(base(model), model)


def test_lora_does_not_go_beside_a_hook(tmp_path: Path) -> None:
    """A hook sees the module without what LoRA adds to it, and with it once that is merged: refused before training."""
    model = pico.llama()
    hook_layer(model)
    with pytest.raises(AdapterError, match=r"layers\.\*\.self_attn\.o_proj has a hook on its input or output"):
        solidify.attach(model, lora={"r": 2, "target_modules": ["**.o_proj"]})
    solidify.attach(model, lora={"r": 2, "target_modules": ["**.q_proj"]})
    watched = pico.llama(tie_word_embeddings=False)
    watched.enable_input_require_grads()  # a hook of transformers, which changes no number
    solidify.attach(watched, lora={"r": 2, "target_modules": ["model.embed_tokens"]})
