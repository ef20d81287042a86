"""What layers read, draw and leave outside of themselves: with `cache_prefix` it is looked at, or refused."""

from __future__ import annotations

import importlib
import math
import os
import sysconfig
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from frozen import Around, both, put, small, train
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaMLP, eager_attention_forward
from transformers.utils import logging

import solidify
from solidify.errors import ObjectiveError


class Learned(nn.Module):
    """A factor that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))


class Scaled(Around):
    """Multiplies by a factor, which may be a module that it does not register."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.factor: Any = [None]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = super().forward(hidden_states) * self.factor[0].weight
        return found


def share_learned(model: Any) -> None:
    """Lets the last frozen layer, and the one that learns, multiply by the same factor."""
    put(Scaled, 2)(model)
    put(Scaled, 3)(model)
    own = Learned()
    model.model.layers[3].self_attn.factor = own
    for layer in model.model.layers[2:]:
        layer.mlp.factor = [own]


def test_a_layer_that_returns_what_depends_on_what_learns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"model\.layers\.2 returns something that depends on what learns"):
        both(tmp_path / "kept", share_learned)


class Fresh(Around):
    """Draws random numbers of a generator that it makes in each pass."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * float(np.random.default_rng().normal())


def test_random_numbers_of_no_known_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"model\.layers returns something else when one batch is run twice"):
        both(tmp_path / "kept", put(Fresh, 0))
    assert not list((tmp_path / "kept").iterdir())


def write_between(model: Any) -> None:
    """Lets the model multiply what each layer returns, in place, by an attribute of its own."""

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = self.rotary_emb(hidden, position_ids=positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=positions)
            hidden.mul_(self.ramp)
        return types.SimpleNamespace(
            last_hidden_state=self.norm(hidden), past_key_values=None, hidden_states=None, attentions=None
        )

    model.model.ramp = 1.0
    model.model.forward = types.MethodType(forward, model.model)


def test_what_is_written_to_between_two_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=r"model\.layers\.1 is given .* and what was written to in between"):
        both(tmp_path / "kept", write_between)


NUMBER, TABLE, TENSOR, LIST = 1.0, {"by": 1.0}, torch.ones(1), [1.0]
GENERATOR = torch.Generator()


def read_number(hidden_states: torch.Tensor) -> torch.Tensor:
    return hidden_states * NUMBER


class Reading(Around):
    """Multiplies by what is read outside of the layer; each class below reads something else."""

    by = 1.0

    def helped(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


class OfClass(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.by


class OfHelper(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.helped(super().forward(hidden_states))


class OfNumber(Reading):
    def helped(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * NUMBER

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.helped(super().forward(hidden_states))


class OfFunction(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return read_number(super().forward(hidden_states))


class OfModule(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * far.NUMBER


far = types.ModuleType("far")


def change_helper(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reading, "helped", lambda self, hidden_states: hidden_states * 3)


def change_number(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(globals(), "NUMBER", 3.0)


TOLD: dict[str, tuple[type[Reading], Callable[[pytest.MonkeyPatch], None]]] = {
    "an attribute of a class": (OfClass, lambda patch: patch.setattr(Reading, "by", 3.0)),
    "a method of a class": (OfHelper, change_helper),
    "a number in a file": (OfNumber, change_number),
    "a number in a file, by a function": (OfFunction, change_number),
    "a number in another file": (OfModule, lambda patch: patch.setattr(far, "NUMBER", 3.0)),
}


@pytest.mark.parametrize("what", TOLD)
def test_what_code_reads_is_told(what: str, tmp_path: Path) -> None:
    far.NUMBER = 1.0  # type: ignore[attr-defined]
    kind, change = TOLD[what]
    plain = []
    with pytest.MonkeyPatch.context() as patch:
        plain = train(small(put(kind, 0)), lambda _: change(patch))
    with pytest.MonkeyPatch.context() as patch:
        model = small(put(kind, 0))
        with solidify.cache_prefix(model, tmp_path / "kept") as cached:
            assert train(model, lambda _: change(patch)) == plain != train(small(put(kind, 0)))
    assert (cached.computed, cached.read) == (4, 2)


class OfTable(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * TABLE["by"]


class OfTensor(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * TENSOR


class OfGenerator(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * torch.rand((), generator=GENERATOR)


class OfSettings(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * float(os.environ.get("BY", "1"))


class Leaving(Reading):
    """Leaves something for others in a table of its file."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = super().forward(hidden_states)
        TABLE["left"] = float(found.detach().mean())
        return found


