"""Every rule of the servers' transformers backends, seen met and not met, on real models and artifacts."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from words import tokenizer

import solidify
from solidify.artifact import loading
from solidify.checks import served_call, serving
from solidify.directory import manifest
from solidify.findings import Finding

served: Any = import_module("served")  # tests/support/user_modules, which pico puts on the path

MLP, ATTENTION = "model.layers.*.mlp", "model.layers.*.self_attn"
AUTO_MAP = {"AutoConfig": "c.C", "AutoModel": "m.M", "AutoModelForCausalLM": "m.MForCausalLM"}
VLLM, SGLANG = "rules of vLLM", "rules of SGLang"


def judge(model: PreTrainedModel, *changes: tuple[Any, ...], auto_map: dict[str, str] = AUTO_MAP) -> dict[str, Finding]:
    """Changes a model and returns what the rules say of it."""
    edits = []
    for target, module, *arguments in changes:
        # What a server would do wrong is planted here, also where surgery alone would refuse it.
        meant = dict.fromkeys(("cache", "padding", "hidden_states"), False)
        edits += solidify.replace(model, target, module, arguments=dict(*arguments), declares=meant)
    records = [edit.document() for edit in edits]
    return named(serving.findings(model, records, auto_map))


def named(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name.removeprefix("serving: "): finding for finding in found}


def met(finding: Finding) -> bool:
    """Returns whether a rule is met. None may count as a proof or as a failure: no server was run."""
    assert finding.passed is None
    assert "not run" in finding.evidence
    return finding.evidence.startswith(("met;", "rule, met;"))


def broken(found: dict[str, Finding]) -> set[str]:
    """Returns the rules that are not met."""
    return {name for name, finding in found.items() if not met(finding)} - {VLLM, SGLANG, SIZE}


SIZE = "size of heads on CPUs"  # pico models have small ones
KERNEL = "experts are gated by silu"
INTERFACE = "attention goes through ALL_ATTENTION_FUNCTIONS"
KEYWORDS = "keyword arguments reach the attention"
PLAN, STAGES = "tensor parallel plan", "pipeline parallel plan"


def test_a_llama_with_another_attention_by_the_interface_meets_every_rule() -> None:
    found = judge(pico.llama(), (ATTENTION, served.InterfaceAttention))
    assert broken(found) == set()
    assert "in 2 modules, each with its layer_idx" in found[INTERFACE].evidence
    assert met(found[VLLM])
    assert "vllm serve" in found[VLLM].evidence
    assert met(found[SGLANG])


def test_a_llama_with_a_new_norm_may_even_be_split() -> None:
    found = judge(pico.llama(), ("model.norm", pico.wrappers.Scaled))
    assert broken(found) == set()
    assert found[STAGES].evidence == "rule, met; not run: model.layers is split"


BROKEN: dict[str, tuple[tuple[Any, ...], dict[str, str]]] = {
    "attention of its own": (
        ("model.layers.0.self_attn", served.OwnAttention),
        {INTERFACE: "model.layers.0.self_attn mixes positions by itself"},
    ),
    "keyword arguments kept": (
        (ATTENTION, served.DeafAttention),
        {KEYWORDS: "model.layers.*.self_attn (2 times) does not pass them on"},
    ),
    "keyword arguments refused": (
        (ATTENTION, served.ClosedAttention),
        {
            KEYWORDS: "model refuses attention_instances (TypeError: ClosedAttention.forward() got an unexpected",
            INTERFACE: "not known, because the call fails",
        },
    ),
    "an error of its own": (
        (ATTENTION, served.ChoosyAttention),
        {
            KEYWORDS: "model fails when it is called as the servers do (UnknownKernelError: no kernel called ",
            INTERFACE: "not known, because the call fails",
        },
    ),
    "attention without a number": (
        (ATTENTION, served.NumberlessAttention),
        {INTERFACE: "model.layers.0.self_attn has layer_idx None, but num_hidden_layers is 2"},
    ),
    "a look at the token before": (
        (MLP, served.Shift),
        {INTERFACE: "model.layers.*.mlp (2 times) mixes positions by itself"},
    ),
    "is_causal False in a causal model": (
        ("model.layers.1.mlp", served.Misnamed),
        {"is_causal tells encoders": "model.layers.1.mlp has it False, but the model is causal"},
    ),
    "a changed head": (
        ("lm_head", pico.wrappers.Bottleneck),
        {"changes lie in the base model": "lm_head belongs to the head, which the servers build themselves"},
    ),
    "a tensor of two names": (
        ("model.layers.1.mlp", served.Twice),
        {
            "ties are those of the configuration": "model.layers.1.mlp.original.gate_proj.weight and "
            "model.layers.1.mlp.again.gate_proj.weight are one tensor"
        },
    ),
    "a second list of layers": (
        ("model.norm", served.Norms),
        {STAGES: "exactly one ModuleList to split, but there are: layers, norm"},
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_rule_is_named_with_the_place(fault: str) -> None:
    change, expected = BROKEN[fault]
    found = judge(pico.llama(), change)
    assert broken(found) - {PLAN} == set(expected)
    for rule, words in expected.items():
        assert words in found[rule].evidence
    needed = set(expected) - {STAGES}
    assert met(found[VLLM]) == (not needed)
    assert all(rule in found[VLLM].evidence for rule in expected)


EXPERTS: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "a list that is called": (served.PooledMoE, {}, None),
    "another name": (served.PooledMoE, {"name": "pool"}, "mlp.pool holds 8 experts, but is not called `experts`"),
    "another number": (served.PooledMoE, {"number": 9}, "mlp.experts holds 9 experts, but the configuration says 8"),
    "a call by keywords": (served.KeywordMoE, {}, "mlp.experts is called with 1 positional arguments"),
    "a loop over the list": (served.LoopingMoE, {}, "mlp.experts is never called as a module"),
    "a flat matrix": (
        served.FlatMoE,
        {},
        "is not a ModuleList and its weight is not stacked by expert; model.layers.0",
    ),
    "a wrapper": (pico.wrappers.Scaled, {}, None),
    "no experts any more": (pico.wrappers.RouterlessMoE, {}, None),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_are_such_as_the_servers_replace(case: str) -> None:
    module, arguments, fault = EXPERTS[case]
    found = judge(pico.olmoe(), ("model.layers.0.mlp", module, arguments))
    assert met(found["experts"]) == (fault is None)
    assert (fault or "blocks hold `experts` as the servers replace them") in found["experts"].evidence
    own = module in (served.PooledMoE, served.KeywordMoE, served.LoopingMoE) and arguments.get("name") is None
    assert met(found[KERNEL]) != own
    assert met(found[VLLM]) == (fault is None and not own)


def test_the_plan_knows_replaced_layers_and_styles_that_the_servers_lack() -> None:
    evidence = judge(pico.olmoe(), (f"{ATTENTION}.o_proj", pico.wrappers.Bottleneck))[PLAN].evidence
    assert "model.layers.*.self_attn.o_proj (2 times) is in the plan, but was replaced" in evidence
    assert "q_proj, layers.*.self_attn.k_proj, layers.*.self_attn.v_proj are planned as colwise_gather" in evidence
    found = judge(pico.make("GPT2LMHeadModel", **SMALL_GPT2), ("transformer.h.0.mlp", pico.wrappers.Scaled))
    assert "the configuration has no base_model_tp_plan" in found[PLAN].evidence


def test_layers_that_came_and_went_are_served() -> None:
    model = pico.llama(num_hidden_layers=4)
    edits = solidify.replace(model, f"{ATTENTION}.o_proj", pico.wrappers.Bottleneck)
    edits += solidify.insert(model, "model.layers.0", zero=["self_attn.o_proj", "mlp.down_proj"])
    edits += solidify.remove(model, "model.layers.2")
    found = named(serving.findings(model, [edit.document() for edit in edits], AUTO_MAP))
    assert broken(found) == {PLAN}
    assert "model.layers.*.self_attn.o_proj (4 times) is in the plan, but was replaced." in found[PLAN].evidence
    assert "in 4 modules, each with its layer_idx" in found[INTERFACE].evidence


def test_a_shared_module_and_an_added_one_are_not_served() -> None:
    model = pico.llama()
    edits = solidify.share(model, MLP, pico.wrappers.PlainMLP)
    edits += solidify.add(model, "model.value", pico.wrappers.PlainMLP, reads="model.norm")
    found = named(serving.findings(model, [edit.document() for edit in edits], AUTO_MAP))
    ties, base = "ties are those of the configuration", "changes lie in the base model"
    assert broken(found) == {PLAN, ties, base}
    assert "model.layers.*.mlp.up.weight (2 names) are one tensor" in found[ties].evidence
    assert "model.value adds to the outputs, of which the servers read the hidden states only" in found[base].evidence


def test_without_a_plan_only_vllm_can_split_the_layers() -> None:
    found = judge(pico.olmoe(), ("model.norm", pico.wrappers.Scaled))
    assert "vLLM infers the split" in found[STAGES].evidence
    assert STAGES not in found[VLLM].evidence
    assert STAGES in found[SGLANG].evidence


SMALL_GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
SMALL_BERT = {**pico.SIZES, "intermediate_size": 48, "max_position_embeddings": 64}


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_counts_only_as_the_configuration_has_it(tied: bool) -> None:
    model = pico.llama(tie_word_embeddings=True)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    finding = judge(model, ("model.norm", pico.wrappers.Scaled))["ties are those of the configuration"]
    assert met(finding) == tied
    assert ("the head to the embeddings" if tied else "but they are two tensors") in finding.evidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_for_vllm_alone(dtype: torch.dtype) -> None:
    model = pico.make("BertForMaskedLM", dtype=dtype, **SMALL_BERT)
    found = judge(model, ("bert.encoder.layer.0.output", pico.wrappers.Scaled))
    assert met(found["is_causal tells encoders"])
    assert met(found[VLLM])
    assert "it is an encoder" in found["architecture for SGLang"].evidence
    assert not met(found[SGLANG])
    model.bert.encoder.layer[1].attention.self.is_causal = True
    assert "attention.self does not have it False" in judge(model)["is_causal tells encoders"].evidence


NEITHER = {
    "T5ForConditionalGeneration": (
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4},
        "it is an encoder-decoder",
    ),
    "ViTForImageClassification": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "image_size": 16,
        },
        "it takes pixel_values, not tokens",
    ),
}


@pytest.mark.parametrize("name", NEITHER)
def test_what_is_no_language_model_is_for_neither(name: str) -> None:
    settings, words = NEITHER[name]
    found = judge(pico.make(name, **settings))
    assert words in found["architecture"].evidence
    assert not met(found[VLLM])
    assert not met(found[SGLANG])


def test_a_family_without_the_interface_is_told_so() -> None:
    settings = {"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    found = judge(pico.make("BloomForCausalLM", **settings), ("transformer.h.0.mlp", pico.wrappers.Scaled))
    assert {"_supports_attention_backend", INTERFACE} <= broken(found)
    assert "transformer.h.*.self_attention (2 times) mixes positions by itself" in found[INTERFACE].evidence


def test_an_artifact_that_offers_no_backbone_is_for_neither() -> None:
    heads = {key: value for key, value in AUTO_MAP.items() if key != "AutoModel"}
    found = judge(pico.llama(), ("model.norm", pico.wrappers.Scaled), auto_map=heads)
    assert broken(found) == {"auto_map names AutoModel"}


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_a_position_that_becomes_no_number_has_moved(value: float, kept: bool) -> None:
    """Also where it was of no size before, as in a mask; what stays what it was has not moved."""
    before = torch.arange(15.0).view(1, 5, 3)
    before[0, 2, 0] = value
    after = before.clone()
    if not kept:
        after[0, 1, 1] = torch.nan
    assert served_call._has_moved(before, after, [0, 1, 2, 3]) is not kept


class Shifting(nn.Module):
    """Mixes positions by itself, beside activations that are a thousand times as large: one position's, or all's."""

    def __init__(self, original: nn.Module, step: int, where: slice, *, mixing: float = 0.05) -> None:
        super().__init__()
        self.original, self.step, self.where, self.mixing = original, step, where, mixing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.original(x) + self.mixing * x.roll(self.step, dims=1)
        found[:, self.where, 3] += 2500
        return found


@pytest.mark.parametrize("where", [slice(0, 1), slice(None)], ids=["first position", "all positions"])
@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("mixing", [0.05, 0.0])
def test_mixing_is_seen_beside_massive_activations(step: int, where: slice, mixing: float) -> None:
    model = pico.llama()
    mlps = [layer.mlp for layer in model.model.layers]
    model.model.layers[0].mlp = Shifting(mlps[0], step, where, mixing=mixing)
    seen = served_call.observe(model.model)
    assert seen.mixers == (["layers.0.mlp"] if mixing else [])
    if not mixing:
        assert seen.causal


def test_looking_changes_nothing() -> None:
    model = pico.olmoe().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    served_call.observe(model.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_check_says_of_an_artifact_what_serves_it(trash_artifact: Path) -> None:
    report = solidify.check(trash_artifact)
    found = {finding.name: finding for finding in report.findings}
    assert report.passed
    assert not met(found["serving: tensor parallel plan"])  # and no failure
    assert met(found[VLLM])
    assert "2 blocks hold `experts` as the servers replace them" in found["serving: experts"].evidence
    assert "modeling_solid_olmoe.SolidOlmoeModel" in found["serving: auto_map names AutoModel"].evidence
    assert met(found["serving: no hint for loading names a tensor"])


def test_an_artifact_that_cannot_be_served_is_told_why(tmp_path: Path) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.self_attn", served.OwnAttention)
    edits += solidify.replace(model, "model.layers.1.mlp", served.PooledMoE, arguments={"name": "pool"})
    directory = pico.artifact(model, edits, tmp_path / "artifact")
    found = {finding.name: finding for finding in serving.serving(directory, manifest.read(directory))}
    assert found[VLLM].evidence == f"not met; not run: {INTERFACE}, experts"


def test_an_artifact_that_this_process_cannot_load_is_not_judged(
    wrapped_artifact: Path, copy_of: Callable[[Path], Path]
) -> None:
    directory = copy_of(wrapped_artifact)
    record = manifest.read(directory)
    (directory / "wrappers.py").write_text("")
    found = serving.serving(directory, record)
    assert [finding.passed for finding in found] == [None, None]
    assert "not known; not run: " in found[0].evidence


def test_one_model_is_loaded_for_the_tokenizer_and_the_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama()
    edits = solidify.replace(model, MLP, pico.wrappers.Scaled)
    directory = pico.artifact(model, edits, tmp_path / "artifact", tokenizer=tokenizer())
    loaded: list[Path] = []
    load = loading._load_model

    def noted(directory: Path, *given: Any) -> PreTrainedModel:
        loaded.append(directory)
        return load(directory, *given)

    monkeypatch.setattr(loading, "_load_model", noted)
    names = {finding.name for finding in solidify.check(directory).findings}
    assert loaded == [directory.resolve()]
    assert {"tokenizer: every id has an embedding", VLLM, SGLANG} <= names
