"""Which layout the experts of an adapter's files have, and the same adapter in ours, which is PEFT's fused one.

What is marked is believed; keys and shapes tell some layouts apart. What only its trainer can tell is refused, unless
`layout` says it. docs/expert_lora.md lists what is found by what.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft.utils import CONFIG_NAME
from torch import nn

from solidify.adapter import configured, expert_lists
from solidify.adapter import expert_layouts as layouts
from solidify.errors import AdapterError, refuse
from solidify.system import disk, files, foreign
from solidify.upstream.torch import own_parameters
from solidify.weights import format

FINDING = "layout of the experts"
_GRANTED = "nothing marks another, and nothing speaks of another trainer"
_LAST_TURNED = (0, 19, 0)  # until then, PEFT took the in_features of most experts for their out_features


@dataclass(frozen=True)
class Reading:
    """An adapter in our layout: where it stands, which layout its experts had (None: it has none), and how we know.

    `sure` is whether something says so; where nothing does, PEFT's layout is taken for granted.
    """

    directory: Path
    layout: str | None = None
    words: str = ""
    sure: bool = False


@dataclass(frozen=True)
class Pair:
    """The two keys of one fused parameter of a module `owner`, its name, and its shape in the model."""

    a: str
    b: str
    name: str
    shape: tuple[int, ...]
    transposed: bool
    owner: str

    @property
    def full_name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.owner}.{self.name}"

    @property
    def in_features(self) -> int:
        """The width of what an expert takes."""
        return self.shape[1] if self.transposed else self.shape[2]

    @property
    def out_features(self) -> int:
        """The width of what it returns."""
        return self.shape[2] if self.transposed else self.shape[1]


@contextmanager
def in_own_layout(directory: Path, model: nn.Module, layout: str | None = None) -> Iterator[Reading]:
    """Yields an adapter of plain PEFT's form in our layout of experts: as it stands, or rewritten in a temporary place.

    `model` may be on the meta device; `layout` is one of `layouts.NAMES`, where the files do not tell.

    Raises:
        AdapterError: its layout is not known, or another than `layout`; or it cannot be written in ours.
    """
    title = f"the adapter {directory} cannot be used"
    if layout is not None and layout not in layouts.NAMES:
        raise AdapterError(f"the layout {layout!r} is not known; take one of {', '.join(layouts.NAMES)}")
    configured.read(directory, marked=True)  # its kind first: of other kinds nothing is looked at
    document, header = configured.document(directory), format.read_header(directory / configured.WEIGHTS)
    shapes = {key: entry.shape.sizes for key, entry in header.items()}
    apart, pairs = expert_lists.layout(shapes, model), find_pairs(shapes, document, model)
    if apart is None and not pairs:
        refuse(AdapterError, title, [f"it holds no experts that have a layout ({layout})"] if layout else [])
        yield Reading(directory)
        return
    if apart is not None:
        other = f"its experts are {layouts.NAMES[apart]} ({apart}), and the layout is said to be {layout}"
        refuse(AdapterError, title, [other] if layout not in (None, apart) else [])
        with disk.temporary() as scratch:
            words = _write_fused(directory, scratch, document, apart, model)
            yield Reading(
                scratch, apart, "; ".join([f"its experts are laid out {layouts.NAMES[apart]} (by their keys)", *words])
            )
        return
    orders, why = _orders(directory, document, pairs, layout, title)
    turned = _find_turned(pairs, shapes, document, layout, title)
    found = layouts.GROUPED if layouts.GROUPED in orders.values() else layouts.PEFT
    told = f"its experts have {layouts.NAMES[found]} ({why})"
    if not turned and found == layouts.PEFT:
        yield Reading(directory, found, told, why != _GRANTED)
        return
    told += ", with in and out exchanged, as PEFT had them until 0.19.0" if turned else ""
    with disk.temporary() as scratch:
        _write_ordered(directory, scratch, document, pairs, orders, turned)
        yield Reading(scratch, found, told, why != _GRANTED)


def refuse_layout(directory: Path, layout: str | None) -> None:
    """Refuses a layout that is said of an adapter which solidify saved: it has ours.

    Raises:
        AdapterError: another layout than ours is said.
    """
    if layout not in (None, layouts.PEFT):
        raise AdapterError(
            f"{directory} was saved by solidify, in {layouts.NAMES[layouts.PEFT]}, and the layout is said to "
            f"be {layout}; leave that out"
        )


def find_pairs(shapes: Mapping[str, Sequence[int]], document: Mapping[str, Any], model: nn.Module) -> list[Pair]:
    """Finds the factors of fused parameters."""
    words = document.get("target_parameters") or ()
    pairs = []
    for path, owner in expert_lists.owners(model).items():
        held = {name: p for name, p in own_parameters(owner).items() if p is not None}
        names = [n for n in held if f"{path}.{n}" in words or any(f"{path}.{n}".endswith(f".{word}") for word in words)]
        for name, (a, b) in expert_lists.factor_keys(path, names).items():
            shape = tuple(held[name].shape)
            if a in shapes and b in shapes and len(shape) == 3 and len(shapes[a]) == len(shapes[b]) == 2:
                pairs.append(Pair(a, b, name, shape, bool(vars(owner).get("is_transposed", False)), path))
    return [p for p in pairs if shapes[p.a][0] % p.shape[0] == 0 and shapes[p.a][0] == shapes[p.b][1]]


def _orders(
    directory: Path, document: Mapping[str, Any], pairs: Sequence[Pair], layout: str | None, title: str
) -> tuple[dict[str, str], str]:
    """Returns the order of each pair's columns, by the key of its A, and how that is known."""
    marks = configured.marks(document, configured.metadata(directory / configured.WEIGHTS))
    refuse(AdapterError, title, configured.unknown_marks(marks))
    general, single = configured.orders(marks)
    if len(set(general.values())) > 1:
        raise AdapterError(
            f"{title}: its marks contradict each other ({', '.join(f'{k}: {marks[k]}' for k in general)})"
        )
    if lost := {key for key, order in single.items() if order != layouts.PEFT} - {pair.name for pair in pairs}:
        raise AdapterError(
            f"{title}: it marks the order of parameters of which it holds no update "
            f"({', '.join(f'{name}.lora_B_layout' for name in sorted(lost))}); correct the marks in its {CONFIG_NAME}"
        )
    whole = next(iter(general.values()), None)
    orders = {pair.a: single.get(pair.name, whole) for pair in pairs}
    marked = {order for order in orders.values() if order is not None}
    if marked:
        if layout is not None and {layout} != marked:
            raise AdapterError(
                f"{title}: it marks the layout of its experts as {' and '.join(sorted(marked))}, and the layout is "
                f"said to be {layout}; leave that out, or correct the mark in its {CONFIG_NAME}"
            )
        return {key: order or layouts.PEFT for key, order in orders.items()}, "marked by `lora_B_layout`"
    if layout is not None:
        if layout not in layouts.ORDERS:
            raise AdapterError(f"{title}: its experts are fused, and the layout is said to be {layout}")
        return dict.fromkeys(orders, layout), "as was said"
    trace = _trace_of_unsloth(directory, document)
    if trace and any(_rank_of(pair, directory) > 1 and pair.shape[0] > 1 for pair in pairs):
        raise AdapterError(
            f"{title}: the order of its experts is not known: it comes from Unsloth ({trace}) and carries no mark "
            "(`lora_B_layout`); that trainer stored them grouped by expert until September 2026 and as PEFT does since "
            "then, and both have the same shapes; say which it is (--layout grouped or --layout peft, in Python "
            "layout='grouped' or layout='peft')"
        )
    return dict.fromkeys(orders, layouts.PEFT), _GRANTED