class Setting(Reading):
    """Leaves something in a name of its file."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        global NUMBER
        found = super().forward(hidden_states)
        NUMBER = float(found.detach().mean())
        return found


class Importing(Reading):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:

        return super().forward(hidden_states) * len(pico.SIZES)


class Inside(Reading):
    """Reads a table in a function that it makes."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return next(part * LIST[0] for part in [super().forward(hidden_states)])


class Decorated(Reading):
    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden_states) * TABLE["by"]  # type: ignore[no-any-return]


class Bound(Reading):
    """Holds an object whose method reads a table."""

    class Reader:
        def read(self) -> float:
            return TABLE["by"]

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.reader = Bound.Reader()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) * self.reader.read()


def closed() -> type[Reading]:
    held = Learned()

    class Closed(Reading):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * held.weight.detach()

    return Closed


REFUSED: dict[str, tuple[type[Reading], str]] = {
    "a table": (OfTable, r"OfTable\.forward, .* reads TABLE, which is of the kind dict"),
    "a tensor": (OfTensor, "reads TENSOR, which is of the kind Tensor"),
    "a generator": (OfGenerator, "reads GENERATOR, which is of the kind Generator"),
    "the environment": (OfSettings, r"reads os\.environ\.get, which is of the kind method"),
    "a table that is left": (Leaving, "reads TABLE"),
    "a name that is set": (Setting, "writes to NUMBER"),
    "an import": (Importing, r"reads pico\.SIZES|imports pico"),
    "a function inside": (Inside, "reads LIST, which is of the kind list"),
    "a decorated method": (Decorated, "reads TABLE"),
    "a method of an attribute": (Bound, r"Reader\.read, .* reads TABLE"),
    "a closure": (closed(), "reads held, which is of the kind Learned"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_code_reads_and_cannot_be_told_is_refused(what: str, tmp_path: Path) -> None:
    kind, said = REFUSED[what]
    with pytest.raises(ObjectiveError, match=f"cache_prefix: .*{said}"):
        both(tmp_path / "kept", put(kind, 0))


def test_a_class_of_transformers_that_was_patched_is_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = LlamaMLP.forward

    def forward(self: Any, hidden_states: Any) -> Any:
        return own(self, hidden_states) * TABLE["by"]

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ObjectiveError, match=r"forward, which frozen layers call, reads TABLE"):
        both(tmp_path / "kept")


INSTALLED = """
from torch import nn

TABLE = {"by": 1.0}


def scale(hidden_states):
    return hidden_states * TABLE["by"]


class Calling(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        return scale(self.inner(hidden_states))


class Looking(Calling):
    def forward(self, hidden_states):
        return self.inner(hidden_states) * TABLE["by"]
"""


def test_functions_of_a_package_are_taken_as_they_are_and_layers_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "installed_layers.py").write_text(INSTALLED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    package = importlib.import_module("installed_layers")
    plain, found, _ = both(tmp_path / "kept", put(package.Calling, 0))
    assert found == plain
    with pytest.raises(ObjectiveError, match=r"Looking\.forward, .* reads TABLE"):
        both(tmp_path / "kept", put(package.Looking, 0))


MARK, WIDTHS = object(), (1, 2)
logger = logging.get_logger(__name__)


@dataclass
class Settings:
    by: float = 1.0
    more: list[float] = field(default_factory=list)


class Kind(Enum):
    ONE = 1


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 1.0


@cache
def halve(number: int) -> float:
    return number / 2


class Usual(Around):
    """Reads what layers of models usually read."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.settings, self.act, self.kind = Settings(), ACT2FN["gelu"], Kind.ONE
        self.normed = partial(functional.softmax, dim=-1)

    @property
    def by(self) -> float:
        return self.settings.by * WIDTHS[0]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.kind is not Kind.ONE or MARK is None:
            logger.warning_once("other")
        ALL_ATTENTION_FUNCTIONS.get_interface("eager", eager_attention_forward)
        with torch.autocast("cpu", enabled=False):
            found = Passing.apply(super().forward(hidden_states))  # type: ignore[no-untyped-call]
        found = self.act(found) + self.normed(found) * halve(3) + functional.silu(found) * math.pi
        return found * self.by * sum(each for each in WIDTHS)  # type: ignore[no-any-return]


def test_what_layers_usually_read_is_taken(tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept", put(Usual, 0))
    assert found == plain
    assert (cached.computed, cached.read) == (2, 4)
