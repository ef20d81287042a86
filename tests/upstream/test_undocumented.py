"""Names without an underscore that no documentation has are there, and functions take what the package gives them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import installed
import private_names
import pytest

from solidify.upstream import accelerate, liger, peft, transformers, transformers_training, trl

LISTED = {
    "transformers": {**transformers.UNDOCUMENTED, **transformers.STANDING_ALONE_UNDOCUMENTED},
    "peft": peft.UNDOCUMENTED,
    "trl": trl.UNDOCUMENTED,
    "accelerate": accelerate.UNDOCUMENTED,
}
TRAINING = {f"transformers.{name}" for name in transformers_training.UNDOCUMENTED}
PATHS = sorted({f"{library}.{name}" for library, names in LISTED.items() for name in names} | TRAINING)

FUNCTIONS = {
    "transformers.conversion_mapping.get_model_conversion_mapping": (
        "model",
        "key_mapping",
        "hf_quantizer",
        "add_legacy",
    ),
    "transformers.core_model_loading.dot_natural_key": ("s",),
    "transformers.core_model_loading.rename_source_key": (
        *("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict", "reverse"),
    ),
    "transformers.core_model_loading.revert_weight_conversion": ("model", "state_dict"),
    "transformers.trainer_pt_utils.get_length_grouped_indices": (
        *("lengths", "batch_size", "mega_batch_mult", "generator"),
    ),
    "transformers.trainer_utils.rotate_checkpoints": (
        *("output_dir", "save_total_limit", "best_model_checkpoint", "use_mtime", "checkpoint_prefix"),
    ),
    "transformers.utils.output_capturing.maybe_install_capturing_hooks": ("model",),
    "trl.import_utils.suppress_experimental_warning": (),
    "trl.trainer.utils.use_adapter": ("model", "adapter_name"),
    "trl.models.utils.unwrap_model_for_generation": (
        *("model", "accelerator", "gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs"),
    ),
}


@pytest.mark.parametrize("path", FUNCTIONS)
def test_functions_take_the_parameters_that_they_took(path: str) -> None:
    module, _, name = path.rpartition(".")
    installed.same_parameters(importlib.import_module(module), name, FUNCTIONS[path])


@pytest.mark.parametrize("path", [*PATHS, "trl.experimental.gkd.GKDTrainer"])
def test_names_are_where_they_were(path: str) -> None:
    module, _, name = path.rpartition(".")
    installed.attribute(importlib.import_module(module), name)


@pytest.mark.parametrize("seams", [transformers, transformers_training, peft, trl, accelerate])
def test_each_name_has_its_reason(seams: ModuleType) -> None:
    assert seams.__file__ is not None
    used = private_names.undocumented(ast.parse(Path(seams.__file__).read_text()))
    library = seams.__name__.rpartition(".")[2].partition("_")[0]
    listed = {f"{library}.{name}" for name in seams.UNDOCUMENTED}
    assert used == listed, used ^ listed
    assert all(seams.UNDOCUMENTED.values())


def test_it_is_the_accelerate_that_was_read() -> None:
    installed.same_minor("accelerate", accelerate.TESTED)


def test_cache_layers_are_listed_and_told_of_a_configuration() -> None:
    from transformers import DynamicLayer, LlamaConfig

    classes = transformers.cache_layer_classes()
    assert classes["full_attention"] is DynamicLayer
    config = LlamaConfig(num_hidden_layers=2)
    assert transformers.cache_layer_kinds(config) == ["full_attention", "full_attention"]
    assert set(transformers.cache_layer_kinds(config)) <= set(transformers.ALLOWED_ATTN_LAYER_TYPES)


def test_ligers_functions_have_switches() -> None:
    pytest.importorskip("liger_kernel")
    installed.same_minor("liger-kernel", liger.TESTED)
    found = liger.switches(liger.functions(), "llama")
    assert found["rms_norm"] is True
