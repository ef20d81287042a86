"""What of a module no file brings back, seen before anything is written: each with what to do."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from solidify.model import anatomy
from solidify.model.operations import list_marks, shared_keys
from solidify.system import foreign
from solidify.upstream.torch import TENSOR_HOOKS, own_buffers, own_parameters, unsaved_buffers
from solidify.weights import storable

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def find_faults(module: nn.Module, within: str) -> list[str]:
    """Says why a module cannot be wrapped as it stands; `within` is the name that it will have."""
    if faults := [*_find_lazy(module, within), *_find_parametrized(module, within), *find_unstorable(module, within)]:
        return faults
    with anatomy.evaluation(module):
        module.train().eval()  # what is kept from one call to the next in evaluation alone is let go
        return [
            *_find_views(module, within),
            *_find_aliases(module, within),
            *_find_tensor_faults(module, within),
            *_find_state_faults(module, within),
        ]


def _find_lazy(module: nn.Module, within: str) -> Iterator[str]:
    names = [name for name, part in module.named_modules() if any(map(is_lazy, _list_own(part)))]
    if names:
        shown = ", ".join(f"{within}.{name}".rstrip(".") for name in names)
        yield f"{shown} has no shape yet (a lazy layer); call the module once on the example, and wrap it then"


def _list_own(part: nn.Module) -> list[torch.Tensor]:
    return [*part.parameters(recurse=False), *part.buffers(recurse=False)]


def _find_parametrized(module: nn.Module, within: str) -> Iterator[str]:
    for name, part in module.named_modules():
        where = f"{within}.{name}".rstrip(".")
        for key in dict(part.parametrizations.items()) if parametrize.is_parametrized(part) else ():
            yield (
                f"{where}.{key} is parametrized, by a class that torch makes at run time and no file holds; wrap the "
                f"module after torch.nn.utils.parametrize.remove_parametrizations({where}, {key!r}), or write the "
                "computation into a module of your own"
            )


def find_unstorable(module: nn.Module, within: str) -> Iterator[str]:
    """Names tensors that no file brings back: what the state holds, and what cannot be compared, wherever it is."""
    for name, part in module.named_modules():
        saved = {key: held for key, held in own_buffers(part).items() if key not in unsaved_buffers(part)}
        saved |= own_parameters(part)
        values = {key: value for key, value in vars(part).items() if key not in _OF_EVERY_MODULE}
        for key, value in {**values, **own_buffers(part), **saved}.items():
            where = f"{within}.{name}.{key}".replace("..", ".")
            tensors = [tensor for tensor in _walk_tensors(value, set()) if not is_lazy(tensor)]
            said = [w for t in tensors if (w := storable.say_layout(t) or _say_unsaved(t, key in saved))]
            if said:
                yield f"{where} {'is' if isinstance(value, torch.Tensor) else 'holds'} {said[0]}"


def _say_unsaved(tensor: torch.Tensor, saved: bool) -> str:
    """Says why a tensor of a state is not saved, or not loaded as it is."""
    if not saved:
        return ""
    if tensor.is_meta:
        return "a tensor without values (on the meta device); fill it first"
    if unstorable := storable.say_unstorable(tensor):
        return unstorable
    if isinstance(tensor, nn.Parameter) and tensor.is_complex() and tensor.requires_grad:
        return "a complex parameter, which transformers loads frozen; hold it as real numbers (torch.view_as_real)"
    if tensor.is_conj() or tensor.is_neg():
        return "conjugated or negated as it is read (a view); make it one of its own: resolve_conj().resolve_neg()"
    return ""


def _find_tensor_faults(module: nn.Module, within: str) -> Iterator[str]:
    """Names tensors of a class of their own, with hooks, or with what cannot be set on those that are loaded."""
    for table, usual in ((module.named_parameters, nn.Parameter), (module.named_buffers, torch.Tensor)):
        for key, tensor in table():
            if type(tensor) not in (usual, nn.Parameter):
                yield (
                    f"{within}.{key} is a {type(tensor).__name__}, and loading makes a plain {usual.__name__} of it; "
                    f"wrap the module with a plain one there"
                )
            if any(getattr(tensor, hooks, None) for hooks in TENSOR_HOOKS):
                yield (
                    f"{within}.{key} has hooks of its own (register_hook or register_post_accumulate_grad_hook), which "
                    "no artifact carries; remove them, and register them where the artifact is trained"
                )
            for mark, value in list_marks(tensor).items():
                if isinstance(value, nn.Module) or any(True for _ in _walk_tensors(value, set())):
                    yield (
                        f"{within}.{key}.{mark} is {type(value).__name__}, set on a parameter or buffer, and would be "
                        "lost; set it on the module, or register it there (register_buffer)"
                    )


def _find_state_faults(module: nn.Module, within: str) -> Iterator[str]:
    """Says where a state is not the parameters and the buffers by their names, which alone a file brings back."""
    extra = [
        f"{within}.{name}".rstrip(".")
        for name, part in module.named_modules()
        if type(part).get_extra_state is not nn.Module.get_extra_state
    ]
    if extra:
        yield (
            f"{', '.join(extra)} has state beside tensors (get_extra_state), which weight files do not hold; keep it "
            "in buffers (register_buffer), or in attributes without get_extra_state"
        )
        return
    expected = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for name, part in module.named_modules(remove_duplicate=False):
        saved = [
            key for key, held in own_buffers(part).items() if held is not None and key not in unsaved_buffers(part)
        ]
        expected += [f"{name}.{key}".lstrip(".") for key in saved]
    outcome = foreign.attempt(module.state_dict)
    if outcome.value is None:
        yield f"{within}.state_dict() fails: {foreign.said(outcome.error) if outcome.error else 'it returns nothing'}"
        return
    lacking, further = sorted({*expected} - {*outcome.value}), sorted({*outcome.value} - {*expected})
    if lacking or further:
        words = [f"lacks {', '.join(lacking[:3])}"] if lacking else []
        words += [f"holds {', '.join(further[:3])}, which is no parameter or buffer of that name"] if further else []
        yield (
            f"{within}.state_dict() {' and '.join(words)}; what a class renames or leaves out in its state "
            "(state_dict, _save_to_state_dict, hooks) does not come back: wrap a module without that"
        )


def _find_views(module: nn.Module, within: str) -> Iterator[str]:
    """Names the tensors that share memory and are not one tensor: files keep each by itself, and would part them."""
    first: dict[int, str] = {}
    later = shared_keys(module)
    for table in (module.named_parameters, module.named_buffers):
        for key, tensor in table(remove_duplicate=False):
            if tensor.numel() and not tensor.is_meta and key not in later:
                other = first.setdefault(_memory_of(tensor), key)
                if other != key:
                    yield (
                        f"{within}.{key} and {within}.{other} are views of one memory; make them one tensor (one "
                        "nn.Parameter at both names is a tie, and stays one), or give each its own by clone()"
                    )


def _find_aliases(module: nn.Module, within: str) -> Iterator[str]:
    """Names the attributes that hold a parameter or a buffer again: loading puts others in their places."""
    registered = {
        _memory_of(tensor): f"{within}.{key}"
        for table in (module.named_buffers, module.named_parameters)
        for key, tensor in table()
        if tensor.numel() and not tensor.is_meta
    }
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key in _OF_EVERY_MODULE or (key == "_flat_weights" and isinstance(part, nn.RNNBase)):  # torch keeps it
                continue
            tensors = [tensor for tensor in _walk_tensors(value, set()) if tensor.numel()]
            held = next((registered[m] for tensor in tensors if (m := _memory_of(tensor)) in registered), "")
            if held:
                where = f"{within}.{name}.{key}".replace("..", ".")
                yield (
                    f"{where} holds the memory of {held} again, and would not follow it when the model is loaded or "
                    "moved; read that one in its place, register it (a nn.ParameterList, for a list), or keep a copy "
                    "(clone())"
                )


def _walk_tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yields the tensors in a value, however it is nested; modules of torch and of Python are not looked through."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (nn.Module, type, types.ModuleType)):
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, Mapping):
            waiting += each.values()
        elif isinstance(each, (list, tuple, set, frozenset)):
            waiting += each
        elif not callable(each):
            waiting += getattr(each, "__dict__", {}).values()


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
