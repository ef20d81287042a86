"""LoRA on experts by its factors: outputs and gradients are PEFT's, and nothing of the weights' size is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

import solidify
from solidify.adapter import expert_factors
from solidify.errors import AdapterError

RANK = 3
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
TIGHT = {torch.float64: 1e-12, torch.float32: 3e-5}  # of the largest number compared


def mixtral(dtype: torch.dtype) -> PreTrainedModel:
    values = {**pico.SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 5}
    return pico.make("MixtralForCausalLM", dtype=dtype, **values, num_experts_per_tok=2)


def gpt_oss(dtype: torch.dtype) -> PreTrainedModel:
    """Weights of (experts, in, out), gate and up alternating, biases, and a gate of its own."""
    values = {**pico.SIZES, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "num_local_experts": 5}
    return pico.make("GptOssForCausalLM", dtype=dtype, **values, num_experts_per_tok=2)


FAMILIES: dict[str, Callable[[torch.dtype], PreTrainedModel]] = {
    "olmoe": lambda dtype: pico.olmoe(dtype=dtype, num_experts=7, intermediate_size=20),
    "mixtral": mixtral,
    "gpt_oss": gpt_oss,
}


def adapted(family: str, dtype: torch.dtype = torch.float64, targets: list[str] = TARGETS) -> PeftModel:
    base = FAMILIES[family](dtype)
    base.set_experts_implementation("eager")  # the others take no float64
    torch.manual_seed(4)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=5, target_modules=[], target_parameters=targets))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 4)
    return model.to(dtype)


def step(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, and the gradient of everything that is trained."""
    model.zero_grad()
    logits = model(ids).logits
    logits.float().square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"logits": logits.detach(), **{name: grad.clone() for name, grad in found.items()}}


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.abs().max() > 0, name
        assert (mine[name] - expected).abs().max() <= limit * expected.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_peft_s(family: str, dtype: torch.dtype) -> None:
    model = adapted(family, dtype)
    theirs = step(model, pico.tokens())
    assert len(theirs) == 1 + 2 * 2 * 2
    assert solidify.factor_experts(model) is model
    assert_close(step(model, pico.tokens()), theirs, TIGHT[dtype])


@pytest.mark.parametrize("targets", [["experts.gate_up_proj"], ["experts.down_proj"]])
def test_one_parameter_alone(targets: list[str]) -> None:
    model = adapted("olmoe", targets=targets)
    theirs = step(model, pico.tokens())
    assert_close(step(solidify.factor_experts(model), pico.tokens()), theirs, TIGHT[torch.float64])


