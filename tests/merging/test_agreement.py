"""Merged equals attached: right merges of every kind pass, wrong ones of every kind do not, in every dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from solidify.findings import Finding
from solidify.merging import agreement, sums
from solidify.model import answers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters of these kinds

State = dict[str, torch.Tensor]
Fault = Callable[[State, State, list[str]], None]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
INPUTS = {
    "plain": {"input_ids": pico.tokens()},
    "padded": {
        "input_ids": pico.tokens(seed=1),
        "attention_mask": (torch.arange(12) < torch.tensor([[8], [12]])).long(),
    },
}


def attached(model: PreTrainedModel, *, size: float = 0.1, seed: int = 0, **lora: Any) -> PeftModel:
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, LoraConfig(**{**LORA, **lora}))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape))
    return peft_model.eval()


def judged(base: PreTrainedModel, fault: Fault | None = None, **lora: Any) -> tuple[Finding, Finding]:
    """Attaches, merges by PEFT, in memory, plants a fault, and asks: the sums, and the outputs."""
    model = attached(copy.deepcopy(base), **lora)
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    state = merged.state_dict()
    changed = [name for name, tensor in state.items() if not torch.equal(tensor, plain[name])]
    if fault is not None:
        with torch.no_grad():
            fault(state, plain, changed)
    weights = sums.effective(model, "default")
    output, expected = answers.collect(model, INPUTS), agreement.chosen(weights, changed)
    outputs = agreement.merged_equals_attached(output, merged, base, INPUTS, expected)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in base.state_dict().items())  # it is as it was
    assert not any(module._forward_hooks for module in base.modules())
    return sums.compare(weights, state, changed), outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True, "r": 16}, {"target_modules": ["embed_tokens"]}, {"size": 1e-3}, {"size": 3.0}],
    ids=["plain", "rslora", "embeddings", "small", "large"],
)
def test_right_merges_are_accepted(dtype: torch.dtype, lora: dict[str, Any]) -> None:
    for seed in range(2):
        found = judged(pico.olmoe(seed=seed, dtype=dtype), seed=seed, **lora)
        assert all(finding.passed for finding in found), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_is_accepted(dtype: torch.dtype) -> None:
    lora: dict[str, Any] = {"target_parameters": None, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}
    assert all(finding.passed for finding in judged(pico.llama(dtype=dtype), **lora))


@pytest.mark.slow
def test_right_merges_of_half_precision_experts_are_accepted_every_time() -> None:
    """By a constant, 13 of 100 were refused."""
    refused = {}
    for seed in range(100):
        found = judged(pico.olmoe(seed=seed, dtype=torch.bfloat16), seed=seed)
        if not all(finding.passed for finding in found):
            refused[seed] = found
    assert refused == {}


def one_percent(state: State, plain: State, changed: list[str]) -> None:
    for name in changed:
        state[name].copy_(plain[name].double() + 1.01 * (state[name].double() - plain[name].double()))


def a_layer_left_out(state: State, plain: State, changed: list[str]) -> None:
    state[changed[0]].copy_(plain[changed[0]])


def turned(state: State, plain: State, changed: list[str]) -> None:
    name = next(name for name in changed if state[name].ndim == 2)
    state[name].copy_(plain[name] + (state[name] - plain[name]).T)


def two_experts_swapped(state: State, plain: State, changed: list[str]) -> None:
    name = next(name for name in changed if "down_proj" in name)
    state[name][[0, 1]] = state[name][[1, 0]]


def one_update_on_another_expert(state: State, plain: State, changed: list[str]) -> None:
    name = next(name for name in changed if "gate_up_proj" in name)
    delta = state[name] - plain[name]
    state[name].copy_(plain[name] + delta[[1, 0, *range(2, len(delta))]])


FAULTS = (one_percent, a_layer_left_out, turned, two_experts_swapped, one_update_on_another_expert)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_merges_are_refused(dtype: torch.dtype, fault: Fault) -> None:
    """By the sums always; by the outputs too, where the fault is larger than roundings."""
    weights, outputs = judged(pico.olmoe(dtype=dtype), fault)
    assert weights.passed is False
    if dtype == torch.float32:
        assert outputs.passed is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.03, 0.1, 1.0])
def test_a_scale_that_is_off_by_one_percent_is_seen_under_roundings(dtype: torch.dtype, size: float) -> None:
    """Each element is within its rounding; all of them together lean along the update."""
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(256, 256, bias=False)).to(dtype), LoraConfig(r=8, target_modules=["0"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1 * size)
    expected = sums.effective(model, "default")["0.weight"]()
    update = expected.wanted - expected.without
    assert sums.fault("0.weight", sums.off_by(expected, expected.wanted.to(dtype))) == []
    rounded_twice = (expected.without + update.to(dtype).double()).to(dtype)
    assert sums.fault("0.weight", sums.off_by(expected, rounded_twice)) == []
    off = sums.off_by(expected, (expected.without + 1.01 * update).to(dtype))
    small = float(update.square().mean().sqrt() / expected.without.square().mean().sqrt()) < 0.01
    assert sums.fault("0.weight", off) or small, off


def test_not_a_number_is_refused() -> None:
    def broken(state: State, plain: State, changed: list[str]) -> None:
        state[changed[0]][0, 0] = float("nan")

    assert [finding.passed for finding in judged(pico.olmoe(), broken)] == [False, False]


class Answering(nn.Module):
    """A model with several answers, nested, whole numbers and chance among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.config = nn.Linear(4, 4), nn.Linear(4, 4), None

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        hidden = self.first(x) + torch.rand(()) + torch.nn.functional.dropout(x)
        return {
            "logits": hidden,
            "hidden_states": (x, hidden),
            "head": {"score": self.second(hidden), "class": self.second(hidden).argmax(-1)},
            "cache": object(),
            "nothing": None,
        }


