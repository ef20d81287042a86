"""What a new module is to match of the module that it replaced: which tensor of a call, and how far apart two are.

A unit is what is run and compared: a replaced module, or (`block`) the layer that holds it. Its calls are those that
the unmodified base makes, so that every unit can learn by itself, whatever becomes of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from solidify.errors import HealingError, refuse
from solidify.surgery import contract

AT = {
    "output": "what the module returns",
    "heads": "what goes into its output projection: the heads' outputs, side by side",
    "mixing": "how each position mixes the others: the attention weights",
    "block": "what the layer that holds the module returns",
}
DISTANCES = {
    "mse": "the squared error over the target's squared norm",
    "cosine": "one minus the cosine between what is matched and its target",
}
PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin")  # output projections, by transformers' names


@dataclass(frozen=True)
class Unit:
    """What is run and compared: `name` in the model, and the replaced `members` within it, by full names."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One call of a unit in the unmodified base: what it was given, and the tensor to match
    (batch_size, sequence_length, ...), for attention weights (batch_size, num_heads, sequence_length, keys)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: torch.Tensor


class LeftError(Exception):
    """Ends a forward pass of which the rest is of no interest."""


def units(model: nn.Module, names: Sequence[str], at: str) -> list[Unit]:
    """Returns the units of the replaced modules, in the order of `names`.

    Raises:
        HealingError: a layer is asked for, and a module stands in none.
    """
    if at != "block":
        return [Unit(name, (name,)) for name in names]
    found: dict[str, list[str]] = {}
    faults = []
    for name in names:
        layer = layer_of(model, name)
        if layer is None:
            faults.append(f"{name} stands in no layer of a list; match its output instead")
        else:
            found.setdefault(layer, []).append(name)
    refuse(HealingError, "no layer can be matched", faults)
    return [Unit(layer, tuple(members)) for layer, members in found.items()]


def layer_of(model: nn.Module, name: str) -> str | None:
    """Returns the full name of the outermost item of a list of layers that holds a module, or is it."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        if parts[end].isdigit() and isinstance(model.get_submodule(".".join(parts[:end])), nn.ModuleList):
            return ".".join(parts[: end + 1])
    return None


def list_layers(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns the layers up to the last that holds one of the modules, in order.

    Raises:
        HealingError: a module stands in no list of layers, or in another than the rest.
    """
    layers = {name: layer_of(model, name) for name in names}
    faults = [f"{name} stands in no list of layers" for name, layer in layers.items() if layer is None]
    found = [layer for layer in layers.values() if layer is not None]
    lists = sorted({layer.rpartition(".")[0] for layer in found})
    if len(lists) > 1:
        faults.append(f"the modules stand in several lists of layers ({', '.join(lists)})")
    refuse(HealingError, "the model cannot be run layer by layer; call with stream=False", faults[:4])
    last = max((int(layer.rpartition(".")[2]) for layer in found), default=-1)
    return [f"{lists[0]}.{number}" for number in range(last + 1)]


@dataclass
class Watch:
    """What was seen of one call of a unit."""

    given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    value: torch.Tensor | None = None


@contextmanager
def watching(unit: nn.Module, name: str, at: str, *, given: bool = False) -> Iterator[Watch]:
    """While the block lasts, keeps the tensor to match of the unit's latest call; with `given`, what it was given too.

    Raises:
        HealingError: the module has no output projection that can be recognised.
    """
    watch = Watch()

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps what the unit is given, as it is at this moment."""
        watch.given = (contract.copied(args), contract.copied(kwargs))

    def projecting(_module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keeps what the output projection is given."""
        watch.value = args[0].clone() if given else args[0]

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        """Keeps what the unit returns: its first tensor, or the attention weights beside it."""
        found = contract.tensors_in(output)
        if at == "mixing":
            weights = [tensor for tensor in found[1:] if tensor.ndim == 4]
            found = weights
        if found:
            watch.value = (
                found[0].clone() if given else found[0]
            )  # of the base: families write into what modules return

    with ExitStack() as stack:
        if given:
            stack.callback(unit.register_forward_pre_hook(before, with_kwargs=True).remove)
        if at == "heads":
            stack.callback(_find_projection(unit, name).register_forward_pre_hook(projecting).remove)
        else:
            stack.callback(unit.register_forward_hook(after).remove)
        yield watch


def projection_fault(unit: nn.Module, name: str) -> str | None:
    """Says that a module has no output projection whose name is known; None of one that has."""
    children = dict(unit.named_children())
    if any(key in children for key in PROJECTIONS):
        return None
    return (
        f"{name}: {type(unit).__name__} has no output projection that is known here ({', '.join(PROJECTIONS)}), but "
        f"{', '.join(children) or 'no parts'}; match its output instead"
    )


def _find_projection(unit: nn.Module, name: str) -> nn.Module:
    if (fault := projection_fault(unit, name)) is not None:
        raise HealingError(fault)
    children = dict(unit.named_children())
    return next(children[key] for key in PROJECTIONS if key in children)


def require(watch: Watch, name: str, at: str, whose: str) -> torch.Tensor:
    """Returns the tensor that was seen.

    Raises:
        HealingError: the unit was not called, or returned no such tensor.
    """
    if watch.value is None:
        words = "returns no attention weights (the second of what attention returns)" if at == "mixing" else ""
        raise HealingError(
            f"{name}: the {whose} {words or 'was not called, or returns no tensor'}; match another tensor"
        )
    return watch.value


def measure(
    found: torch.Tensor, call: Call, mask: torch.Tensor | None, distance: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how far a tensor is from the target of a call, and by what to divide: sums over attended tokens.

    `mask` (batch_size, sequence_length) is 1 where there is a token. The quotient of the two, or of two sums of them,
    is the relative error; for `cosine`, the mean of one minus the cosine.

    Raises:
        HealingError: the shapes differ.
    """
    target = call.target
    if found.shape != target.shape:
        raise HealingError(
            f"the new module gives {list(found.shape)} where the module that it replaced gave {list(target.shape)}; "
            "match another tensor"
        )
    ours, theirs = _make_rows(found.float(), mask), _make_rows(target.float(), mask)
    if distance == "cosine":
        alike = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)
        return (1 - alike).sum(), torch.tensor(float(alike.numel()), device=alike.device)
    return (ours - theirs).square().sum(), theirs.square().sum()


def _make_rows(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns a vector of every attended token (tokens, size); of attention weights (tokens, heads · keys)."""
    if mask is None:
        return tensor.reshape(-1, tensor.shape[-1])
    attended = mask.bool()
    if tensor.ndim == 4 and tensor.shape[0] == mask.shape[0] and tensor.shape[2] == mask.shape[1]:
        tensor = tensor.transpose(1, 2)  # (batch_size, num_heads, queries, keys)
    if tensor.shape[:2] == mask.shape:
        return tensor[attended].flatten(1)  # (batch_size, sequence_length, ...) -> (tokens, size)
    if tensor.shape[0] == mask.numel():
        return tensor[attended.flatten()].flatten(1)  # a block that flattens its tokens
    return tensor.reshape(-1, tensor.shape[-1])


def attended(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Returns which positions of a batch are tokens (batch_size, sequence_length); None where nothing says so."""
    mask = batch.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
