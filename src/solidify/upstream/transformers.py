"""The private names of transformers that the package uses, each under a name of ours, and those without documentation.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionCacheLayerMixin as LinearAttentionCacheLayerMixin
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES as ALLOWED_ATTN_LAYER_TYPES
from transformers.conversion_mapping import get_model_conversion_mapping as get_model_conversion_mapping
from transformers.core_model_loading import Transpose as Transpose
from transformers.core_model_loading import WeightRenaming as WeightRenaming
from transformers.core_model_loading import dot_natural_key as dot_natural_key
from transformers.core_model_loading import rename_source_key as rename_source_key
from transformers.core_model_loading import revert_weight_conversion as revert_weight_conversion
from transformers.models.auto import auto_factory
from transformers.utils.output_capturing import OutputRecorder as OutputRecorder

TESTED = "5.23"


class TrainerSeams:
    """Stands before a Trainer among the bases: its private methods that we change, under names to override.

    A class after this one in the order of bases may be a trainer of TRL's, which overrides some of them itself.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler(train_dataset)

    def train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the order of the training rows; there is no argument that takes a sampler."""
        return super()._get_train_sampler(train_dataset)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.write_checkpoint(model, trial)

    def write_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint and drops older ones; the callback `on_save` comes when they are gone."""
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_progress(checkpoint)

    def load_progress(self, checkpoint: str | None) -> None:
        """Takes the optimizer and schedule back, once the model is loaded; no callback is called at that moment."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def prepare_inputs(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a batch where the model is, and gives it the dtype that DeepSpeed asks for, as the trainer does itself."""
    prepared: dict[str, Any] = trainer._prepare_inputs(dict(batch))
    return prepared


def output_directory(trainer: Any, trial: Any) -> str:
    """Returns where the trainer puts checkpoints: in a hyperparameter search, a directory for each trial."""
    return str(trainer._get_output_dir(trial=trial))


def write_model(trainer: Any, directory: str | None, state: Mapping[str, Any]) -> None:
    """Writes a model's files from a state that was gathered; the public `save_model` gathers the whole model."""
    trainer._save(directory, state_dict=state)


def time_to_answer() -> int:
    """Returns for how many seconds transformers waits at the terminal for an answer whether code may run.

    There is no public way to say that nobody answers (0), where Auto classes build the parts of a model by themselves.
    """
    seconds: int = transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE
    return seconds


def set_time_to_answer(seconds: int) -> None:
    """Sets it, for the whole process."""
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def without_conversion() -> Iterator[None]:
    """While the block lasts, transformers loads files without converting them: they have the layout in memory.

    Its rules are looked up by the model's class alone, by a name in `modeling_utils`, and those that keep a name would
    be applied once more; `from_pretrained` has no argument that leaves them out.
    """
    module = transformers.modeling_utils
    before = module.get_model_conversion_mapping
    module.get_model_conversion_mapping = lambda *_, **__: []
    try:
        yield
    finally:
        module.get_model_conversion_mapping = before


def set_conversions(model: Any, rules: Sequence[Any]) -> None:
    """Notes which rules of conversion were used to load a model: by them `revert_weight_conversion` goes back."""
    model._weight_conversions = list(rules)


def is_split_by_experts(module: Any) -> bool:
    """Returns whether a module's class follows the interface of experts implementations, on one machine.

    `use_experts_implementation` (`integrations/moe.py`), which is documented, notes so on every instance.
    """
    noted = vars(module)
    words = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
    return all(word in noted for word in words) and not noted.get("_is_expert_parallel", True)


def apply_gate(experts: Any, gate_up: Any) -> Any:
    """Joins what gate and up of experts give: the family's own way, which has no public name."""
    return experts._apply_gate(gate_up)


def optional_keys(model: Any) -> tuple[str, ...]:
    """Returns patterns of names that a checkpoint may lack; the loading report is made with them and keeps none."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def passed_over_keys(model: Any) -> tuple[str, ...]:
    """Returns patterns of names that loading leaves out without a word; vLLM reads the same attribute."""
    return tuple(model._keys_to_ignore_on_load_unexpected or ())


def modules_in_float32(model: Any) -> tuple[str, ...]:
    """Returns parts of names whose parameters stay in float32 whatever type is asked for."""
    return tuple(model._keep_in_fp32_modules_strict or ())


def recorded_outputs(model: Any) -> Mapping[str, Any]:
    """Returns what a model declares that it can record (`utils/output_capturing.py`), by the name of the output."""
    declared: Mapping[str, Any] = model._can_record_outputs or {}
    return declared


# A flag by which vLLM judges a class; `is_backend_compatible` answers for it, the name is what its users look for.
BACKEND_FLAG = "_supports_attention_backend"
HINTS = "_keys_to_ignore_on_load_unexpected"  # likewise
REFERENCE = "_name_or_path"  # the key in config.json, and in a configuration's dictionary, of `name_or_path`


def commit(config: Any) -> str | None:
    """Returns the commit of the hub that a configuration was loaded from: its snapshot in the cache has that name."""
    return getattr(config, "_commit_hash", None)


def attention(config: Any) -> str | None:
    """Returns what computes attention; the public `set_attn_implementation` only sets it, and only on models."""
    word: str | None = config._attn_implementation
    return word


def set_attention(config: Any, word: str | None) -> None:
    """Sets what computes attention, on a configuration alone."""
    config._attn_implementation = word


def implementation(config: Any, kind: str) -> Any:
    """Returns what computes `attn` or `experts`, as a configuration answers, for which there is no public question."""
    return getattr(config, f"_{kind}_implementation")


def chosen_implementation(config: Any, kind: str) -> Any:
    """Returns what was chosen to compute `attn` or `experts` in one configuration; None leaves it to transformers."""
    return vars(config).get(f"_{kind}_implementation_internal")


def implementations(config: Any) -> list[tuple[str, Any]]:
    """Returns all that one configuration says of what computes (`attn_implementation`, ...), set or only read."""
    said = ((key, value) for key, value in vars(config).items() if "_implementation" in key)
    return [(key.strip("_").removesuffix("_internal"), value) for key, value in said]


def withdraw_attention(name: str) -> None:
    """Takes back a function that was registered to compute attention; the public interface only adds."""
    transformers.AttentionInterface._global_mapping.pop(name)


def is_auto_model(found: object) -> bool:
    """Returns whether something is an Auto class for models; the class that they share has no public name."""
    return isinstance(found, type) and issubclass(found, auto_factory._BaseAutoModelClass)


def classes_by_configuration(auto: Any) -> Any:
    """Returns the mapping from a configuration's class to an Auto class's models; None where it has none."""
    return auto._model_mapping


def names_by_family(mapping: Any) -> Collection[str | Sequence[str]]:
    """Returns the names of all classes in such a mapping: asked by configuration, it hides those of a part's."""
    names: Collection[str | Sequence[str]] = mapping._model_mapping.values()
    return names


