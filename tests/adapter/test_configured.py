"""Adapters of others, with whatever is in their configuration and in their tensors: used rightly, or one sentence."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import solidify
from solidify.adapter import expert_files
from solidify.errors import AdapterError, SolidifyError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters of these kinds
WEIGHTS = "adapter_model.safetensors"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "experts": {"target_modules": [], "target_parameters": EXPERTS},
    "in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "mlp.gate"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    pico.olmoe().save_pretrained(directory)
    return directory


def adapter(directory: Path, **settings: Any) -> Path:
    torch.manual_seed(3)
    model = get_peft_model(pico.olmoe(), LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    return directory


def said(directory: Path, base: Path) -> str:
    """What merge says, in one SolidifyError and nothing else."""
    with pytest.raises(SolidifyError) as caught:
        solidify.merge(directory, beside(directory), base=base)
    assert not beside(directory).exists()
    return str(caught.value)


def beside(directory: Path) -> Path:
    return directory.with_name(f"{directory.name} merged")


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_other_kinds_are_named_whatever_else_is_wrong(tmp_path: Path, base: Path, kind: str) -> None:
    """By the smallest file there is, and by what PEFT writes; no weights are asked for first."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": 5}))
    assert f"an adapter of the kind {kind} is not supported" in said(tmp_path, base)
    assert kind in {known.value for known in PEFT_TYPE_TO_CONFIG_MAPPING}


