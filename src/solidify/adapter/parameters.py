"""Trains bare parameters in full, as an adapter that can be switched, disabled and saved.

PEFT trains whole modules in full (`modules_to_save`: a copy of all they hold) but no single parameter. Here one holder,
a child of the plain model, keeps for every adapter its own version of some parameters and puts the active version in
place. Nothing else is copied, no forward is wrapped, and LoRA may sit anywhere around.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from solidify.model.operations import list_marks
from solidify.upstream.peft import TrainingWrapper
from solidify.upstream.torch import own_parameters

NAME = "trained_parameters"


class TrainedParameters(TrainingWrapper):
    """Holds versions of parameters; `base` is the plain model's own, `trained[adapter]` an adapter's.

    It is a wrapper that PEFT finds, switches, disables and saves. It wraps no module: it exchanges
    `nn.Parameter` objects in their owners.
    """

    adapter_layer_names = ("trained",)

    def __init__(self, owners: dict[str, nn.Module], adapter_name: str) -> None:
        super().__init__(nn.Identity(), adapter_name, owners=owners)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Makes room for the versions."""
        self.base = nn.ParameterDict({})
        self.trained = nn.ModuleDict({})
        self._owners: tuple[dict[str, nn.Module]] = ({},)  # in a tuple, so that the owners are not children of this

    def check_module(self) -> None:
        """There is no wrapped module to judge."""

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Adds an adapter; `owners` maps the full names of its parameters to the modules whose attributes they are."""
        super().update(adapter_name)
        owners: dict[str, nn.Module] = kwargs["owners"]
        versions = nn.ParameterDict({})
        for name, owner in owners.items():
            key = _make_parameter_key(name)
            if key not in self.base:
                self._owners[0][name] = owner
                self.base[key] = own_parameters(owner)[name.rpartition(".")[2]]
                self.base[key].requires_grad_(False)
            versions[key] = nn.Parameter(self.base[key].detach().clone())
            vars(versions[key]).update(list_marks(self.base[key]))
        self.trained[adapter_name] = versions
        self.set_adapter(adapter_name)

    def names(self, adapter_name: str) -> list[str]:
        """Returns the full names of the parameters that an adapter trains."""
        versions = self._find_versions(adapter_name)
        return [name for name in self._owners[0] if _make_parameter_key(name) in versions]

    def _find_versions(self, adapter_name: str) -> Mapping[str, nn.Parameter]:
        return dict(self.trained[adapter_name].named_parameters()) if adapter_name in self.trained else {}

    def version(self, adapter_name: str, name: str) -> nn.Parameter:
        """Returns an adapter's version of a parameter."""
        return self._find_versions(adapter_name)[_make_parameter_key(name)]

    def own(self) -> dict[str, nn.Parameter]:
        """Returns the plain model's own parameters of which some adapter has a version, by their full names."""
        return {name: self.base[_make_parameter_key(name)] for name in self._owners[0]}

    def disputed(self, adapter_names: list[str]) -> list[str]:
        """Returns the names of parameters of which several of some adapters have a version."""
        return [name for name in self._owners[0] if sum(name in self.names(a) for a in adapter_names) > 1]

    def _install_versions(self) -> None:
        """Puts into every owner the version that should run now."""
        active = [] if self.disable_adapters else self.active_adapters
        for name, owner in self._owners[0].items():
            versions = [self.version(a, name) for a in active if name in self.names(a)]
            own_parameters(owner)[name.rpartition(".")[2]] = (
                versions[0] if versions else self.base[_make_parameter_key(name)]
            )

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the adapter's parameters by their full names."""
        return {name: state_dict[stored] for name, stored in self.adapter_state_dict_load_map(adapter_name).items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Maps the names on disk to those in memory."""
        return {name: f"trained.{adapter_name}.{_make_parameter_key(name)}" for name in self.names(adapter_name)}

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Returns which of the asked-for adapters has parameters here."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        return next((name for name in names if name in self.trained), None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes some adapters (or none) the active and trainable ones.

        Raises:
            ValueError: two of them have a version of the same parameter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if disputed := self.disputed(names):
            raise ValueError(f"adapters {' and '.join(names)} each have their own version of {', '.join(disputed)}")
        for name, versions in self.trained.items():
            for parameter in versions.parameters():
                parameter.requires_grad_(name in names and not inference_mode)
        self.note_active(names)
        self._install_versions()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches between the active adapter's parameters and the plain model's."""
        super().enable_adapters(enabled)
        self._install_versions()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forgets an adapter."""
        if adapter_name in self.trained:
            del self.trained[adapter_name]
            self.drop_name(adapter_name)
            self.set_adapter([name for name in new_active_adapters or [] if name in self.trained])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Leaves in the owners what is merged (or their own parameters) and returns something empty in its place.

        Raises:
            ValueError: `safe_merge` is asked for and a trained parameter is not finite.
        """
        for name, owner in self._owners[0].items():
            own = self.base[_make_parameter_key(name)]
            attribute = name.rpartition(".")[2]
            version = own_parameters(owner)[attribute]
            own_parameters(owner)[attribute] = own
            if merge and version is not own and version is not None:
                if safe_merge and not torch.isfinite(version).all():
                    raise ValueError(f"the trained parameter {name} is not finite")
                own.data = version.data.clone()  # never into memory that may be a mapped file
        return nn.Identity()

    def held_adapters(self) -> set[str]:
        """Returns the adapters of which something is held here."""
        return set(self.trained.keys())


def _make_parameter_key(name: str) -> str:
    """Turns a dotted name into one that a ParameterDict takes."""
    return name.replace(".", "/")
