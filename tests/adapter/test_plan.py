from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pico
import solidify
from solidify.adapter import plan as planning
from solidify.adapter import standing
from solidify.errors import AdapterError

Q = "model.layers.*.self_attn.q_proj"


def message(model: torch.nn.Module, lora: dict[str, object] | None = None, train: object = ()) -> str:
    with pytest.raises(AdapterError) as caught:
        planning.plan(model, lora, train)
    return str(caught.value)


def test_names_and_patterns_are_resolved_against_the_model() -> None:
    wanted = planning.plan(pico.olmoe(), {"target_modules": [Q]}, ["model.norm", "**.mlp.gate.weight"])
    assert wanted.lora_modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    assert wanted.modules == ("model.norm",)
    assert wanted.parameters == ("model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight")
    assert wanted.full_count == 32 + 2 * 8 * 32
    assert ("lora", "model.layers.1.self_attn.q_proj") in wanted.expected()
    assert ("LoRA", Q, "2") in wanted.rows()


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    wanted = planning.plan(pico.llama(), {"target_modules": "all-linear"}, [])
    assert len(wanted.lora_modules) == 2 * 7
    assert "lm_head" not in wanted.lora_modules


def test_lists_of_modules_become_their_members() -> None:
    wanted = planning.plan(pico.llama(), None, ["model.layers"])
    assert wanted.modules == ("model.layers.0", "model.layers.1")


def test_excluded_modules_are_left_out() -> None:
    lora = {"target_modules": [Q], "exclude_modules": ["model.layers.0.**"]}
    assert planning.plan(pico.olmoe(), lora, []).lora_modules == ("model.layers.1.self_attn.q_proj",)


def test_all_faults_are_named_at_once() -> None:
    text = message(
        pico.olmoe(),
        {
            "r": 4,
            "alpha": 8,
            "bias": "all",
            "modules_to_save": ["x"],
            "target_modules": ["q_proj", "model.layers.*.mlp"],
        },
        ["no.such.module"],
    )
    assert "'alpha' is no field of peft's LoraConfig" in text
    assert "leave out 'bias'; name the biases in `train`" in text
    assert "leave out 'modules_to_save'; name the modules in `train`" in text
    assert "names are full here: write **.q_proj to hit it everywhere" in text
    assert "model.layers.0.mlp is a OlmoeSparseMoeBlock, which has no low-rank update" in text
    assert "train: 'no.such.module' hits nothing" in text


@pytest.mark.parametrize(
    ("lora", "train", "words"),
    [
        (None, [], "nothing would be trained"),
        ({"r": 4}, [], "give `target_modules`, or leave `lora` out"),
        (
            {"target_modules": [Q]},
            ["model.layers.0"],
            "q_proj lies in model.layers.0, which is trained in full already",
        ),
        (None, ["model.layers.0", "model.layers.0.mlp"], "model.layers.0.mlp lies in model.layers.0"),
        ({"target_modules": [Q]}, ["model.layers.0.self_attn.q_proj"], "which is trained in full already"),
        ({"target_modules": [Q]}, ["model.layers.0.self_attn.q_proj.weight"], "gets a low-rank update of its weight"),
        ({"target_parameters": ["model.norm.weight"]}, [], "has 1 dimensions; target_parameters takes 2 or 3"),
        (None, ["model.rotary_emb"], "has no parameters"),
    ],
)
def test_declarations_that_contradict_are_refused(lora: dict[str, object] | None, train: list[str], words: str) -> None:
    assert words in message(pico.olmoe(), lora, train)


def test_a_tied_parameter_cannot_be_trained_alone() -> None:
    assert "lm_head.weight is tied to model.embed_tokens.weight" in message(
        pico.llama(tie_word_embeddings=True), None, ["lm_head.weight"]
    )


def test_what_peft_did_is_compared_by_name(wrapped_artifact: Path) -> None:
    model = solidify.load(wrapped_artifact)
    wanted = planning.plan(model, {"target_modules": [Q]}, ["**.o_proj.scale"])
    peft_model = solidify.attach(model, lora={"r": 2, "target_modules": [Q]}, train=["**.o_proj.scale"])
    assert planning.compare(peft_model, wanted) == []
    stray = next(p for k, n, p in standing.named_parameters(peft_model) if n == "model.norm.weight")
    stray.requires_grad_(True)
    peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default").requires_grad_(False)
    peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default").requires_grad_(False)
    faults = planning.compare(peft_model, wanted)
    assert faults == [
        "not trainable, but declared: LoRA on model.layers.0.self_attn.q_proj",
        "trainable, but not declared: the base parameter model.norm.weight",
    ]
