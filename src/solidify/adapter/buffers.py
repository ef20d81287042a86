"""Gives every adapter its own version of the model's persistent buffers, because training moves some of them.

BatchNorm's running statistics, moving averages, counts: they move when the model runs in training mode, in frozen
modules too, and then belong to what was trained. PEFT knows of parameters alone. Here one holder, a child of the plain
model, keeps the versions of all that are not running now; the running version stands in the module that it belongs to,
which may change it in place or put another tensor there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from solidify.upstream.peft import TrainingWrapper
from solidify.upstream.torch import own_buffers
from solidify.weights.format import same_bits

NAME = "trained_buffers"


class TrainedBuffers(TrainingWrapper):
    """Holds versions of persistent buffers, by adapter, and the plain model's own.

    It is a wrapper that PEFT finds, switches, disables and saves. It wraps no module: it exchanges
    tensors in their owners.
    """

    other_param_names = ("base", "trained")  # none of these is the plain model's, says PEFT's state of the base

    def __init__(self, owners: dict[str, nn.Module], adapter_name: str) -> None:
        super().__init__(nn.Identity(), adapter_name, owners=owners)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Makes room for the versions."""
        self._owners: tuple[dict[str, nn.Module]] = (dict(kwargs["owners"]),)  # in a tuple: no children of this
        self.base = _Versions(self._find_running())
        self.trained = nn.ModuleDict({})
        self._installed: str | None = None
        self._asked = adapter_name
        self.note_active([])
        self.register_state_dict_pre_hook(_settle_versions)
        self.register_load_state_dict_pre_hook(_settle_versions)
        self.register_load_state_dict_post_hook(_take_up)

    def check_module(self) -> None:
        """There is no wrapped module to judge."""

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Adds versions for an adapter that has none; they start as the plain model's own."""
        super().update(adapter_name)
        if adapter_name not in self.trained:
            own = self.versions(None)
            self.trained[adapter_name] = _Versions({name: b.detach().clone() for name, b in own.items()})

    def names(self) -> list[str]:
        """Returns the full names of the buffers."""
        return list(self._owners[0])

    def versions(self, adapter_name: str | None) -> dict[str, torch.Tensor]:
        """Returns an adapter's version of every buffer (None: the plain model's own), the very tensors."""
        _settle_versions(self)
        slot = self._find_slot(adapter_name)
        return {name: slot.version(name) for name in self.names()}

    def moved(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """Returns an adapter's version of those buffers that are not the plain model's own, bit for bit."""
        if adapter_name not in self.trained:
            return {}
        own = self.versions(None)
        return {name: b for name, b in self.versions(adapter_name).items() if not same_bits(b, own[name])}

    def take(self, adapter_name: str, values: Mapping[str, torch.Tensor]) -> None:
        """Gives an adapter's version of some buffers other values."""
        mine = self.versions(adapter_name)
        with torch.no_grad():
            for name, value in values.items():
                mine[name].copy_(value)

    def identities(self) -> set[int]:
        """Returns the identities of all tensors that are an adapter's version."""
        _settle_versions(self)
        return {id(b) for slot in self.trained.values() for b in slot.buffers()}

    def _find_running(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, owner in self._owners[0].items():
            buffer = own_buffers(owner)[name.rpartition(".")[2]]
            assert buffer is not None
            found[name] = buffer
        return found

    def _find_slot(self, adapter_name: str | None) -> _Versions:
        found: Any = self.base if adapter_name is None else self.trained[adapter_name]
        assert isinstance(found, _Versions)
        return found

    def _install_versions(self) -> None:
        """Puts into every owner the version that should run now."""
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.trained]
        wanted = active[0] if active else None
        if wanted == self._installed:
            return
        _settle_versions(self)
        slot = self._find_slot(wanted)
        for name, owner in self._owners[0].items():
            own_buffers(owner)[name.rpartition(".")[2]] = slot.version(name)
        self._installed = wanted

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the adapter's buffers by their full names."""
        if adapter_name not in self.trained:
            return {}
        own = self.versions(adapter_name)
        return {name: state_dict.get(_make_state_key(adapter_name, name), own[name]) for name in self.names()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Asks PEFT for no buffer, of which a file may hold some or none; `renamed` finds those that it holds.

        PEFT calls this for the adapter into which it then loads: that one is remembered.
        """
        self._asked = adapter_name
        return {}

    def renamed(self, name: str) -> str | None:
        """Returns where the adapter that PEFT loads into has its version of a buffer; None where it has none."""
        is_trained = self._asked in self.trained and name in self._owners[0]
        return _make_state_key(self._asked, name) if is_trained else None

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Returns which of the asked-for adapters has buffers here."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        return next((name for name in names if name in self.trained), None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Lets one adapter's buffers (or none's) run."""
        self.note_active([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))
        self._install_versions()

    def enable_adapters(self, enabled: bool) -> None:
        """Switches between the active adapter's buffers and the plain model's."""
        super().enable_adapters(enabled)
        self._install_versions()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forgets an adapter."""
        if adapter_name in self.trained:
            left = [name for name in new_active_adapters or [] if name in self.trained and name != adapter_name]
            self.set_adapter(left)
            del self.trained[adapter_name]
            self.drop_name(adapter_name)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Leaves the running versions in their owners (without `merge`, the plain model's own)."""
        if not merge:
            self.set_adapter([])
        return nn.Identity()

    def held_adapters(self) -> set[str]:
        """Returns the adapters of which something is held here."""
        return set(self.trained.keys())


class _Versions(nn.Module):
    """One version of all the buffers."""

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(_make_buffer_name(name), buffer)

    def version(self, name: str) -> torch.Tensor:
        """Returns a buffer by its full name."""
        found = own_buffers(self)[_make_buffer_name(name)]
        assert found is not None
        return found


def _settle_versions(holder: TrainedBuffers, *_: Any) -> None:
    """Notes the running tensors in their slot: a module may have put others into its buffers, or moved them."""
    slot = holder._find_slot(holder._installed)
    for name, buffer in holder._find_running().items():
        own_buffers(slot)[_make_buffer_name(name)] = buffer


def _take_up(holder: TrainedBuffers, _keys: Any) -> None:
    """Puts tensors that were loaded into the running slot into the owners."""
    slot = holder._find_slot(holder._installed)
    for name, owner in holder._owners[0].items():
        own_buffers(owner)[name.rpartition(".")[2]] = slot.version(name)


def _make_state_key(adapter_name: str, name: str) -> str:
    """Returns the key under which the holder's state has an adapter's version of a buffer."""
    return f"trained.{adapter_name}.{_make_buffer_name(name)}"


def _make_buffer_name(name: str) -> str:
    """Turns a dotted name into one that a module's buffer may have."""
    return name.replace(".", "/")
