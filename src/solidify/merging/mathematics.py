"""An adapter folded into stored tensors, one at a time: PEFT's own mathematics, on the one module at hand.

The adapter is attached to a skeleton on the meta device. When a tensor's turn comes, its values (or some rows of them)
and the adapter's tensors for it are put into PEFT's layer, PEFT merges, the result is taken and the layer is empty
again. Memory is bounded by a part of a tensor.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Conv2d, Conv3d, Embedding, Linear, LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import adapter_tensors, kinds, lookup, patterns, tokens
from solidify.adapter.adapters import train_parameters
from solidify.adapter.parameters import TrainedParameters
from solidify.behaviour.values import substitute_entries
from solidify.errors import AdapterError, refuse
from solidify.system import foreign
from solidify.upstream.peft import Conv1d, forget_caches, put_on
from solidify.upstream.torch import own_parameters
from solidify.weights import reverting
from solidify.weights.format import Entry, Shape

NAME = "default"
_KINDS = (Linear, Embedding, Conv1d, Conv2d, Conv3d, ParamWrapper)
_SPLIT = 2**27  # bytes; of larger matrices some rows are merged at a time
_BLOCK = 2**23  # bytes that are merged at a time


@dataclass(frozen=True)
class Change:
    """What an adapter makes of one tensor of the plain model, out of which of the adapter's tensors (`keys`).

    `layer` merges a low-rank update; without it the adapter's own tensor takes the tensor's place. `instead` is an
    adapter's tensor that takes the place of the base's before the update is merged. With `tokens` the adapter's tensor
    has the rows of these ids alone, in their order.
    """

    name: str
    keys: tuple[str, ...]
    layer: LoraLayer | None = None
    instead: str | None = None
    tokens: tuple[int, ...] | None = None


@dataclass
class Merger:
    """The changes that an adapter makes, by the names of the plain model, and their values.

    `used` counts how often each of the adapter's tensors went into the result, `faults` gathers what is not finite.
    """

    entries: Mapping[str, Entry]
    changes: dict[str, Change]
    parts: Mapping[str, tuple[nn.Module, str]]  # where each of the adapter's tensors belongs in PEFT's model
    used: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _done: set[int] = field(default_factory=set)
    _lock: Any = field(default_factory=threading.Lock)
    _locks: dict[int, Any] = field(default_factory=dict)
    _last: Any = field(default_factory=threading.local)

    def ranges(self, changes: Mapping[str, Change], shapes: Mapping[str, Shape], rows: int) -> list[range | None]:
        """Splits the first axis of some tensors so that a part of them fits into little memory."""
        size = sum(shape.nbytes for shape in shapes.values())
        if not rows or size <= _BLOCK or not all(_is_splittable(c, shapes[name]) for name, c in changes.items()):
            return [None]
        step = max(2, rows * _BLOCK // size)  # one expert alone would be no stack of experts to PEFT
        bounds = [*range(0, rows, step), rows]
        if len(bounds) > 2 and bounds[-1] - bounds[-2] < 2:
            del bounds[-2]
        return [range(a, b) for a, b in pairwise(bounds)]

    def merged(self, change: Change, base: torch.Tensor, rows: range | None, total: int) -> torch.Tensor:
        """Returns what a tensor (or some of its rows, of `total`) becomes.

        Raises:
            AdapterError: PEFT cannot merge the layer at all.
        """
        self._count_used(change)
        if change.tokens is not None:
            return self._check_finite(change.name, self._with_rows(change, change.tokens, base, rows))
        if change.layer is None:
            return self._check_finite(change.name, self._read_tensor(change.keys[0], rows).to(base.dtype))
        if change.instead is not None:
            base = self._read_tensor(change.instead, rows).to(base.dtype)
        with self._lock:
            lock = self._locks.setdefault(id(change.layer), threading.Lock())
        with lock, torch.no_grad():
            return self._with_layer(change, change.layer, base, rows, total)

    def _with_rows(self, change: Change, ids: Sequence[int], base: torch.Tensor, rows: range | None) -> torch.Tensor:
        """Puts an adapter's rows into a tensor, or into those of its rows that stand in a range."""
        first, end = (0, len(base)) if rows is None else (rows.start, rows.stop)
        here = [place for place, number in enumerate(ids) if first <= number < end]
        index = torch.tensor([ids[place] - first for place in here], dtype=torch.long)
        values = self._read_tensor(change.keys[0])[here]  # (ids of the part, hidden_size)
        return base.index_copy(0, index, values.to(base.dtype))

    def pieces(self, change: Change, shape: Shape) -> Iterator[torch.Tensor]:
        """Yields the values of a tensor that is the adapter's own, chunk by chunk."""
        self._count_used(change)
        entry = self.entries[change.keys[0]]
        for piece in entry.pieces():
            values = piece.view(entry.shape.dtype)  # (numbers of the chunk,)
            yield self._check_finite(change.name, values.to(shape.dtype))

    def tell_alike(self, change: Change) -> None:
        """Counts the tensors of a change that is the same as one of a tied tensor; rows are stored once for both."""
        if change.tokens is None:
            self._count_used(change)

    def _with_layer(
        self, change: Change, layer: LoraLayer, base: torch.Tensor, rows: range | None, total: int
    ) -> torch.Tensor:
        keys = [key for key in change.keys if key != change.instead]
        whole = self._read_factors(layer, keys)
        values = {key: _take_rows(layer, self.parts[key], tensor, rows, total) for key, tensor in whole.items()}
        owner, attribute = layer.get_base_layer(), change.name.rpartition(".")[2]
        puts = [(owner, attribute, base), *((*self.parts[key], value) for key, value in values.items())]
        if layer.lora_bias.get(NAME):  # PEFT merges weight and bias together; here the other one does not matter
            other = "weight" if attribute == "bias" else "bias"
            puts.append((owner, other, torch.zeros(owner.get_parameter(other).shape)))
        experts = getattr(layer, "num_experts", None)
        try:
            with substitute_entries([_make_entry(*put) for put in puts]):
                if experts is not None and rows is not None:
                    layer.num_experts = len(rows)
                layer.merge(safe_merge=True, adapter_names=[NAME])
                result: torch.Tensor = owner.get_parameter(attribute).data
            return result
        except ValueError:  # PEFT's word for NaN
            self._record_fault(f"{change.name} would hold NaN or infinity")
            return base
        except Exception as error:
            raise AdapterError(f"PEFT cannot merge {change.name}: {foreign.said(error)}") from error
        finally:
            if experts is not None:
                layer.num_experts = experts
            layer.merged_adapters.clear()
            forget_caches(layer)

    def _read_factors(self, layer: LoraLayer, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Reads the adapter's tensors of a layer, once for all parts that one thread merges in a row."""
        if getattr(self._last, "layer", None) is not layer:
            self._last.layer, self._last.values = layer, {key: self._read_tensor(key) for key in keys}
        found: dict[str, torch.Tensor] = self._last.values
        return found

    def _read_tensor(self, key: str, rows: range | None = None) -> torch.Tensor:
        return reverting.rows_of(self.entries[key], rows).read()

    def _check_finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            self._record_fault(f"{name} would hold NaN or infinity")
        return tensor

    def _record_fault(self, fault: str) -> None:
        with self._lock:
            if fault not in self.faults:
                self.faults.append(fault)

    def _count_used(self, change: Change) -> None:
        """Counts an adapter's tensors once for the layer that they belong to, whatever it makes in how many parts."""
        with self._lock:
            what = id(change) if change.layer is None else id(change.layer)
            if what not in self._done:
                self._done.add(what)
                self.used.update(key for key in change.keys)


def attach(skeleton: PreTrainedModel, configuration: LoraConfig, bare: Sequence[str] = ()) -> PeftModel:
    """Puts an adapter without values on a skeleton on the meta device.

    Raises:
        AdapterError: it is of a kind that is not supported, or PEFT refuses it.
    """
    fault = kinds.model_fault(configuration)
    refuse(AdapterError, "the adapter cannot be merged", [fault] if fault is not None else [])
    configuration.inference_mode, configuration.init_lora_weights = True, True
    puts = foreign.calling("PEFT cannot put the adapter on its base", AdapterError)
    with puts, patterns.without_false_alarms(configuration):
        model = put_on(skeleton, configuration, NAME)
    train_parameters(model, bare, NAME)
    return model


def read(model: PeftModel, entries: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> Merger:
    """Finds out what an adapter's tensors change in a model whose tensors have `shapes`; reads headers only.

    Raises:
        AdapterError: a tensor is missing, fits nowhere, has another shape, or gives what another gives too; or a layer
            is of a kind that cannot be merged. All faults together.
    """
    held, state = adapter_tensors.held(model, NAME), model.state_dict(keep_vars=True)
    tensors = {key: held[key] if key in held else state[key] for key in entries if key in held or key in state}
    faults = [f"the file lacks {key}" for key in held if key not in entries]
    faults += [f"the file holds {key}, which the model does not have" for key in entries if key not in tensors]
    faults += [
        f"{key} has shape {list(entries[key].shape.sizes)} in the file and {list(tensor.shape)} in the model"
        for key, tensor in tensors.items()
        if entries[key].shape.sizes != tuple(tensor.shape)
    ]
    faults += [
        f"{key} is {_name_dtype(entries[key].shape.dtype)} in the file and {_name_dtype(tensor.dtype)} in the model, "
        "and only one of them is a floating-point type"
        for key, tensor in tensors.items()
        if entries[key].shape.dtype.is_floating_point != tensor.is_floating_point()
    ]
    changes, strange = _sort_changes(model, tensors)
    faults += strange
    faults += [f"the base holds no {name}, which the adapter changes" for name in changes if name not in shapes]
    refuse(AdapterError, "the adapter does not fit the base", faults)
    parts = {
        key: owner for key, tensor in tensors.items() if (owner := _find_owners(model).get(id(tensor))) is not None
    }
    return Merger(entries, changes, parts)


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _find_owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    return {id(p): (module, name) for module in model.modules() for name, p in own_parameters(module).items()}


def _sort_changes(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Change], list[str]]:
    """Sorts an adapter's tensors by what they change in the plain model."""
    faults = _find_strange(model)
    keys: dict[int, list[str]] = {}
    for key, tensor in tensors.items():
        keys.setdefault(id(tensor), []).append(key)
    names = {id(p): name for kind, name, p in lookup.named_parameters(model) if kind not in ("lora", "tokens")}
    names |= {id(b): name for _, name, b in lookup.named_buffers(model)}
    changes: dict[str, Change] = {}
    for identity, found in keys.items():
        for key in found if identity in names else ():
            name = (
                names[identity] if len(found) == 1 else _strip_wrappers(key)
            )  # tied copies are one parameter of two names
            if name in changes:
                faults.append(f"{key} and {changes[name].keys[0]} both give {name}")
            changes[name] = Change(name, (key,))
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not isinstance(layer, _KINDS) or NAME not in layer.scaling:
            continue
        target = lookup.canonical(model, path)
        if strange := kinds.unfollowed(layer.get_base_layer()):
            faults.append(f"{target} has {strange}, which PEFT's update ignores, so it cannot be merged")
        own = [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]
        used = tuple(key for p in own for key in keys.get(id(p), ()))
        for name in _name_results(layer, target):
            given = changes.get(name)
            instead = None if given is None else given.keys[0]
            changes[name] = Change(name, used if instead is None else (*used, instead), layer, instead)
    changes |= _find_rows(model, keys)
    return changes, faults


def _find_rows(model: PeftModel, keys: Mapping[int, list[str]]) -> dict[str, Change]:
    """Returns what rows that are trained alone change: a module, and those that are tied to it, by the same tensor."""
    changes = {}
    for path, layer in tokens.layers(model):
        if NAME in layer.token_indices:
            name = f"{lookup.canonical(model, path)}.weight"
            delta = dict(layer.trainable_tokens_delta.named_parameters())[NAME]
            changes[name] = Change(name, tuple(keys[id(delta)]), tokens=tuple(layer.token_indices[NAME]))
    return changes


def _strip_wrappers(key: str) -> str:
    """Returns the name in the plain model of a tensor that is trained in full, from its key on disk."""
    return re.sub(r"\.(original_module|base_layer)(?=\.)", "", key.removeprefix("base_model.model."))


def _name_results(layer: LoraLayer, name: str) -> list[str]:
    if isinstance(layer, ParamWrapper):
        return [f"{name}.{layer.parameter_name}"]
    return [f"{name}.weight", f"{name}.bias"] if layer.lora_bias.get(NAME) else [f"{name}.weight"]


def _find_strange(model: PeftModel) -> list[str]:
    """Names what PEFT has put into the model and is not merged here."""
    faults = []
    for path, module in model.named_modules():
        strange = isinstance(module, BaseTunerLayer) and not isinstance(module, (*_KINDS, TrainableTokensLayer))
        strange |= isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(
            module, (ModulesToSaveWrapper, TrainableTokensWrapper, TrainedParameters)
        )
        if strange:
            faults.append(
                f"{lookup.canonical(model, path)} became {type(module).__name__}, which solidify cannot merge"
            )
        if isinstance(module, ModulesToSaveWrapper):
            inside = [name for name, m in module.original_module.named_modules() if isinstance(m, BaseTunerLayer)]
            if inside:
                faults.append(f"{lookup.canonical(model, path)} is trained in full and has a low-rank update inside")
    return faults


def _is_splittable(change: Change, shape: Shape) -> bool:
    """Returns whether rows of a tensor are merged without looking at other rows."""
    layer = change.layer
    if layer is None:
        return True
    if isinstance(layer, ParamWrapper):
        return len(shape.sizes) == 3
    if shape.nbytes <= _SPLIT or layer.lora_bias.get(NAME):
        return False
    variant = layer.lora_variant.get(NAME)
    if isinstance(layer, Linear):
        return not layer.fan_in_fan_out and type(variant).__name__ in ("NoneType", "DoraLinearVariant")
    return isinstance(layer, Embedding) and variant is None


def _make_entry(module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[dict[str, Any], str, nn.Parameter]:
    """Makes values, in the dtype of a module's own parameter, what stands in its place."""
    table = own_parameters(module)
    own = table[name]
    assert own is not None
    return table, name, nn.Parameter(tensor.to(own.dtype), requires_grad=False)


def _take_rows(
    layer: LoraLayer, location: tuple[nn.Module, str], tensor: torch.Tensor, rows: range | None, total: int
) -> torch.Tensor:
    """Returns what of an adapter's tensor belongs to some rows of the tensor that it changes."""
    if rows is None:
        return tensor
    part = slice(rows.start, rows.stop)
    owner, _ = location
    if isinstance(layer, ParamWrapper):
        # As its get_delta_weight takes them apart: A by experts first, B by experts last.
        if owner is layer.lora_A[NAME]:
            by_expert = tensor.reshape(total, -1, tensor.shape[-1])  # (experts, rank, in_features)
            return by_expert[part].reshape(-1, tensor.shape[-1])  # (experts of the part * rank, in_features)
        by_expert = tensor.reshape(tensor.shape[0], -1, total)  # (out_features, rank, experts)
        return by_expert[..., part].reshape(tensor.shape[0], -1)  # (out_features, rank * experts of the part)
    if isinstance(layer, Embedding):
        return tensor[:, part] if owner is layer.lora_embedding_A else tensor  # A: (rank, rows of the part)
    if owner is layer.lora_A[NAME]:
        return tensor  # (rank, in_features)
    return tensor[part]  # B: (rows of the part, rank); a magnitude: (rows of the part,)
