"""The private names of PEFT are there, and mean what the package takes them for."""

from __future__ import annotations

import inspect
from typing import Any

import installed
import pico
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from solidify.upstream import peft as seams


@pytest.fixture
def model() -> PeftModel:
    return get_peft_model(pico.llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("peft", seams.TESTED)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (LoraModel, "_enable_adapter_layers", ("self", "enabled")),
        (LoraModel, "_unload_and_optionally_merge", ("self", "merge", "progressbar", "safe_merge", "adapter_names")),
        (LoraModel, "_enable_peft_forward_hooks", ("self", "args", "kwargs")),
        (AuxiliaryTrainingWrapper, "_get_available_adapters", ("self",)),
        (BaseTunerLayer, "_all_available_adapter_names", ("self",)),
    ],
)
def test_these_methods_are_there(owner: type, name: str, parameters: tuple[str, ...]) -> None:
    installed.same_parameters(owner, name, parameters)


def test_peft_and_torch_still_come_through_what_is_overridden() -> None:
    for owner, call in (
        (BaseTuner.enable_adapter_layers, "self._enable_adapter_layers("),
        (BaseTuner.disable_adapter_layers, "self._enable_adapter_layers("),
        (BaseTuner.merge_and_unload, "self._unload_and_optionally_merge("),
        (BaseTuner.unload, "self._unload_and_optionally_merge("),
        (PeftModel._enable_peft_forward_hooks, "self.base_model._enable_peft_forward_hooks("),
        (nn.Module.load_state_dict, "module._load_from_state_dict("),
    ):
        assert call in inspect.getsource(owner), f"{owner.__qualname__} no longer calls {call}: our override is idle"


@pytest.mark.parametrize(
    ("cls", "base"), [(seams.LoraTuner, LoraModel), (seams.TrainingWrapper, AuxiliaryTrainingWrapper)]
)
def test_pefts_classes_have_none_of_our_names(cls: type, base: type) -> None:
    assert not {name for name in vars(cls) if not name.startswith("_") and hasattr(base, name)}


def test_a_tuner_of_ours_does_as_pefts(model: PeftModel) -> None:
    class Ours(seams.LoraTuner):
        calls: tuple[str, ...] = ()

        def switch_layers(self, enabled: bool = True) -> None:
            self.calls += (f"switch {enabled}",)
            super().switch_layers(enabled)

        def take_out(self, *args: Any) -> nn.Module:
            self.calls += ("take out",)
            return super().take_out(*args)

        def load_own(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            self.calls += (f"load {prefix}",)
            super().load_own(state_dict, prefix, *args)

        def forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += ("hooks",)
            return super().forward_hooks(*args, **kwargs)

    inputs = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    before = model(**inputs).logits
    model.base_model.__class__ = Ours
    assert torch.equal(model(**inputs).logits, before)
    with model.disable_adapter():
        pass
    model.load_state_dict(model.state_dict())
    tuner = model.base_model
    plain = model.merge_and_unload()
    assert torch.equal(plain(**inputs).logits, before)
    assert tuner.calls == ("hooks", "switch False", "switch True", "load base_model.", "take out")


def test_layers_and_wrappers_name_their_adapters(model: PeftModel) -> None:
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    wrapper = next(m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
    assert list(seams.layer_adapters(layer)) == list(seams.wrapped_adapters(wrapper)) == ["default"]
    seams.switch_layers(model.base_model, False)
    assert layer.disable_adapters
    assert wrapper.disable_adapters
    installed.attribute(layer, "_caches")["key"] = 1
    seams.forget_caches(layer)
    assert not layer._caches


def test_a_wrapper_of_ours_is_one_of_pefts() -> None:
    class Ours(seams.TrainingWrapper):
        def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
            """Holds nothing."""

        def held_adapters(self) -> set[str]:
            return {"one"}

    wrapper = Ours(nn.Identity(), "one")
    assert wrapper._get_available_adapters() == {"one"}
    wrapper.update("one")
    assert set(seams.wrapped_adapters(wrapper)) == {"one"}
    wrapper.note_active(["two"])
    assert wrapper.active_adapters == ["two"]
    wrapper.drop_name("one")
    assert not seams.wrapped_adapters(wrapper)
