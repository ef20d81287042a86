"""An attach or a load that does not end well leaves the model as it was, and the corrected one then works."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from peft import PeftModel
from torch import nn

import solidify
from solidify.adapter import adapter_tensors, adapters
from solidify.errors import AdapterError

LORA = {"r": 2, "target_modules": ["**.q_proj"]}


def snapshot(model: nn.Module) -> list[object]:
    return [
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [(name, id(module), type(module), module.training) for name, module in model.named_modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        sorted(vars(model)),
    ]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, directory = pico.llama(), tmp_path_factory.mktemp("all-or-nothing")
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled)
    pico.artifact(model, edits, directory / "artifact")
    return directory / "artifact"


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", ["train_parameters", "_freeze_inside"])
def test_an_attach_that_is_cut_off_leaves_nothing(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], moment: str
) -> None:
    model = solidify.load(artifact)
    before, logits = snapshot(model), model(pico.tokens()).logits

    def cut_off(*_: object) -> None:
        raise kind("cut off")

    with monkeypatch.context() as patched, pytest.raises(kind):
        patched.setattr(adapters, moment, cut_off)
        solidify.attach(model, lora=LORA, train=["**.mlp.scale"])
    assert snapshot(model) == before
    assert torch.equal(model(pico.tokens()).logits, logits)
    assert isinstance(solidify.attach(model, lora=LORA, train=["**.mlp.scale"]), PeftModel)


def test_a_refused_attach_beside_another_adapter_leaves_that_one(artifact: Path) -> None:
    peft_model = solidify.attach(solidify.load(artifact), lora=LORA)
    before = snapshot(peft_model)
    with pytest.raises(AdapterError):
        solidify.attach(peft_model, lora={**LORA, "r": 0}, name="other")
    assert snapshot(peft_model) == before
    assert list(peft_model.peft_config) == ["default"]
    solidify.attach(peft_model, lora=LORA, name="other")


def test_a_load_that_is_refused_late_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    solidify.save_adapter(solidify.attach(solidify.load(artifact), lora=LORA, train=["**.mlp.scale"]), tmp_path / "a")
    model = solidify.load(artifact)
    before = snapshot(model)

    def wrong(*_: object) -> list[str]:
        return ["something differs after loading"]

    with pytest.MonkeyPatch.context() as patched, pytest.raises(AdapterError, match="differs after"):
        patched.setattr(adapter_tensors, "load_faults", wrong)
        solidify.load_adapter(model, tmp_path / "a")
    assert snapshot(model) == before
    solidify.load_adapter(model, tmp_path / "a")
