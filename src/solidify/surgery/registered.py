"""What torch keeps of two modules beside the names, shapes and values of tensors: whether it is the same.

Where a module stands a second time, the order of children and tensors, places with nothing there, what a state leaves
out, and hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from solidify.upstream.torch import every_hook, own_buffers, own_modules, own_parameters, unsaved_buffers


def table_faults(module: nn.Module, again: nn.Module, within: str) -> Iterator[str]:
    """Names where two modules of the same parts differ in what is registered in them, each in a sentence."""
    mine, theirs = (dict(each.named_modules(remove_duplicate=False)) for each in (module, again))
    places = [_find_first_places(parts) for parts in (mine, theirs)]
    for name in mine.keys() & theirs.keys():
        where = f"{within}.{name}".strip(".") if name else within
        if places[0][name] != places[1][name]:
            words = [f"the module at {within}.{place[name]}" if place[name] != name else "its own" for place in places]
            yield f"{where} is {words[0]}, and {words[1]}"
        yield from _compare_tables(mine[name], theirs[name], where)


def _find_first_places(parts: dict[str, nn.Module]) -> dict[str, str]:
    """Maps every name to the first at which the same module stands."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(part), name) for name, part in parts.items()}


def _compare_tables(part: nn.Module, other: nn.Module, where: str) -> Iterator[str]:
    for read in (own_parameters, own_buffers, own_modules):
        found, expected = _list_places(read(part)), _list_places(read(other))
        if found != expected:
            yield f"{where} holds {_join_places(found)}, and {_join_places(expected)}, in this order"
    for key in sorted(unsaved_buffers(part) ^ unsaved_buffers(other)):
        words = ["left out of" if key in unsaved_buffers(each) else "saved in" for each in (part, other)]
        yield f"{where}.{key} is {words[0]} its state, and {words[1]} it"
    counts = [{kind: len(hooks) for kind, hooks in every_hook(each).items()} for each in (part, other)]
    for kind in counts[0]:
        if counts[0][kind] != counts[1][kind]:
            yield f"{where} has {counts[0][kind]} hooks {kind}, and {counts[1][kind]}"


def _list_places(table: dict[str, Any]) -> list[str]:
    return [key if held is not None else f"{key} (empty)" for key, held in table.items()]


def _join_places(names: list[str]) -> str:
    return ", ".join(names) or "nothing"