def _rank_of(pair: Pair, directory: Path) -> int:
    return int(format.read_header(directory / configured.WEIGHTS)[pair.a].shape.sizes[0]) // pair.shape[0]


def _trace_of_unsloth(directory: Path, document: Mapping[str, Any]) -> str:
    """Says by what an unmarked adapter can be told to come from Unsloth; empty when nothing speaks of it."""
    base = str(document.get("base_model_name_or_path") or "")
    if base.split("/")[0] == "unsloth" or "/unsloth/" in base:
        return f"its base is {base}"
    mapping = document.get("auto_mapping")
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        return f"its {CONFIG_NAME} says unsloth_fixed"
    card = directory / "README.md"
    if files.is_file(card) and "unsloth" in (foreign.attempt(files.text, card).value or "").lower():
        return "its README.md names it"
    return ""


def _find_turned(
    pairs: Sequence[Pair],
    shapes: Mapping[str, Sequence[int]],
    document: Mapping[str, Any],
    layout: str | None,
    title: str,
) -> set[str]:
    """Returns, by the keys of their A, the pairs whose A has the width of the outputs.

    PEFT until 0.19.0 stored experts of (experts, out, in) so, and 0.19.0 alone those of (experts, in, out), too.
    """
    found: set[str] = set()
    for transposed in (False, True):
        some = [pair for pair in pairs if pair.transposed == transposed]
        told = {
            shapes[pair.a][1] == pair.out_features
            for pair in some
            if pair.out_features != pair.in_features and {shapes[pair.a][1], shapes[pair.b][0]} == set(pair.shape[1:])
        }
        square = bool(some) and all(pair.out_features == pair.in_features for pair in some)
        if told == {True} or (square and _was_turned_by(document, transposed, layout, title, some[0])):
            found |= {pair.a for pair in some}
    return found  # shapes that fit neither way are told where the adapter is put on the model


