"""The private names of PEFT that the package uses, each under a name of ours, and those without documentation.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig as CordaConfig
from peft.tuners.lora.corda import preprocess_corda as preprocess_corda
from peft.tuners.lora.layer import Conv1d as Conv1d
from peft.tuners.lora.model import LoraModel
from peft.tuners.lora.variants import BlockDiagonalLinear as BlockDiagonalLinear
from peft.utils.constants import DUMMY_TARGET_MODULES as DUMMY_TARGET_MODULES
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key as get_pattern_key
from torch import nn

TESTED = "0.21"
UNDOCUMENTED = {
    "tuners.lora.config.CordaConfig": "the settings of CorDA, which LoraConfig has a field for; not exported",
    "tuners.lora.corda.preprocess_corda": "what CorDA starts from; EVA's and LoRA-GA's like are exported",
    "tuners.lora.layer.Conv1d": "a layer whose changes a merge computes; of its kind it alone is not exported",
    "tuners.lora.variants.BlockDiagonalLinear": "a factor whose matrix is larger than what is stored",
    "utils.other.get_pattern_key": "which key of `alpha_pattern` counts for a module of an adapter of others",
    "utils.constants.DUMMY_TARGET_MODULES": "without this word PEFT refuses an adapter without low-rank targets",
}


def put_on(model: nn.Module, configuration: PeftConfig, name: str = "default") -> PeftModel:
    """Puts an adapter on a model (`get_peft_model`), and leaves out what nobody here can change.

    PEFT 0.21.2 reads `is_gradient_checkpointing`, of which transformers 5.23 warns that it will be gone.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, configuration, adapter_name=name)


class TrainingWrapper(AuxiliaryTrainingWrapper):  # type: ignore[misc]
    """A wrapper that PEFT finds, switches, disables and saves (`peft/utils/other.py`); its names, made public."""

    def _get_available_adapters(self) -> set[str]:
        return self.held_adapters()

    def held_adapters(self) -> set[str]:
        """Returns the adapters of which something is held here; PEFT names a model's adapters by asking all wrappers.

        Raises:
            NotImplementedError: a class does not say so.
        """
        raise NotImplementedError

    def note_active(self, adapters: list[str]) -> None:
        """Sets what `active_adapters` answers, which has no setter; PEFT's own `set_adapter` takes one name."""
        self._active_adapter = adapters

    def drop_name(self, adapter: str) -> None:
        """Forgets an adapter's name, which PEFT's `update` notes; else another of that name would be taken for it."""
        self._adapters.discard(adapter)


class LoraTuner(LoraModel):  # type: ignore[misc]
    """PEFT's tuner for LoRA (`peft/tuners/lora/model.py`): its private methods that we change, to override."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.switch_layers(enabled)

    def switch_layers(self, enabled: bool = True) -> None:
        """Switches all adapters on or off: the public verbs and PeftModel's `disable_adapter` both come here."""
        super()._enable_adapter_layers(enabled)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        return self.take_out(merge, progressbar, safe_merge, adapter_names)

    def take_out(self, merge: bool, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Takes PEFT's modules out: `merge_and_unload` and `unload` both come here."""
        plain: nn.Module = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        return plain

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with self.forward_hooks(*args, **kwargs):
            yield

    def forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Runs with an adapter for each row (`adapter_names`): PeftModel's forward and generation come here."""
        hooks: AbstractContextManager[None] = super()._enable_peft_forward_hooks(*args, **kwargs)
        return hooks

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.load_own(state_dict, prefix, *args)

    def load_own(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads what is the tuner's: PyTorch calls it once before the children (a pre-hook could not refuse)."""
        super()._load_from_state_dict(state_dict, prefix, *args)


def switch_layers(tuner: Any, enabled: bool) -> None:
    """Switches all adapters of a tuner on or off, of whatever kind it is; the public verbs warn as well."""
    tuner._enable_adapter_layers(enabled)


def wrapped_adapters(wrapper: AuxiliaryTrainingWrapper) -> Collection[str]:
    """Returns the adapters that a wrapper was told of, by which it decides whether its trained part runs."""
    adapters: Collection[str] = wrapper._adapters
    return adapters


def layer_adapters(layer: Any) -> Collection[str]:
    """Returns the adapters that have an update on a layer, whatever kind it is."""
    adapters: Collection[str] = layer._all_available_adapter_names()
    return adapters


def forget_caches(layer: Any) -> None:
    """Drops what a LoRA layer keeps from one pass to the next: else it would hold a large product of matrices."""
    layer._caches.clear()
