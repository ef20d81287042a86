from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch

import solidify
from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture, capture

LORA = {"r": 2, "target_modules": ["**.q_proj"]}


def test_names_lead_through_every_wrapper_of_peft(trash_artifact: Path) -> None:
    plain = {place.name for place in lookup.modules(solidify.load(trash_artifact))}
    model = solidify.attach(
        solidify.load(trash_artifact),
        lora=LORA,
        train=["model.layers.0.mlp", "model.layers.1.mlp.trash", "**.o_proj.weight"],
    )
    assert {place.name for place in lookup.modules(model)} == plain
    wrapped = torch.nn.DataParallel(model)
    assert {place.name for place in lookup.modules(wrapped)} == plain


def test_the_active_copy_is_read_and_the_frozen_original_is_not(trash_artifact: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), train=["**.mlp.trash"])
    can = next(p for p in lookup.modules(model) if p.name == "model.layers.0.mlp.trash")
    with torch.no_grad():
        can.inner.weight.fill_(0.5)
        can.inner.bias.fill_(-1.0)
    spec = Capture(class_name="TrashCan", count=2)
    with torch.no_grad(), capture(model, {"trash": spec}) as captured:
        model(input_ids=pico.tokens())
    active = captured["trash"]["model.layers.0.mlp.trash"]
    with torch.no_grad(), model.disable_adapter(), capture(model, {"trash": spec}) as captured:
        model(input_ids=pico.tokens())
    assert captured["trash"]["model.layers.0.mlp.trash"].min() > 1000
    assert active.max() < 1000


def test_modules_are_found_by_name_class_and_by_what_the_model_records(trash_artifact: Path) -> None:
    model = solidify.load(trash_artifact)
    routers = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert list(Capture(modules="model.layers.*.mlp.gate").find(model)) == routers
    assert list(Capture(records="router_logits").find(model)) == routers
    assert len(Capture(class_name="TrashCanMoE").find(model)) == 2


def test_what_was_promised_must_be_there(trash_artifact: Path) -> None:
    model = solidify.load(trash_artifact)
    with pytest.raises(ObjectiveError, match="but the model has none"):
        Capture(class_name="Nothing").find(model)
    assert Capture(class_name="Nothing", optional=True).find(model) == {}
    with pytest.raises(ObjectiveError, match="expects 3 of TrashCan, but the model has 2"):
        Capture(class_name="TrashCan", count=3).find(model)


def test_a_module_that_runs_twice_is_refused(trash_artifact: Path) -> None:
    model = solidify.load(trash_artifact)
    with pytest.raises(ObjectiveError, match="ran twice"), capture(model, {"t": Capture(class_name="TrashCan")}):
        for _ in range(2):
            model(input_ids=pico.tokens())


def test_hooks_do_not_outlive_the_pass(trash_artifact: Path) -> None:
    model = solidify.load(trash_artifact)
    with capture(model, {"t": Capture(class_name="TrashCan")}):
        pass
    assert not any(module._forward_hooks for module in model.modules())
