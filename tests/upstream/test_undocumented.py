"""Functions without an underscore that no documentation names take what the package gives them."""

from __future__ import annotations

import importlib

import installed
import pytest

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
    "trl.models.utils.unwrap_model_for_generation": (
        *("model", "accelerator", "gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs"),
    ),
}


@pytest.mark.parametrize("path", FUNCTIONS)
def test_functions_take_the_parameters_that_they_took(path: str) -> None:
    module, _, name = path.rpartition(".")
    installed.same_parameters(importlib.import_module(module), name, FUNCTIONS[path])


@pytest.mark.parametrize("path", ["accelerate.data_loader.DataLoaderShard", "trl.experimental.gkd.GKDTrainer"])
def test_classes_are_where_they_were(path: str) -> None:
    module, _, name = path.rpartition(".")
    installed.attribute(importlib.import_module(module), name)