def _was_turned_by(document: Mapping[str, Any], transposed: bool, layout: str | None, title: str, pair: Pair) -> bool:
    """Returns whether the version of PEFT that wrote an adapter exchanged in and out."""
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(document.get("peft_version")))
    if version is not None:
        number = tuple(map(int, version.groups()))
        return number == _LAST_TURNED if transposed else number <= _LAST_TURNED
    if layout is not None:
        return False
    raise AdapterError(
        f"{title}: its experts are square ({pair.name}: {list(pair.shape[1:])}) and its {CONFIG_NAME} names no "
        "`peft_version`, so that nothing tells whether PEFT until 0.19.0 wrote it, with in and out exchanged; write "
        "the version there, or say the layout (--layout peft)"
    )


def _write_ordered(
    directory: Path,
    scratch: Path,
    document: Mapping[str, Any],
    pairs: Sequence[Pair],
    orders: Mapping[str, str],
    turned: Collection[str],
) -> None:
    tensors = safetensors.torch.load_file(directory / configured.WEIGHTS)
    for pair in pairs:
        factors = layouts.unpack(tensors[pair.a], tensors[pair.b], pair.shape[0], orders[pair.a])
        factors = layouts.turn(factors) if pair.a in turned else factors
        tensors[pair.a], tensors[pair.b] = layouts.pack(factors)
    write_files(scratch, configured.unmarked(document), tensors)


def _write_fused(
    directory: Path, scratch: Path, document: Mapping[str, Any], apart: str, model: nn.Module
) -> list[str]:
    tensors = safetensors.torch.load_file(directory / configured.WEIGHTS)
    try:
        found = expert_lists.gather(apart, tensors, model)
        changed, state, words = expert_lists.fused(found, configured.unmarked(document), model)
    except ValueError as error:
        raise AdapterError(f"the adapter {directory} cannot be used: {error}") from error
    write_files(scratch, changed, state)
    return words


def write_files(
    directory: Path, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], **marks: str
) -> None:
    """Writes the files of an adapter; `marks` go into the header of its weights."""
    (directory / CONFIG_NAME).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    state = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}  # gate and up may share their A
    safetensors.torch.save_file(state, directory / configured.WEIGHTS, {"format": "pt", **marks})