IMPLEMENTATIONS = ["grouped_mm", "batched_mm", "eager"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_under_autocast_as_near_as_its_roundings(family: str, dtype: torch.dtype, implementation: str) -> None:
    """Against float64: both are off by roundings of bfloat16, and ours by no more than half as much again."""
    exact = step(adapted(family), pico.tokens())
    model = adapted(family, dtype)
    model.get_base_model().set_experts_implementation(implementation)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model, pico.tokens())
        mine = step(solidify.factor_experts(model), pico.tokens())

    def distance(found: dict[str, torch.Tensor], name: str) -> float:
        return float((found[name].double() - exact[name]).norm() / exact[name].norm())

    assert all(tensor.dtype == theirs[name].dtype for name, tensor in mine.items())
    worst = {name: (distance(mine, name), distance(theirs, name)) for name in exact}
    assert all(ours < 1.5 * peft + 0.01 for ours, peft in worst.values()), worst


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_float32_stay_so_under_autocast(family: str, autocast: torch.dtype) -> None:
    """As PEFT's update of the weights and transformers' grouped products, which autocast leaves alone.

    Where the backward pass runs within autocast too (Trainer's does not), PEFT's gradients are rounded, and ours stay.
    """
    model = adapted(family, torch.float32)
    model.get_base_model().set_experts_implementation("grouped_mm")
    block = model.get_base_model().model.layers[0].mlp.experts
    chosen = torch.stack([torch.randperm(block.num_experts)[:2] for _ in range(30)])
    weights = torch.rand(30, 2)

    def run(*, within: bool = False) -> dict[str, torch.Tensor]:
        model.zero_grad()
        hidden = torch.randn(30, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with torch.autocast("cpu", autocast):
            out = block(hidden, chosen, weights)
        with torch.autocast("cpu", autocast, enabled=within):
            out.square().mean().backward()
        grads = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
        assert hidden.grad is not None
        return {"out": out.detach(), "hidden": hidden.grad, **grads}

    theirs = run()
    assert len(theirs) == 2 + 4
    solidify.factor_experts(model)
    for mine in (run(), run(within=True)):
        assert all(tensor.dtype == theirs[name].dtype == torch.float32 for name, tensor in mine.items())
        assert_close(mine, theirs, TIGHT[torch.float32])


def test_a_trained_weight_gets_its_gradient_too() -> None:
    model = adapted("olmoe")
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            parameter.requires_grad_(True)
    theirs = step(model, pico.tokens())
    assert len(theirs) == 1 + 8 + 4
    assert_close(step(solidify.factor_experts(model), pico.tokens()), theirs, TIGHT[torch.float64])


def test_recomputed_in_the_backward_pass_it_is_the_same() -> None:
    model = adapted("olmoe")
    theirs = step(model, pico.tokens())
    model = solidify.factor_experts(model)
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    mine = step(model, pico.tokens())
    assert_close(mine, theirs, TIGHT[torch.float64])
    hidden = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    block = model.get_base_model().model.layers[0].mlp
    assert torch.equal(checkpoint(block, hidden[None], use_reentrant=False), block(hidden[None]))


def test_adapters_are_switched_and_joined_as_peft_does() -> None:
    model = adapted("olmoe")
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=TARGETS))
    model.to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name:
                parameter.copy_(torch.randn(parameter.shape) / 4)
    plain = {}
    for turn in ("theirs", "mine"):
        found = {}
        for names in (["default"], ["second"], ["default", "second"]):
            model.base_model.set_adapter(names)
            found[" ".join(names)] = model(pico.tokens()).logits.detach()
        with model.disable_adapter():
            found["none"] = model(pico.tokens()).logits.detach()
        plain[turn] = found
        solidify.factor_experts(model)
    assert_close(plain["mine"], plain["theirs"], TIGHT[torch.float64])
    assert len({float(logits.sum()) for logits in plain["mine"].values()}) == 4
    model.base_model.set_adapter(["default"])
    expected = model(pico.tokens()).logits
    merged = model.merge_and_unload(adapter_names=["default"])
    assert_close({"": merged(pico.tokens()).logits}, {"": expected}, TIGHT[torch.float64])


def test_nothing_of_the_weights_size_is_built() -> None:
    """Every tensor that a step makes is counted: PEFT's are as large as the weights, ours as the tokens."""
    model = adapted("olmoe", torch.float32)
    weight = 7 * 40 * 32

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 3 and result.shape[0] == 7:
                is_view = any(
                    isinstance(a, torch.Tensor)
                    and a.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
                    for a in args
                )
                self.largest = max(self.largest, 0 if is_view else result.numel())
            return result

    with Watched() as theirs:
        step(model, pico.tokens(1, 5))
    with Watched() as mine:
        step(solidify.factor_experts(model), pico.tokens(1, 5))
    assert theirs.largest >= weight
    assert 0 < mine.largest <= 7 * 40 * RANK


def test_hooks_of_the_experts_still_run_and_the_module_stays_as_it_was() -> None:
    model = solidify.factor_experts(adapted("olmoe"))
    experts = model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    seen = []
    experts.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(pico.tokens())
    assert seen == [torch.Size([24, 32])]
    assert "forward" not in vars(experts)
    assert not hasattr(experts, "parametrizations")


def test_what_is_saved_is_peft_s_and_comes_back(tmp_path: Path) -> None:
    FAMILIES["olmoe"](torch.float32).save_pretrained(tmp_path / "base")

    def base() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    attached = solidify.attach(base(), lora={"r": RANK, "target_parameters": ["**.experts.*_proj"]})
    solidify.factor_experts(attached)
    with torch.no_grad():
        for parameter in attached.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 4)
    attached.eval()
    expected = attached(pico.tokens()).logits
    solidify.save_adapter(attached, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert_close({"": again(pico.tokens()).logits}, {"": expected}, TIGHT[torch.float32])
    assert_close({"": solidify.factor_experts(again)(pico.tokens()).logits}, {"": expected}, TIGHT[torch.float32])


def test_without_experts_it_is_refused() -> None:
    model = get_peft_model(pico.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="no low-rank update of the model is one of fused experts"):
        solidify.factor_experts(model)
    model = adapted("olmoe")
    for module in model.modules():
        if "is_concatenated" in vars(module):
            module._is_expert_parallel = True
    with pytest.raises(AdapterError, match="target_parameters"):
        solidify.factor_experts(model)


def test_built_is_peft_s_own_bits() -> None:
    model = adapted("olmoe", torch.float32)
    expected = model(pico.tokens()).logits
    solidify.factor_experts(model)
    with expert_factors.built():
        assert torch.equal(model(pico.tokens()).logits, expected)