TEXTS: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "adapter_config.json is not the JSON that it should be: Expecting property name"),
    "not UTF-8": (b"\xff\xfe{}", "is not text in UTF-8: the byte at offset 0 is not valid"),
    "a list": (b"[]", "holds list, and not an object with fields"),
    "empty": (b"{}", "does not name its kind (`peft_type`)"),
    "deep": (b"[" * 200_000, "is nested too deeply"),
    "no kind of PEFT's": (b'{"peft_type": "LARO"}', "peft_type 'LARO' is not a kind of PEFT"),
    "a number for a kind": (b'{"peft_type": 7}', "peft_type '7' is not a kind of PEFT"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_no_configuration_are_told(tmp_path: Path, base: Path, name: str) -> None:
    content, words = TEXTS[name]
    (tmp_path / "adapter_config.json").write_bytes(content)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert words in said(tmp_path, base)


FIELDS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"r": 0}, "r must be a whole number of at least 1, not 0"),
    ({"r": "8"}, "r must be a whole number of at least 1, not '8'"),
    ({"r": None}, ""),
    ({"lora_alpha": "x"}, "lora_alpha must be a finite number"),
    ({"lora_alpha": 0}, "lora_alpha must be a finite number other than 0"),
    ({"target_modules": {"q_proj": 1}}, "target_modules must be a name or a list of names"),
    ({"target_modules": ["no_such"]}, "PEFT cannot put the adapter on its base: "),
    ({"rank_pattern": [1]}, "rank_pattern must be a mapping"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be a mapping of names to whole numbers"),
    (
        {"rank_pattern": {"([": 4}},
        "its rank_pattern holds '([', and solidify runs no regular expression that comes from a file",
    ),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must be a mapping"),
    ({"task_type": "WRONG"}, "PEFT does not accept its adapter_config.json: ValueError: Invalid task type"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
    ({"kasa_config": {"beta": 1}}, "kasa_config is not supported: it removes singular values"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
    ({"layer_replication": [[0, 1]]}, "layer_replication is not supported"),
    ({"trainable_token_indices": ["<a>"]}, "trainable_token_indices must list ids"),
    ({"sharpness": 3}, "says sharpness=3, which the installed PEFT does not know"),
    ({"lora_B_layout": "by_rank"}, "its experts are in the order of another trainer (lora_B_layout: 'by_rank')"),
    ({"is_3d_lora_weight": 2}, "its experts are in the order of another trainer (is_3d_lora_weight: 2)"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a string"),
)


@pytest.mark.parametrize(("changes", "words"), FIELDS)
def test_odd_fields_are_told(tmp_path: Path, base: Path, changes: dict[str, Any], words: str) -> None:
    configure(adapter(tmp_path, **KINDS["LoRA"]), **changes)
    assert words in said(tmp_path, base)


def test_what_changes_nothing_is_no_fault(tmp_path: Path, base: Path) -> None:
    """Fields of a later PEFT that are switched off, and a mark of PEFT's own layout; EVA's start is over."""
    configure(adapter(tmp_path, **KINDS["experts"]), lora_B_layout="rank_major", use_novelty=False, novelty_config=None)
    configure(tmp_path, init_lora_weights="eva")
    assert all(finding.passed for finding in solidify.merge(tmp_path, beside(tmp_path), base=base).findings)


def test_a_mark_in_the_header_of_the_weights_is_seen(tmp_path: Path, base: Path) -> None:
    state = load_file(adapter(tmp_path, **KINDS["experts"]) / WEIGHTS)
    save_file(state, tmp_path / WEIGHTS, {"format": "pt", "lora_B_layout": "by_rank"})
    assert "in the order of another trainer (lora_B_layout in the header of the weights: 'by_rank')" in said(
        tmp_path, base
    )


def test_experts_one_by_one_must_all_be_there(tmp_path: Path, base: Path) -> None:
    state = load_file(adapter(tmp_path, **KINDS["LoRA"]) / WEIGHTS)
    key = "base_model.model.model.layers.0.mlp.experts.3.down_proj.lora_A.weight"
    save_file({**state, key: torch.zeros(4, 16)}, tmp_path / WEIGHTS, {"format": "pt"})
    words = "mlp.experts has 8 experts, and of their down projections the adapter has no lora_A (15 tensors"
    assert words in said(tmp_path, base)


State = dict[str, torch.Tensor]


def _first(state: State, part: str) -> str:
    return next((key for key in sorted(state) if part in key), sorted(state)[0])


def _put(state: State, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> State:
    key = _first(state, part)
    return {**state, key: change(state[key]).contiguous()}


def _renamed(state: State, by: Callable[[str], str]) -> State:
    return {by(key): tensor for key, tensor in state.items()}


# Faults of tensors, and words of which one must be said.
TENSORS: dict[str, tuple[Callable[[State], State], tuple[str, ...]]] = {
    "one is gone": (lambda s: {k: t for k, t in s.items() if k != _first(s, "lora_")}, ("the file lacks",)),
    "the last is gone": (lambda s: {k: t for k, t in s.items() if k != sorted(s)[-1]}, ("the file lacks",)),
    "all are gone": (lambda s: {}, ("the file lacks",)),
    "one more": (lambda s: {**s, "more": torch.zeros(2)}, ("which the model does not have",)),
    "another layer": (
        lambda s: _renamed(s, lambda k: k.replace("layers.1.", "layers.9.").replace("embed_tokens", "x")),
        ("which the model does not have",),
    ),
    "no prefix": (
        lambda s: _renamed(s, lambda k: k.removeprefix("base_model.model.")),
        ("which the model does not have",),
    ),
    "a name in it": (
        lambda s: _renamed(s, lambda k: k.replace(".weight", ".default.weight") + "x"),
        ("which the model does not have",),
    ),
    "too wide": (lambda s: _put(s, "lora_", lambda t: torch.cat([t, t], 1)), ("has shape",)),
    "turned": (lambda s: _put(s, "lora_", lambda t: t[None].mT), ("has shape",)),
    "flat": (lambda s: _put(s, "lora_", lambda t: t.flatten()), ("has shape",)),
    "no elements": (lambda s: _put(s, "lora_", lambda t: t[:0]), ("has shape",)),
    "another rank": (lambda s: _put(s, "lora_", lambda t: torch.cat([t, t])), ("has shape",)),
    "not a number": (lambda s: _put(s, "lora_", lambda t: t * float("nan")), ("holds NaN or infinity",)),
    "infinity": (lambda s: _put(s, "", lambda t: t + float("inf")), ("holds NaN or infinity",)),
    "too large": (lambda s: {key: 1e25 * t if "lora_" in key else t for key, t in s.items()}, ("NaN or infinity",)),
    "whole numbers": (lambda s: _put(s, "lora_", lambda t: t.to(torch.int64)), ("is int64 in the file",)),
    "truth values": (lambda s: _put(s, "lora_", lambda t: t > 0), ("is bool in the file",)),
    "complex": (
        lambda s: _put(s, "lora_", lambda t: t.to(torch.complex64)),
        ("is complex64 in the file", "cannot be read as safetensors"),
    ),
}


@pytest.mark.parametrize(("kind", "fault"), list(itertools.product(KINDS, TENSORS)))
def test_tensors_that_do_not_fit_are_told(tmp_path: Path, base: Path, kind: str, fault: str) -> None:
    change, words = TENSORS[fault]
    save_file(change(load_file(adapter(tmp_path, **KINDS[kind]) / WEIGHTS)), tmp_path / WEIGHTS, {"format": "pt"})
    message = said(tmp_path, base)
    assert any(word in message for word in words), message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_of_other_widths_are_merged_rightly(tmp_path: Path, base: Path, kind: str, dtype: torch.dtype) -> None:
    state = load_file(adapter(tmp_path, **KINDS[kind]) / WEIGHTS)
    save_file({key: tensor.to(dtype) for key, tensor in state.items()}, tmp_path / WEIGHTS, {"format": "pt"})
    findings = solidify.merge(tmp_path, beside(tmp_path), base=base).findings
    assert all(finding.passed for finding in findings if finding.name != expert_files.FINDING)


@pytest.mark.parametrize("kind", KINDS)
def test_another_base_is_refused(tmp_path: Path, kind: str) -> None:
    """As far as names and shapes tell: nothing else of a plain adapter says what it was trained on."""
    pico.llama(hidden_size=16, num_attention_heads=2, num_key_value_heads=2).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError):
        solidify.merge(adapter(tmp_path / "adapter", **KINDS[kind]), tmp_path / "out", base=tmp_path / "other")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_torn_file_is_refused(tmp_path: Path, base: Path, length: int) -> None:
    content = (adapter(tmp_path, **KINDS["LoRA"]) / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:length])
    assert "cannot be read as safetensors" in said(tmp_path, base)


SLOW = "(((\\w*)*)*)*!"  # of a stranger: no name of a module is matched in an hour
EXPRESSIONS: dict[str, dict[str, Any]] = {
    "rank_pattern": {"rank_pattern": {SLOW: 4}},
    "alpha_pattern": {"alpha_pattern": {SLOW: 4}},
    "modules_to_save": {"modules_to_save": [SLOW]},
    "layers_pattern": {"layers_pattern": SLOW, "layers_to_transform": [0]},
    "too many parts left open": {"rank_pattern": {".*a.*b.*c": 4}},
    "too many keys": {"rank_pattern": {f"q_proj{n}": 4 for n in range(2**12 + 1)}},
    "too many open keys": {"alpha_pattern": {f".*q{n}_proj": 4 for n in range(9)}},
    "too many layers_pattern": {"layers_pattern": [f"layers{n}" for n in range(9)], "layers_to_transform": [0]},
    "a list of layers_pattern": {"layers_pattern": ["layers", SLOW], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("field", EXPRESSIONS)
def test_no_regular_expression_of_a_file_is_run(tmp_path: Path, base: Path, field: str) -> None:
    adapter(tmp_path / "adapter", target_modules=["q_proj"])
    configure(tmp_path / "adapter", **EXPRESSIONS[field])
    told = said(tmp_path / "adapter", base)
    assert (
        "no regular expression that comes from a file" in told
        or "each of which PEFT compares with every module" in told
    )


@pytest.mark.parametrize("ranks", [{"r": 10**9}, {"rank_pattern": {"q_proj": 10**7}}, {"r": 10**30}], ids=str)
def test_no_room_is_made_for_a_rank_that_no_tensor_has(tmp_path: Path, base: Path, ranks: dict[str, Any]) -> None:
    """It would take all memory of the machine."""
    adapter(tmp_path / "adapter", target_modules=["q_proj"])
    configure(tmp_path / "adapter", **ranks)
    assert "no tensor of adapter_model.safetensors has more than" in said(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*_proj", "exclude_modules": r".*\.o_proj"},
        {"target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.0.*"},
        {"target_modules": r".*\.q_proj", "target_parameters": EXPERTS},
        {
            "target_modules": r".*\.(q|k)_proj",
            "rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj$": 2},
            "alpha_pattern": {"k_proj": 3, "layers.1.self_attn.q_proj": 5},
        },
    ],
    ids=str,
)
@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"
)  # PEFT's, of what it wrote itself
def test_expressions_of_honest_adapters_become_names(tmp_path: Path, base: Path, settings: dict[str, Any]) -> None:
    """What PEFT found by them is what is merged; in the file a slower one of the same hits stands, and is not run."""
    directory = adapter(tmp_path / "adapter", **settings)
    found = PeftModel.from_pretrained(pico.olmoe(), directory).merge_and_unload().state_dict()
    configure(directory, **{key: SLOW for key in ("target_modules", "exclude_modules") if key in settings})
    report = solidify.merge(directory, beside(directory), base=base)
    unseen = {each.name for each in report.findings if each.verdict == "not looked at"}
    asked = [key for key in ("target_modules", "exclude_modules") if isinstance(settings.get(key), str)]
    assert {f"{key} reaches what is merged" for key in asked if settings[key] != "all-linear"} <= unseen

    plain = AutoModelForCausalLM.from_pretrained(beside(directory)).state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in found.items())
    assert any(not torch.equal(tensor, pico.olmoe().state_dict()[key]) for key, tensor in plain.items())
