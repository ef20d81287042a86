"""Traps of replacing modules: each test shows the plain way failing, and ours working or refusing."""

from __future__ import annotations

import pico
import pytest
import torch
from pico import wrappers
from torch import nn

import solidify
from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.modules.trashcan_moe import TrashCanMoE

pytestmark = pytest.mark.slow

MLP = "model.layers.*.mlp"


def test_setattr_with_a_dotted_name_registers_a_child_that_never_runs() -> None:
    model = pico.olmoe()
    inputs = {"input_ids": pico.tokens()}
    logits = anatomy.run(model, inputs)
    setattr(model, "model.layers.0.mlp", wrappers.PlainMLP(model.config))
    assert torch.equal(anatomy.run(model, inputs), logits)
    assert sum(isinstance(module, wrappers.PlainMLP) for module in model.modules()) == 1  # the usual check passes

    model = pico.olmoe()
    solidify.replace(model, "model.layers.0.mlp", wrappers.PlainMLP)
    assert type(model.get_submodule("model.layers.0.mlp")) is wrappers.PlainMLP
    assert not torch.equal(anatomy.run(model, inputs), logits)


def test_set_submodule_creates_what_was_mistyped() -> None:
    model = pico.olmoe()
    logits = anatomy.run(model, {"input_ids": pico.tokens()})
    model.set_submodule("model.layers.0.mpl", wrappers.PlainMLP(model.config))
    assert torch.equal(anatomy.run(model, {"input_ids": pico.tokens()}), logits)

    with pytest.raises(SurgeryError, match=r"names no module; close to it: model.layers.\*.mlp"):
        solidify.replace(pico.olmoe(), "model.layers.0.mpl", wrappers.PlainMLP)


def test_a_block_that_still_returns_router_logits_breaks_the_model() -> None:
    model = pico.olmoe()
    model.set_submodule("model.layers.0.mlp", wrappers.ReturnsTuple(model.model.layers[0].mlp))
    with pytest.raises(TypeError, match="unsupported operand type"):
        model(input_ids=pico.tokens())

    with pytest.raises(SurgeryError, match="return the same structure, shapes and dtypes"):
        solidify.replace(pico.olmoe(), "model.layers.0.mlp", wrappers.ReturnsTuple)


def test_a_new_module_has_another_dtype_than_the_model() -> None:
    model = pico.olmoe(dtype=torch.bfloat16)
    model.set_submodule("model.layers.0.mlp", wrappers.PlainMLP(model.config))
    with pytest.raises(RuntimeError, match="dtype"):
        model(input_ids=pico.tokens())

    model = pico.olmoe(dtype=torch.bfloat16)
    solidify.replace(model, "model.layers.0.mlp", wrappers.PlainMLP)
    assert torch.isfinite(model(input_ids=pico.tokens()).logits).all()


def test_a_new_module_trains_while_the_model_evaluates() -> None:
    model = pico.olmoe().eval()
    model.set_submodule("model.layers.0.mlp", nn.Sequential(nn.Dropout(0.5), wrappers.PlainMLP(model.config)))
    assert model.model.layers[0].mlp.training
    inputs = {"input_ids": pico.tokens()}
    with torch.no_grad():
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)

    model = pico.olmoe().eval()
    solidify.replace(model, "model.layers.0.mlp", wrappers.Dropping)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_a_block_that_mixes_positions_leaks_the_future() -> None:
    model = pico.olmoe()
    model.set_submodule("model.layers.0.mlp", wrappers.Mixing(model.model.layers[0].mlp))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.fill_(1.0)
    tokens = pico.tokens()
    other = tokens.clone()
    other[:, -1] = 7
    first, second = (anatomy.run(model, {"input_ids": ids}) for ids in (tokens, other))
    assert float((first[:, :-1] - second[:, :-1]).abs().max()) > 1e-3  # runs, trains, and generates, wrongly

    with pytest.raises(SurgeryError, match="looks ahead"):
        solidify.replace(pico.olmoe(), "model.layers.0.mlp", wrappers.Mixing)


def test_routers_put_in_after_outputs_were_captured_are_not_recorded() -> None:
    def routers(model: nn.Module) -> int:
        return len(model(input_ids=pico.tokens(), output_router_logits=True).router_logits)

    model = pico.olmoe()
    assert routers(model) == 2
    model.set_submodule("model.layers.0.mlp", pico.olmoe(seed=1).model.layers[0].mlp)
    assert routers(model) == 1  # the auxiliary loss is now over one layer of two

    model = pico.olmoe()
    assert routers(model) == 2
    solidify.replace(model, "model.layers.0.mlp", wrappers.FreshMoE)
    assert routers(model) == 2


def test_without_a_router_the_auxiliary_loss_raises() -> None:
    model = pico.olmoe()
    for layer in model.model.layers:
        layer.mlp = wrappers.PlainMLP(model.config)
    with pytest.raises(IndexError):
        model(input_ids=pico.tokens(), labels=pico.tokens(), output_router_logits=True)

    model = pico.olmoe()
    solidify.replace(model, MLP, TrashCanMoE)
    assert model(input_ids=pico.tokens(), labels=pico.tokens(), output_router_logits=True).aux_loss > 0


def test_one_module_in_two_places_is_parted_silently() -> None:
    model = pico.olmoe()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.set_submodule("model.layers.0.mlp", wrappers.PlainMLP(model.config))
    assert type(model.model.layers[1].mlp).__name__ == "OlmoeSparseMoeBlock"

    model = pico.olmoe()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(SurgeryError, match=r"is the same module as model.layers.1.mlp"):
        solidify.replace(model, "model.layers.0.mlp", wrappers.PlainMLP)
