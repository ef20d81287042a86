"""The private names of transformers are there, and mean what the package takes them for."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import installed
import pico
import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    core_model_loading,
    dynamic_module_utils,
    modeling_utils,
)
from transformers.models.auto import modeling_auto
from transformers.utils import output_capturing
from trl import DPOTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from solidify.upstream import transformers as seams

CACHED, HOOKS = "_can_set_experts_implementation_cached_value", "_output_capturing_hooks_installed"
TRAINERS = (Trainer, SFTTrainer, DPOTrainer, GKDTrainer)


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("transformers", seams.TESTED)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_get_train_sampler", ("self", "train_dataset")),
        ("_save_checkpoint", ("self", "model", "trial")),
        ("_load_optimizer_and_scheduler", ("self", "checkpoint")),
        ("_prepare_inputs", ("self", "inputs")),
        ("_get_output_dir", ("self", "trial")),
        ("_save", ("self", "output_dir", "state_dict")),
        ("save_model", ("self", "output_dir", "_internal_call")),
    ],
)
def test_trainers_have_these_methods(trainer: type, name: str, parameters: tuple[str, ...]) -> None:
    installed.same_parameters(trainer, name, parameters)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_trainer_has_our_names_for_them(trainer: type) -> None:
    ours = {name for name in vars(seams.TrainerSeams) if not name.startswith("_")}
    assert ours == {"train_sampler", "write_checkpoint", "load_progress"}
    assert not {name for name in ours if hasattr(trainer, name)}


def test_trainers_call_the_private_methods() -> None:
    """What we override has an effect only where transformers still goes through it."""
    whole = inspect.getsource(Trainer)
    for call in ("self._save_checkpoint(model, trial)", "self._load_optimizer_and_scheduler(", "_get_train_sampler,"):
        assert call in whole, f"transformers' Trainer no longer says {call}: the override in upstream/ has no effect"


def test_an_override_stands_before_the_trainers_own() -> None:
    calls: list[Any] = []

    class Base:
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            calls.append(("base", model, trial))

    class Ours(seams.TrainerSeams, Base):
        def write_checkpoint(self, model: Any, trial: Any) -> None:
            calls.append("before")
            super().write_checkpoint(model, trial)

    Ours()._save_checkpoint("model", None)
    assert calls == ["before", ("base", "model", None)]


def test_a_trainer_puts_batches_shifts_and_files_where_it_says(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none")
    trainer = Trainer(pico.llama(), arguments)
    batch = seams.prepare_inputs(trainer, {"input_ids": torch.ones(1, 2, dtype=torch.long)})
    assert batch["input_ids"].tolist() == [[1, 1]]
    assert seams.output_directory(trainer, None) == str(tmp_path)
    seams.write_model(trainer, str(tmp_path / "written"), trainer.model.state_dict())
    assert (tmp_path / "written" / "model.safetensors").is_file()


def test_the_time_to_answer_is_read_where_it_is_set() -> None:
    before = seams.time_to_answer()
    assert before > 0
    seams.set_time_to_answer(0)
    try:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            dynamic_module_utils.resolve_trust_remote_code(None, "somebody/model", False, True)
    finally:
        seams.set_time_to_answer(before)
    assert "TIME_OUT_REMOTE_CODE" in inspect.getsource(dynamic_module_utils.resolve_trust_remote_code)


def test_loading_looks_its_conversions_up_under_the_name_that_is_set() -> None:
    name = "get_model_conversion_mapping"
    assert f"{name}(model" in inspect.getsource(PreTrainedModel), f"loading no longer calls {name} of modeling_utils"
    before = installed.attribute(modeling_utils, name)
    with seams.without_conversion():
        assert modeling_utils.get_model_conversion_mapping(None, None, None) == []
    assert modeling_utils.get_model_conversion_mapping is before


def test_rules_of_conversion_are_read_where_they_are_set() -> None:
    model = pico.olmoe()
    found = core_model_loading.revert_weight_conversion(model, dict(model.state_dict()))
    assert any(".experts.0." in name for name in found)
    seams.set_conversions(model, [])
    assert set(core_model_loading.revert_weight_conversion(model, dict(model.state_dict()))) == set(model.state_dict())


def test_a_class_says_which_keys_and_types_are_special() -> None:
    class Model(LlamaForCausalLM):
        _keys_to_ignore_on_load_missing = ("a",)
        _keys_to_ignore_on_load_unexpected = ("b",)
        _keep_in_fp32_modules_strict = ("norm",)

    with torch.device("meta"):
        model = Model(pico.llama().config)
    assert seams.optional_keys(model) == ("a",)
    assert seams.passed_over_keys(model) == ("b",)
    assert seams.modules_in_float32(model) == ("norm",)
    assert seams.HINTS in vars(Model)
    for name in ("_keys_to_ignore_on_load_missing", seams.HINTS, "_keep_in_fp32_modules_strict", seams.BACKEND_FLAG):
        installed.attribute(PreTrainedModel, name)


def test_a_model_says_what_it_records() -> None:
    assert {"hidden_states", "attentions"} <= set(seams.recorded_outputs(pico.llama().model))


def test_a_configuration_says_where_it_is_from_and_what_computes(tmp_path: Path) -> None:
    config = LlamaConfig()
    assert seams.commit(config) is None
    config.name_or_path = "here"
    assert vars(config)[seams.REFERENCE] == "here"
    assert "_commit_hash" in inspect.getsource(transformers.configuration_utils)
    seams.set_attention(config, "eager")
    assert seams.attention(config) == seams.implementation(config, "attn") == "eager"
    assert seams.chosen_implementation(config, "attn") == "eager"
    assert seams.chosen_implementation(LlamaConfig(), "attn") is None
    config.attn_implementation = "somebody/kernels"  # as a file may say too: neither hides the other
    said = seams.implementations(config)
    assert {"attn_implementation", "experts_implementation"} <= {kind for kind, _ in said}
    assert {value for kind, value in said if kind == "attn_implementation"} == {"eager", "somebody/kernels"}
    del config.attn_implementation
    assert seams.implementation(config, "experts") == seams.chosen_implementation(config, "experts")
    config.save_pretrained(tmp_path)
    assert seams.attention(AutoConfig.from_pretrained(tmp_path)) != "eager"


def test_an_attention_is_withdrawn() -> None:
    transformers.AttentionInterface.register("ours", lambda *_: None)
    assert "ours" in transformers.AttentionInterface()
    seams.withdraw_attention("ours")
    assert "ours" not in transformers.AttentionInterface()


def test_auto_classes_are_known_and_list_their_classes() -> None:
    assert seams.is_auto_model(AutoModelForCausalLM)
    assert not seams.is_auto_model(AutoConfig)
    assert not seams.is_auto_model("AutoModel")
    mapping = seams.classes_by_configuration(modeling_auto.AutoModelForCausalLM)
    assert mapping[LlamaConfig] is LlamaForCausalLM
    assert "LlamaForCausalLM" in seams.names_by_family(mapping)


@pytest.mark.parametrize("name", sorted(set(seams.STANDING_ALONE) - {"_is_hf_initialized", CACHED, HOOKS}))
def test_what_stands_alone_is_there(name: str) -> None:
    installed.attribute(pico.llama() if name != "_attn_implementation" else LlamaConfig(), name)


@pytest.mark.parametrize(("name", "module"), [("_is_hf_initialized", modeling_utils), (HOOKS, output_capturing)])
def test_marks_that_are_set_are_read(name: str, module: Any) -> None:
    assert name in inspect.getsource(module), f"{module.__name__} no longer reads {name}: what sets it has no effect"


def test_a_class_may_say_that_its_experts_can_be_exchanged() -> None:
    """The answer is kept in the class; a generated class is given its family's."""
    assert CACHED in inspect.getsource(PreTrainedModel._can_set_experts_implementation)
    assert type(pico.olmoe())._can_set_experts_implementation()
