"""PEFT's verbs for several adapters, made right for what is trained in full, or refused by name.

PEFT knows low-rank updates well. Of copies of modules it lets one adapter's run and asks no questions, and of single
parameters and buffers (`parameters.py`, `buffers.py`) it knows nothing. `LoraVerbs` takes the class of PEFT's tuner in
models that carry our adapters: it is that class, with every verb that touches more than one adapter, or the base's own
weights, looked after.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from solidify.adapter import lookup, starts, tokens
from solidify.adapter.buffers import NAME as BUFFERS
from solidify.adapter.buffers import TrainedBuffers
from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.directory import results
from solidify.errors import AdapterError
from solidify.upstream.peft import LoraTuner
from solidify.upstream.torch import own_buffers, own_modules, own_parameters, unsaved_buffers

_BY_ROW = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # of whose copies PEFT can mix rows

_ONE_BY_ONE = "PEFT can sum low-rank updates only; merge one adapter after the other"
_UNSUMMED = ("use_dora", "use_bdlora", "lora_bias", "trainable_token_indices")  # which PEFT takes from the first


def take_over(model: PeftModel, frozen: Collection[str] = ()) -> None:
    """Gives a model that PEFT has wrapped our verbs, in place, and every adapter a version of the buffers.

    `frozen` names parameters that their module froze itself: they stay frozen in trained copies of it.
    """
    tuner = model.base_model
    if type(tuner) is LoraModel:
        tuner.__class__ = LoraVerbs
    if isinstance(tuner, LoraVerbs):
        tuner._frozen = {*tuner._frozen, *frozen}
        for name in model.peft_config:
            tuner.hold_buffers(name)
            lookup.mark_copies(tuner.model, name)
        tuner.set_again()


class LoraVerbs(LoraTuner):
    """PEFT's tuner for LoRA, careful about what is trained in full."""

    _frozen: Collection[str] = ()  # parameters that stay frozen in copies: PEFT makes all of a copy trainable
    _added: str = ""  # the adapter that was added last
    _bare: bool = False  # an adapter is being added: the plain model stands without any other's parts
    _unmerged: Sequence[tuple[nn.Parameter, torch.Tensor]] = ()  # parameters and what they held before a merge
    _failed: Mapping[str, Sequence[dict[str, Any]]] = MappingProxyType({})  # by adapter

    def failed(self, adapter: str) -> list[dict[str, Any]]:
        """Returns what failed of an adapter before it was put here: what the manifests say that it was made from."""
        return list(self._failed.get(adapter, ()))

    def note_failed(self, adapter: str, failed: Sequence[dict[str, Any]]) -> None:
        """Keeps what failed of an adapter, instead of what was kept under its name."""
        self._failed = {**self._failed, adapter: list(failed)}

    def hold_buffers(self, adapter: str) -> None:
        """Gives an adapter a version of every persistent buffer of the plain model."""
        holder = lookup.trained_buffers(self.model)
        if holder is not None:
            holder.update(adapter)
            return
        owners = {
            f"{name}.{key}" if name else key: module
            for name, module in lookup.owners(self.model)
            for key, buffer in own_buffers(module).items()
            if buffer is not None and key not in unsaved_buffers(module)
        }
        if owners:
            self.model.add_module(BUFFERS, TrainedBuffers(owners, adapter))

    def set_again(self) -> None:
        """Puts in place what belongs to the active adapters; what may be trained stays as it is."""
        with lookup.trainable_kept(self.model):
            self.set_adapter(self.active_adapters)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter as PEFT does, to the plain model as it is without any, so that copies are the base's."""
        self._restore_unmerged()
        self._added, self._bare = adapter_name, True
        self.note_failed(adapter_name, [])
        try:
            self._hold_adapters([])
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for other in (o for o in self.peft_config if o != adapter_name):
                if self.peft_config[other] is self.peft_config[adapter_name]:
                    starts.follow(self, adapter_name, other)
            self.hold_buffers(adapter_name)
        finally:
            self._bare = False
            self._hold_adapters([name for name in self.active_adapters if name in self.peft_config])

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activates one adapter, or several of which no two train the same thing in full.

        Raises:
            AdapterError: two of them do; nothing is changed then.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._refuse_disputed(names)
        self._restore_unmerged()
        if names:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            for module in self.model.modules():
                if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                    module.set_adapter([])
            self.active_adapter = list[str]()
        self._freeze_inside(names)
        self._hold_adapters(names, inference_mode)

    def _freeze_inside(self, names: Sequence[str]) -> None:
        for path, wrapper in self._yield_copies():
            for copy in (wrapper.modules_to_save[name] for name in names if name in wrapper.modules_to_save):
                held = {f"{path}.{key}": parameter for key, parameter in copy.named_parameters()}
                for name in held.keys() & set(self._frozen) if held.keys() - set(self._frozen) else ():
                    held[name].requires_grad_(False)

    def _hold_adapters(self, names: Sequence[str], inference_mode: bool | None = None) -> None:
        """Puts some adapters' versions of parameters and buffers in place (none while an adapter is added)."""
        names = [] if self._bare else list(names)
        held, buffers = lookup.trained_parameters(self.model), lookup.trained_buffers(self.model)
        if held is not None:
            with lookup.trainable_kept(held) if inference_mode is None else nullcontext():
                held.set_adapter([n for n in names if n in held.trained], inference_mode=bool(inference_mode))
        if buffers is not None:
            theirs = [name for name in names if name in buffers.trained]
            moved = [name for name in theirs if buffers.moved(name)] if len(theirs) > 1 else theirs
            buffers.set_adapter((moved or theirs)[:1])

    def _refuse_disputed(self, names: Sequence[str]) -> None:
        if len(names) < 2:
            return
        held, buffers = lookup.trained_parameters(self.model), lookup.trained_buffers(self.model)
        disputed = held.disputed(list(names)) if held is not None else []
        disputed += [
            name
            for name, wrapper in self._yield_copies()
            if sum(adapter in wrapper.modules_to_save for adapter in names) > 1
        ]
        disputed += [
            lookup.canonical(self.model, path)
            for path, layer in tokens.layers(self.model)
            if sum(adapter in layer.token_indices for adapter in names) > 1
        ]
        if buffers is not None and sum(bool(buffers.moved(name)) for name in names) > 1:
            disputed += [key for name in names for key in buffers.moved(name)]
        disputed += self._moved_inside_copies(names)
        if disputed:
            raise AdapterError(
                f"adapters {' and '.join(names)} cannot be active together: each trained its own "
                f"{_list_some(disputed)}; activate one of them"
            )

    def _moved_inside_copies(self, names: Sequence[str]) -> list[str]:
        """Names buffers that one adapter moved in a module of which another runs a copy, with buffers of its own."""
        buffers = lookup.trained_buffers(self.model)
        if buffers is None:
            return []
        copied = {
            (path, name) for path, wrapper in self._yield_copies() for name in names if name in wrapper.modules_to_save
        }
        return [
            key
            for name in names
            for key in buffers.moved(name)
            if any(other != name and key.startswith(f"{path}.") for path, other in copied)
        ]

    def _yield_copies(self) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
        for path, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                yield lookup.canonical(self.model, path), module

    def _in_full(self, adapter: str) -> list[str]:
        """Names what an adapter has beside its low-rank updates."""
        held, buffers = lookup.trained_parameters(self.model), lookup.trained_buffers(self.model)
        names = [path for path, wrapper in self._yield_copies() if adapter in wrapper.modules_to_save]
        names += held.names(adapter) if held is not None else []
        return names + (list(buffers.moved(adapter)) if buffers is not None else [])

    def switch_layers(self, enabled: bool = True) -> None:
        """Switches all adapters on or off; what may be trained stays as it is, and off is the base bit for bit."""
        self._restore_unmerged()
        with lookup.trainable_kept(self.model):
            super().switch_layers(enabled)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds adapters into the weights until `unmerge_adapter`, which gives the very same weights back.

        Raises:
            AdapterError: others than the active ones are to be merged, and something is trained in full.
        """
        names = list(adapter_names) if adapter_names is not None else list(self.active_adapters)
        if set(names) != set(self.active_adapters):
            self._refuse_in_full("merge_adapter", sorted({*names, *self.active_adapters}), "call set_adapter first")
        done = {id(parameter) for parameter, _ in self._unmerged} | lookup.versions(self.model)
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        for parameter in {id(p): p for layer in layers for p in layer.get_base_layer().parameters()}.values():
            if id(parameter) not in done:
                self._unmerged = [*self._unmerged, (parameter, parameter.data)]
                parameter.data = parameter.data.clone()  # what is mapped from a file stays as it is
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the weights, which are then what they were, bit for bit."""
        with warnings.catch_warnings():  # PEFT warns of every layer in which nothing was merged
            warnings.filterwarnings("ignore", "Already unmerged")
            super().unmerge_adapter()
        for parameter, data in self._unmerged:
            parameter.data = data.to(parameter.device)
        self._unmerged = ()

    def _restore_unmerged(self) -> None:
        if self._unmerged:
            self.unmerge_adapter()

    def take_out(self, merge: bool, progressbar: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """Takes PEFT's modules out: with `merge`, the named (or the active) adapters stay in the weights, else none."""
        self._restore_unmerged()
        names = list(adapter_names) if adapter_names is not None else list(self.active_adapters)
        unknown = [name for name in names if name not in self.peft_config]
        if merge and unknown:
            raise AdapterError(f"the model has no adapter {unknown[0]!r}; it has: {', '.join(self.peft_config)}")
        super().switch_layers(True)
        self.set_adapter(names if merge else [])
        plain = super().take_out(merge, progressbar, safe_merge, names if merge else None)
        for name in (PARAMETERS, BUFFERS):
            own_modules(plain).pop(name, None)
        return plain

    def delete_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter; of the others those stay active that were."""
        if adapter_name not in self.peft_config:
            super().delete_adapter(adapter_name)  # says so
        active = adapter_name in self.active_adapters
        left = [name for name in self.active_adapters if name != adapter_name]
        left = left or [name for name in self.peft_config if name != adapter_name][:1]
        with nullcontext() if active else lookup.trainable_kept(self.model):
            self.set_adapter(left[:1])  # PEFT hands no more than one on to copies of modules
            super().delete_adapter(adapter_name)
            self.set_adapter(left)
        self.note_failed(adapter_name, [])

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Adds a weighted sum of low-rank adapters, which keeps what failed of each; of one, `svd` changes the rank.

        Takes what PEFT's own does, by position too.

        Raises:
            AdapterError: one of them trained something that is no low-rank update, of which PEFT makes no sum.
        """
        given = inspect.signature(super().add_weighted_adapter).bind(adapters, weights, adapter_name, *args, **kwargs)
        self._refuse_in_full("add_weighted_adapter", adapters, _ONE_BY_ONE)
        known = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
        more = {name: key for name, config in known.items() for key in _UNSUMMED if getattr(config, key, None)}
        if more:
            what = "; ".join(f"{name!r} has {key}" for name, key in more.items())
            raise AdapterError(f"add_weighted_adapter cannot take these adapters ({what}): {_ONE_BY_ONE}")
        failed = results.join_failed(*map(self.failed, adapters))
        is_new = adapter_name not in self.peft_config  # PEFT passes over one that is there
        options = given.arguments
        if len(adapters) == 1 and options.get("svd_rank") and options.get("combination_type", "svd") == "svd":
            # Of a single adapter PEFT (0.21.2) takes the factors as they are, at their rank: half of it, twice.
            options["adapters"], options["weights"] = [*adapters, *adapters], [weights[0] / 2, weights[0] / 2]
        with _without_root(known.get(adapters[0]) if adapters else None):
            super().add_weighted_adapter(*given.args, **given.kwargs)
        if is_new:
            for name, parameter in self.named_parameters():
                if ".lora_" in name and f".{adapter_name}." in f"{name}.":  # slices of singular vectors, with gaps
                    parameter.data = parameter.data.contiguous()
            self.note_failed(adapter_name, failed)

    def _refuse_in_full(self, verb: str, adapters: Sequence[str], remedy: str) -> None:
        found = {name: parts for name in adapters if name in self.peft_config and (parts := self._in_full(name))}
        if found:
            what = "; ".join(f"{name!r} trained {_list_some(parts)}" for name, parts in found.items())
            raise AdapterError(f"{verb} cannot take adapters that trained something in full ({what}): {remedy}")

    @contextmanager
    def forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Runs with an adapter for each row (`adapter_names`), where PEFT can mix them.

        Raises:
            AdapterError: an adapter of a row trained something in full that cannot be another for each row.
        """
        rows = kwargs.get("adapter_names")
        if rows is not None:
            self._refuse_mixed(rows)
        with super().forward_hooks(*args, **kwargs):
            yield

    def _refuse_mixed(self, rows: Sequence[str]) -> None:
        names = [name for name in dict.fromkeys(rows) if name in self.peft_config]
        held, buffers = lookup.trained_parameters(self.model), lookup.trained_buffers(self.model)
        running = [*names, *self.active_adapters]
        found = [f"{n} (of {a!r})" for a in running if held is not None for n in held.names(a)]
        found += [f"{n} (of {a!r})" for a in running if buffers is not None for n in buffers.moved(a)]
        for path, wrapper in self._yield_copies():
            here = [name for name in running if name in wrapper.modules_to_save]
            if here and not (isinstance(wrapper.original_module, _BY_ROW) and set(running) <= set(here)):
                found.append(f"{path} (of {here[0]!r})")
        if found:
            raise AdapterError(
                "adapter_names cannot mix these adapters in one batch, because one of them trained modules or "
                f"parameters in full: {_list_some(list(dict.fromkeys(found)))}; run the rows of each adapter by "
                "themselves (set_adapter)"
            )

    def load_own(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads as PEFT does, but lets no adapter's file write into the base."""
        own = {id(p) for p in _base_tensors(self.model)}
        tree = {f"{prefix}model.{name}": t for name, t in self.model.state_dict(keep_vars=True).items()}
        held = (f"{prefix}model.{PARAMETERS}.", f"{prefix}model.{BUFFERS}.")
        base = [key for key, tensor in tree.items() if id(tensor) in own and not key.startswith(held)]
        written = [key for key in base if key in state_dict]
        if written and len(written) < len(base):
            self._drop_added()
            raise AdapterError(
                f"this file holds {_list_some(written)}, which PEFT's own loading would write into the base itself; "
                "load it with solidify.load_adapter"
            )
        self._rename_buffers(state_dict, f"{prefix}model.{BUFFERS}.", tree)
        super().load_own(state_dict, prefix, *args)

    def _rename_buffers(self, state_dict: dict[str, Any], prefix: str, tree: Collection[str]) -> None:
        """Gives buffers that a file holds under their full names those of the adapter that is being loaded."""
        buffers = lookup.trained_buffers(self.model)
        states = (f"{prefix}base.", f"{prefix}trained.")  # of whole models, as PyTorch writes and loads them
        for key in [k for k in state_dict if k.startswith(prefix) and k not in tree and not k.startswith(states)]:
            renamed = buffers.renamed(key.removeprefix(prefix)) if buffers is not None else None
            if renamed is None:
                self._drop_added()
                raise AdapterError(
                    f"this file holds the buffer {key.removeprefix(prefix)}, which the model does not have"
                )
            state_dict[prefix + renamed] = state_dict.pop(key)

    def _drop_added(self) -> None:
        """Forgets an adapter that was added for a file that is refused."""
        if self._added in self.peft_config and self._added not in self.active_adapters:
            self.delete_adapter(self._added)


@contextmanager
def _without_root(config: Any) -> Iterator[None]:
    """Has PEFT scale a sum by 1: it gives it the first one's `use_rslora`, and the factors hold the scales already."""
    before = getattr(config, "use_rslora", False)
    if before:
        config.use_rslora = False
    try:
        yield
    finally:
        if before:
            config.use_rslora = before


def _base_tensors(plain: nn.Module) -> Iterator[torch.Tensor]:
    """Yields the parameters and buffers that stand in the plain model's own modules now."""
    for _, module in lookup.owners(plain):
        yield from (p for p in (*own_parameters(module).values(), *own_buffers(module).values()) if p is not None)


def _list_some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
