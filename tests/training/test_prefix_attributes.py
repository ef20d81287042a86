"""Attributes where hardly anybody looks for them: with `cache_prefix` a change is computed anew."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import Around, both, put, small, train
from torch import nn

import solidify
from solidify.errors import ObjectiveError


class List(list[Any]):
    pass


class Table(dict[str, Any]):
    pass


class Pair(tuple[int, ...]):
    pass


class Number(float):
    pass


class Kind(enum.Enum):
    ONE = 1


class Base:
    __slots__ = ("by",)
    by: float


class Derived(Base):
    """Has attributes beside the slots of its base."""


class Alone:
    __slots__ = "by"
    by: float


class Private:
    __slots__ = ("__by",)

    @property
    def by(self) -> float:
        return self.__by

    @by.setter
    def by(self, value: float) -> None:
        self.__by = value


@dataclass(slots=True)
class Data:
    by: float = 1.0


class Slotted(nn.Linear):
    __slots__ = ("by",)


class Holding(Around):
    """Multiplies by an attribute of what it holds."""

    def __init__(self, inner: nn.Module, held: Any) -> None:
        super().__init__(inner)
        self.held = held
        self.held.by = 1.0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.held.by


class Factor:
    """A descriptor."""

    def __init__(self) -> None:
        self.by = 1.0

    def __get__(self, instance: Any, owner: Any = None) -> float:
        return self.by


class Described(Around):
    by = Factor()
    scaled = functools.partialmethod(lambda self, factor: factor[0], [1.0])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.by * self.scaled()


HELD: dict[str, Callable[[], Any]] = {
    "a parameter": lambda: nn.Parameter(torch.ones(1), requires_grad=False),
    "a buffer": lambda: nn.Buffer(torch.ones(1)),
    "a tensor": lambda: torch.ones(1),
    "a list": List,
    "a mapping": Table,
    "a tuple": Pair,
    "a number": lambda: Number(1.0),
    "a member of an enumeration": lambda: Kind.ONE,
    "slots of a base": Derived,
    "one slot": Alone,
    "a private slot": Private,
    "a dataclass with slots": Data,
    "slots of a module": lambda: Slotted(1, 1),
}


@pytest.mark.parametrize("what", HELD)
def test_an_attribute_anywhere_is_told(what: str, tmp_path: Path) -> None:
    def prepare(model: Any) -> None:
        layer = model.model.layers[0]
        layer.mlp = Holding(layer.mlp, HELD[what]())

    plain, found, cached = both(
        tmp_path / "kept", prepare, lambda model: setattr(model.model.layers[0].mlp.held, "by", 3)
    )
    assert found == plain != train(small(prepare))
    assert (cached.computed, cached.read) == (4, 2)


@pytest.mark.parametrize("name", ["by", "scaled"])
def test_a_descriptor_of_a_class_is_told(name: str, tmp_path: Path) -> None:
    def change(_: Any) -> None:
        if name == "by":
            vars(Described)["by"].by = 3.0
        else:
            vars(Described)["scaled"].args[0][0] = 3.0

    def put_back() -> None:
        vars(Described)["by"].by = vars(Described)["scaled"].args[0][0] = 1.0

    plain = train(small(put(Described, 0)), change)
    put_back()
    model = small(put(Described, 0))
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        found = train(model, change)
    put_back()
    assert found == plain != train(small(put(Described, 0)))
    assert (cached.computed, cached.read) == (4, 2)


class Loose(Around):
    """Holds a table that is no buffer."""

    place = 250_000

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.table = torch.ones(600_000)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.table[self.place]


def write_loose(model: Any) -> None:
    model.model.layers[0].mlp.table.numpy()[Loose.place] = 3


class Less(Loose):
    """Holds a small one."""

    place = 10_000

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.table = torch.ones(100_000)


def write_less(model: Any) -> None:
    model.model.layers[0].mlp.table.data[Less.place] = 3


def test_a_loose_tensor_is_read_whole(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"model\.layers\.0\.mlp\.table was written to through `\.data`"):
        both(tmp_path / "kept", put(Loose, 0), write_loose)
    plain, found, cached = both(tmp_path / "kept", put(Less, 0), write_less)
    assert found == plain
    assert (cached.computed, cached.read) == (4, 2)
