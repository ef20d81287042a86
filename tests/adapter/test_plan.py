from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch

import solidify
from solidify.adapter import lookup
from solidify.adapter import plan as planning
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
    assert "'alpha' is not a field of peft's LoraConfig" in text
    assert "leave out 'bias'; name the biases in `train`" in text
    assert "leave out 'modules_to_save'; name the modules in `train`" in text
    assert "patterns match full names: write **.q_proj to hit it everywhere" in text
    assert "model.layers.0.mlp (OlmoeSparseMoeBlock) cannot get a low-rank update" in text
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
    stray = next(p for k, n, p in lookup.named_parameters(peft_model) if n == "model.norm.weight")
    stray.requires_grad_(True)
    peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default").requires_grad_(False)
    peft_model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default").requires_grad_(False)
    faults = planning.compare(peft_model, wanted)
    assert faults == [
        "not trainable, but declared: LoRA on model.layers.0.self_attn.q_proj",
        "trainable, but not declared: the base parameter model.norm.weight",
    ]


TIES: dict[str, tuple[dict[str, object] | None, list[str], str]] = {
    "lora on the input": ({"target_modules": ["model.embed_tokens"]}, [], "model.embed_tokens is tied to lm_head"),
    "lora on the output": ({"target_modules": ["lm_head"]}, [], "name all of lm_head, model.embed_tokens in target"),
    "the output in full": (None, ["lm_head"], "name only model.embed_tokens, and it is trained for all"),
    "both in full": (None, ["lm_head", "model.embed_tokens"], "name only model.embed_tokens"),
    "one each": ({"target_modules": ["model.embed_tokens"]}, ["lm_head"], "declare one of the two ways for it"),
}


@pytest.mark.parametrize("case", TIES)
def test_a_tie_is_named_with_the_way_out(case: str) -> None:
    lora, train, words = TIES[case]
    model = pico.llama(tie_word_embeddings=True)
    assert words in message(model, lora, train)
    with pytest.raises(AdapterError, match="tied"):
        solidify.attach(model, lora=lora, train=train)
    planning.plan(pico.llama(), lora, train)  # the same declaration of a model without the tie


@pytest.mark.parametrize(
    ("lora", "train"),
    [
        ({"target_modules": ["lm_head", "model.embed_tokens"]}, []),
        ({"target_modules": ["model.embed_tokens"], "ensure_weight_tying": False}, []),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": False}, []),
        (None, ["model.embed_tokens"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_the_ways_out_of_a_tie_work(lora: dict[str, object] | None, train: list[str]) -> None:
    model = solidify.attach(pico.llama(tie_word_embeddings=True), lora=lora, train=train)
    trained = {lookup.canonical(model, name) for name, p in model.named_parameters() if p.requires_grad}
    asked = [*((lora or {}).get("target_modules", [])), *train]  # type: ignore[misc]
    assert trained and all(any(name.startswith(word) for word in asked) for name in trained), trained


def test_ranks_are_given_by_our_patterns_and_exact_names() -> None:
    declared = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["**.q_proj", "**.v_proj", "**.mlp.*_proj"],
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 16, "**.v_proj": 2},
        "alpha_pattern": {"**.mlp.up_proj": 32, "model.layers.1.**": 32},
    }
    model = solidify.attach(pico.llama(), lora=declared)
    ranks, scales = {}, {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            name = lookup.canonical(model, path)
            ranks[name], scales[name] = module.r["default"], module.scaling["default"]
    assert ranks["model.layers.0.self_attn.q_proj"] == 16
    assert ranks["model.layers.1.self_attn.q_proj"] == 4
    assert {rank for name, rank in ranks.items() if name.endswith("v_proj")} == {2}
    assert {scales[n] for n in scales if n.endswith("0.mlp.down_proj")} == {2.0}
    assert {scales[n] for n in scales if n.endswith(("mlp.up_proj", "1.mlp.down_proj"))} == {8.0}


def test_a_rank_pattern_is_no_ending_of_a_longer_name() -> None:
    nested = torch.nn.Sequential()
    nested.add_module("lin", torch.nn.Linear(4, 4))
    nested.add_module("outer", torch.nn.Sequential())
    nested.outer.add_module("lin", torch.nn.Linear(4, 4))
    model = solidify.attach(nested, lora={"r": 2, "target_modules": ["lin", "outer.lin"], "rank_pattern": {"lin": 3}})
    found = {lookup.canonical(model, p): m.r["default"] for p, m in model.named_modules() if hasattr(m, "lora_A")}
    assert found == {"lin": 3, "outer.lin": 2}


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_hit_no_target_or_contradict_are_refused(field: str) -> None:
    lora = {
        "target_modules": ["**.q_proj"],
        field: {"**.k_proj": 3, "q_proj": 3, "**.q_proj": 5, "model.layers.0.**": 6, ".*q_proj": 4},
    }
    text = message(pico.llama(), lora)
    for key in ("**.k_proj", "q_proj", ".*q_proj"):
        assert f"{field}: {key!r} hits none of the targets" in text
    assert f"{field}: model.layers.0.self_attn.q_proj gets 5 by '**.q_proj' and 6 by 'model.layers.0.**'" in text
    assert field in message(pico.llama(), {"target_modules": [Q], field: {"model.**": -1}})
    assert f"{field} must be a mapping" in message(pico.llama(), {"target_modules": [Q], field: ["q_proj"]})


def test_experts_get_ranks_by_pattern() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    lora = {"r": 2, "target_parameters": ["**.experts.down_proj"], "rank_pattern": {"model.layers.0.**": 5}}
    model = solidify.attach(pico.olmoe(), lora=lora)
    ranks = {lookup.canonical(model, p): m.r["default"] for p, m in model.named_modules() if hasattr(m, "lora_A")}
    assert ranks == {name.rpartition(".")[0]: 5, "model.layers.1.mlp.experts": 2}


def test_every_field_of_peft_that_names_modules_is_known() -> None:
    """A field that a newer PEFT adds is looked at: does it name modules, adapters, or neither?"""
    from dataclasses import fields

    from peft import LoraConfig

    ours = {
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "trainable_token_indices",
        *planning.patterns.FIELDS,
    }
    refused = {*planning._ELSEWHERE, "layer_replication"}
    nothing = {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora", "init_lora_weights"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "alora_invocation_tokens"),
        *("use_qalora", "qalora_group_size", "runtime_config", "lora_bias", "ensure_weight_tying", "velora_config"),
        *("use_bdlora", "monteclora_config", "kasa_config", "megatron_config", "megatron_core", "arrow_config"),
    }
    assert {f.name for f in fields(LoraConfig)} == ours | refused | nothing


def test_a_parameter_among_modules_is_told_where_it_belongs() -> None:
    for pattern in ("experts.gate_up_proj", "**.experts.gate_up_proj"):
        with pytest.raises(AdapterError, match=r"write \*\*\.experts\.gate_up_proj under `target_parameters`"):
            solidify.attach(pico.olmoe(), lora={"r": 2, "target_modules": [pattern]})
