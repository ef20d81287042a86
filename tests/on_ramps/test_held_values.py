"""Values that a module holds come back as they were, their classes too, or are refused in one sentence."""

from __future__ import annotations

import collections
import json
import math
import types
from pathlib import Path
from typing import Any

import held_nets
import numpy as np
import pico
import pytest
import torch
from torch.nn import functional

import solidify
from solidify.errors import ModelError

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
KEPT: dict[str, Any] = {
    "number": held_nets.Rate(0.1),
    "text": [held_nets.Word("a")],
    "numpy": {"rates": [np.float64(0.1), np.int64(2)], "more": (np.float32(0.1), np.bool_(True))},
    "flags": held_nets.Ways.HERE | held_nets.Ways.THERE,
    "no flag": held_nets.Ways(0),
    "ordered": collections.OrderedDict(b=1, a=2),
    "nested": held_nets.nest(50),
    "row": held_nets.Row([1, [2]]),
}


def test_values_come_back_with_their_classes(tmp_path: Path) -> None:
    module = held_nets.Held(5, KEPT).eval()
    pico.artifact(solidify.wrap(module, {"inputs": X}), [], tmp_path / "net")
    found = solidify.load(tmp_path / "net").module.value
    assert list_kinds(found) == list_kinds(KEPT)
    assert json.loads((tmp_path / "net" / "config.json").read_text())["surgery"][0]["arguments"]["empty"] == {}


def list_kinds(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value).__name__, [(key, list_kinds(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [list_kinds(each) for each in value]
    return type(value).__name__, getattr(value, "value", value)


def test_what_is_not_a_number_comes_back(tmp_path: Path) -> None:
    """It is not equal to itself; the fresh process took it for another value."""
    solidify.build(solidify.wrap(held_nets.Held(5, float("nan")), {"inputs": X}), [], tmp_path / "net")
    assert math.isnan(solidify.load(tmp_path / "net").module.value)


REFUSED: dict[str, tuple[Any, str]] = {
    "a module of Python": (functional, r"module\.value is module, which config.json cannot hold"),
    "another": (np, r"module\.value is module, which config.json cannot hold"),
    "what holds itself": (held_nets.hold_itself(), r"module\.value holds itself, or is nested too deep"),
    "what is nested deep": (held_nets.nest(900), r"module\.value holds itself, or is nested too deep"),
    "an operator": (torch.ops.aten.relu, r"module\.value is .* which config.json cannot hold"),
    "a mapping with a default": (collections.defaultdict(list), r"module\.value is defaultdict, which config.json"),
    "a mapping that counts": (collections.Counter("aab"), r"module\.value is Counter, which config.json cannot hold"),
    "half a character": ("a\ud800b", r"module\.value is 'a.ud800b', which has half a character in it"),
    "half a character as a key": ({"a\ud800b": 1}, r"module\.value is 'a.ud800b', which has half a character in it"),
    "a list that remembers": (held_nets.remember(), r"module\.value is \[1\] \(Row\), and \[1\] \(list\)"),
    "a view": (types.MappingProxyType({"a": 1}), r"module\.value is mappingproxy, which config.json cannot hold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_configuration_holds_is_refused(case: str) -> None:
    value, words = REFUSED[case]
    with pytest.raises(ModelError, match=words):
        solidify.wrap(held_nets.Held(5, value), {"inputs": X})