def cache_layer_classes() -> dict[str, type]:
    """Returns the class of cache layers that each kind of layer (`layer_type`) stands for, by the kind's name."""
    classes: dict[str, type] = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    return classes


def cache_layer_kinds(config: Any) -> list[str]:
    """Returns the kind of every layer in the cache that transformers would make from a configuration."""
    return list(cache_utils.get_layer_types_and_kwargs(config)[0])


# Names that have no underscore and no page in the documentation, as the files of the package import them from here.
UNDOCUMENTED = {
    "cache_utils.DYNAMIC_LAYER_TYPE_MAPPING": "the kinds of cache layers, which no function lists",
    "cache_utils.get_layer_types_and_kwargs": "which kinds a cache gets, where a configuration does not say it",
    "cache_utils.LinearAttentionCacheLayerMixin": "tells layers with a state from those with keys and values",
    "configuration_utils.ALLOWED_ATTN_LAYER_TYPES": "the kinds that a configuration may name; others are refused",
    "conversion_mapping.get_model_conversion_mapping": "by which rules hub names become names in memory; PEFT uses it",
    "core_model_loading.Transpose": "one operation of those rules, told from those that move whole rows",
    "core_model_loading.WeightRenaming": "a rule that only renames",
    "core_model_loading.dot_natural_key": "the order in which `from_pretrained` meets the files' names",
    "core_model_loading.rename_source_key": "the name that one rule set gives one key",
    "core_model_loading.revert_weight_conversion": "the way back, which `save_pretrained` takes for whole models alone",
    "dynamic_module_utils.TIME_OUT_REMOTE_CODE": "for how many seconds a question whether code may run is asked",
    "utils.output_capturing.OutputRecorder": "what a class declares that it records is partly of this type",
}

LOADED = "_is_hf_initialized"  # a flag of modules that were loaded, and need no initial values

# Private names in files that are copied into artifacts or run without solidify, where nothing of this room can be
# imported. `tests/test_house.py` compares the files with this list, `tests/upstream/` the list with transformers.
STANDING_ALONE = {
    LOADED: "a module that surgery changed must not be initialised again after loading",
    "_output_capturing_hooks_installed": "the hooks that record outputs are installed once, by class, before surgery",
    "_attn_implementation": "eager attention alone returns weights, by which look-ahead is judged",
    "_can_set_experts_implementation": "it reads a class's source, and the generated one's does not name the experts",
    "_can_set_experts_implementation_cached_value": "where that answer is kept",
    "_is_stateful": "a state from which no position can be taken back; generate asks it before it assists",
    "_tied_weights_keys": "a surgery may tie what the family does not",
    "_keys_to_ignore_on_load_unexpected": "the base without a head passes over what only the head has",
}

# Likewise those without an underscore.
STANDING_ALONE_UNDOCUMENTED = {
    "cache_utils.DYNAMIC_LAYER_TYPE_MAPPING": "an artifact gives its modules the layers of the cache that they declare",
    "cache_utils.STATIC_LAYER_TYPE_MAPPING": "the same for a static cache",
    "cache_utils.LinearAttentionCacheLayerMixin": "what such layers lack is added in front of it",
    "cache_utils.LinearAttentionLayer": "the recurrent layer, made one that counts positions",
    "cache_utils.LinearAttentionAndFullAttentionLayer": "a layer with a state and keys, which linear attention extends",
    "loss.loss_utils.ForSequenceClassificationLoss": "the loss of labels, as transformers' classifiers have it",
    "modeling_outputs.SequenceClassifierOutput": "what a wrapped module of plain torch returns",
    "masking_utils.create_causal_mask": "a draft head is called beside the model, which makes its masks by this",
    "utils.output_capturing.maybe_install_capturing_hooks": "what is recorded is installed before surgery, to be kept",
}
