"""Rules about what servers put in the place of modules: each seen broken by what a server really spoils, and kept.

`tests/servers` runs the same modules by a server.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pico
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import solidify
from solidify.checks import replaced, served_call
from solidify.checks.rule import Rule

layers: Any = import_module("served_layers")  # tests/support/user_modules, which pico puts on the path
served: Any = import_module("served")

MLP, ATTENTION = "model.layers.*.mlp", "model.layers.*.self_attn"
LINEAR, CALLED, ALIKE = (
    "linear layers are only that",
    "what holds linear layers is called",
    "layers of one class are alike",
)
DISPATCH, HEADS = "forward itself calls the attention function", "heads are those of the configuration"
KERNEL, TYPES = "experts are gated by silu", "one type for all parameters"


def judge(model: PreTrainedModel, *changes: tuple[Any, ...]) -> dict[str, Rule]:
    """Changes a model and returns the rules by name."""
    for target, module, *arguments in changes:
        solidify.replace(model, target, module, arguments=dict(*arguments))
    return {rule.name: rule for rule in replaced.rules(model, served_call.observe(model.base_model))}


def broken(found: dict[str, Rule]) -> set[str]:
    return {name for name, rule in found.items() if rule.faults}


FAULTS: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "a linear layer that does more": (
        (f"{MLP}.down_proj", layers.Clamped),
        LINEAR,
        "model.layers.*.mlp.down_proj (2 times) inherits from nn.Linear",
    ),
    "a matrix that is read": (
        ("model.layers.1.mlp.down_proj", layers.Reader),
        CALLED,
        "model.layers.1.mlp.down_proj.original is not called",
    ),
    "a module whose parts are read": (
        (ATTENTION, served.HeldAttention),
        CALLED,
        "model.layers.*.self_attn.original (2 times) is not called",
    ),
    "a projection of one layer": (
        ("model.layers.1.self_attn.o_proj", pico.wrappers.Bottleneck),
        ALIKE,
        "model.layers.1.self_attn.o_proj is not an nn.Linear, but is one in the first LlamaAttention",
    ),
    "attention that hides its call": (
        (ATTENTION, served.HidingAttention),
        DISPATCH,
        "model.layers.*.self_attn (2 times) calls it 0 times in its own forward",
    ),
    "attention of other heads": (
        (ATTENTION, served.RepeatingAttention),
        HEADS,
        "attends with 4 heads of queries, 4 of keys, of 8, not 4, 2, of 8",
    ),
    "a norm by name only": (
        ("model.norm", layers.DoubleRMSNorm),
        "what is called RMSNorm is one",
        "model.norm is replaced because of its class's name",
    ),
    "embeddings that do more": (
        ("model.embed_tokens", pico.wrappers.Scaled),
        "the input embeddings are a table",
        "they are Scaled, and are replaced by a table",
    ),
    "a name that is left out": (
        ("model.layers.0.mlp", layers.Masked),
        "no tensor has a name that is left out",
        "SGLang leaves model.layers.0.mlp.attn.bias out",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_server_spoils_is_named(fault: str) -> None:
    change, rule, words = FAULTS[fault]
    found = judge(pico.llama(), change)
    assert rule in broken(found)
    assert any(words in said for said in found[rule].faults), found[rule].faults


@pytest.mark.parametrize(
    "change",
    [
        (f"{MLP}.down_proj", pico.wrappers.Scaled),  # in all layers, the first among them
        ("model.layers.0.self_attn.o_proj", pico.wrappers.Bottleneck),  # in the first: then none is fused
        (MLP, layers.GatedDense),
        (MLP, layers.Gated),
        (ATTENTION, served.InterfaceAttention),
        ("model.norm", pico.wrappers.Scaled),
    ],
    ids=lambda change: f"{change[1].__name__} at {change[0]}",
)
def test_what_a_server_keeps_is_not_spoken_against(change: tuple[Any, ...]) -> None:
    assert broken(judge(pico.llama(), change)) == set()


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "OlmoeForCausalLM"])
def test_families_as_they_are_keep_all_rules(name: str) -> None:
    settings = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    if name == "GPT2LMHeadModel":
        settings = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
    assert broken(judge(pico.make(name, **settings))) <= {"the input embeddings are a table"}


def test_experts_are_silu_and_transformers_own() -> None:
    assert KERNEL not in broken(judge(pico.olmoe()))
    found = judge(pico.olmoe(hidden_act="gelu"))
    assert found[KERNEL].faults == ["the configuration names 'gelu', the servers' kernel computes silu"]
    found = judge(pico.olmoe(), (MLP, served.PooledMoE))
    assert "model.layers.*.mlp.experts (2 times) is of a class of its own" in found[KERNEL].faults[0]
    assert CALLED not in broken(found)  # some experts see no token


def test_a_parameter_that_stays_wide_is_named() -> None:
    model = pico.llama(dtype=torch.bfloat16)
    assert TYPES not in broken(judge(model))
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.float())
    assert judge(model)[TYPES].faults == ["model.norm.weight is not bfloat16"]


def test_a_hint_that_names_a_tensor_is_seen() -> None:
    """vLLM leaves out what a part that is built from its configuration calls useless (S31)."""
    model = pico.llama()
    assert not replaced.hints(model, model.model).faults
    model.model._keys_to_ignore_on_load_unexpected = {"^lm_head", "nowhere"}
    assert replaced.hints(model, model.model).faults == ["'^lm_head' names lm_head.weight"]


def test_a_declared_mask_is_lost_by_a_server() -> None:
    model = pico.llama()
    name = "attention has the mask that servers give it"
    assert name not in broken(judge(model))
    solidify.mask(model, "window", window=4)
    assert "model.layers.*.self_attn (2 times) has a declared mask" in judge(model)[name].faults[0]