def test_every_output_is_compared() -> None:
    """A head's answer that is not the attached one's, beside logits that are."""
    torch.manual_seed(0)
    model, inputs = Answering(), {"x": {"x": torch.randn(3, 4)}}
    base = answers.collect(model, inputs)
    assert set(base.tensors) == {
        "x/logits", "x/hidden_states/0", "x/hidden_states/1", "x/head/score", "x/head/class"
    }  # fmt: skip
    weight = sums.Weight(model.first.weight.detach(), model.first.weight.detach())
    weights, plain = {"first.weight": lambda: weight}, copy.deepcopy(model)
    honest = agreement.merged_equals_attached(base, model, plain, inputs, weights)
    assert honest.passed
    assert "logits, hidden_states/0, hidden_states/1, head/score, head/class" in honest.evidence
    assert "not looked at: cache (object)" in honest.evidence
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.second.weight.mul_(1.01)
    found = agreement.merged_equals_attached(base, other, plain, inputs, weights)
    assert found.passed is False
    assert "x/head/score differs by" in found.evidence
    assert "logits" not in found.evidence


def test_an_attached_model_that_answers_otherwise_is_found() -> None:
    """As a head does that an adapter trains while a frozen copy of it answers: what was merged is right."""
    torch.manual_seed(0)
    plain, inputs = Answering(), {"x": {"x": torch.randn(3, 4)}}
    trained = copy.deepcopy(plain)
    with torch.no_grad():
        trained.second.weight.add_(0.1 * torch.randn(4, 4))
    weight = sums.Weight(trained.second.weight.detach(), trained.second.weight.detach())
    weights = {"second.weight": lambda: weight}
    base = answers.collect(trained, inputs)
    assert agreement.merged_equals_attached(base, trained, copy.deepcopy(plain), inputs, weights).passed
    frozen = answers.collect(plain, inputs)
    found = agreement.merged_equals_attached(frozen, trained, copy.deepcopy(plain), inputs, weights)
    assert found.passed is False
    assert "x/head/score differs by" in found.evidence


def test_an_output_that_is_gone_is_told() -> None:
    class Fewer(Answering):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {key: value for key, value in super().forward(x).items() if key != "head"}

    model, fewer = Answering(), Fewer()
    inputs = {"x": {"x": torch.randn(3, 4)}}
    found = agreement.merged_equals_attached(answers.collect(model, inputs), fewer, model, inputs, {})
    assert found.passed is False
    assert "one returns x/head/class, x/head/score and the other does not" in found.evidence


def test_what_is_trained_in_full_is_exact() -> None:
    model = attached(pico.olmoe(), modules_to_save=["lm_head"])
    weights: Mapping[str, Any] = sums.effective(model, "default")
    right = {"lm_head.weight": weights["lm_head.weight"]().wanted}
    assert sums.compare(weights, right, ["lm_head.weight"]).passed
    assert (
        sums.compare(weights, {"lm_head.weight": right["lm_head.weight"] * (1 + 1e-6)}, ["lm_head.weight"]).passed
        is False
    )
    assert sums.compare(weights, {}, ["lm_head.weight"]).passed is False
    assert sums.compare(weights, {}, []).passed is None


@pytest.mark.parametrize(
    ("layer", "lora"),
    [
        (nn.Conv2d(8, 6, 3, stride=2, padding=1), {}),
        (nn.Conv2d(8, 6, 1), {"use_dora": True}),
        (nn.Conv1d(8, 6, 3), {"use_dora": True}),
        (nn.Conv3d(8, 6, 2), {"lora_bias": True}),
        (nn.Linear(8, 6), {"use_bdlora": {"target_modules_bd_a": ["0"], "nblocks": 2}}),
        (nn.Linear(8, 6), {"use_bdlora": {"target_modules_bd_b": ["0"], "nblocks": 2}}),
        (nn.Embedding(9, 6), {"use_dora": True}),
        (nn.Embedding(9, 6), {"init_lora_weights": "mica"}),
    ],
)
def test_the_sum_is_peft_s_for_every_kind_of_layer(layer: nn.Module, lora: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), LoraConfig(r=4, target_modules=["0"], **lora))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    weights = sums.effective(model, "default")
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True).state_dict()
    assert sums.compare(weights, merged, list(merged)).passed
    merged["0.weight"].mul_(1.001)
    assert sums.compare(weights, merged, list(merged)).passed is False
