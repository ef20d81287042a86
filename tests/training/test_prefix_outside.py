"""What layers read, draw and leave outside of themselves: with `cache_prefix` it is looked at, or refused."""

from __future__ import annotations

import importlib
import os
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from frozen import Around, batches, both, put, small, train
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

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


class ByMode(Around):
    """Returns something else where no graph is built, or what it is given asks for no gradient."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = super().forward(hidden_states)
        return found if torch.is_grad_enabled() else found * (3 if torch.is_inference_mode_enabled() else 2)


def pass_in_modes(model: Any) -> list[float]:
    """Runs batches with a graph, and again without."""
    found = []
    for number, mode in ((0, torch.enable_grad), (2, torch.no_grad), (0, torch.no_grad), (0, torch.inference_mode)):
        with mode():
            found += [model(**batch).loss.item() for batch in batches()[number:]]
    return found


def test_each_gradient_mode_is_kept_by_itself(tmp_path: Path) -> None:
    plain, model = pass_in_modes(small(put(ByMode, 0))), small(put(ByMode, 0))
    with solidify.cache_prefix(model, tmp_path / "kept"):
        assert pass_in_modes(model) == plain


def call_otherwise(model: Any, how: str) -> Iterator[Any]:
    """Yields what a model returns for two batches, in turn; from the second round on more is asked of it."""
    for step in range(6):
        batch, asked = batches(2)[step % 2], step > 1
        if how == "a setting":
            model.config.output_hidden_states = asked
            yield model(**batch)
        elif how == "an attribute":
            model.asked = asked
            yield model(**batch, layer=0)
        elif how == "by position":
            yield model(batch["input_ids"], batch["attention_mask"], batch["labels"], 2 if asked else 0)
        else:
            layer: Any = {"an integer": int(asked), "a list": [1] if asked else []}[how]
            yield model(**batch, layer=layer)


@pytest.mark.parametrize("how", ["a setting", "an attribute", "by position", "an integer", "a list"])
def test_a_call_that_asks_for_more_is_another_kind(how: str, tmp_path: Path) -> None:
    model = small()
    if how != "a setting":
        own = model.forward

        def forward(input_ids: Any, attention_mask: Any, labels: Any, layer: Any = 0) -> Any:
            asked = bool(layer) or getattr(model, "asked", False)
            return own(input_ids, attention_mask, labels=labels, output_hidden_states=asked)

        model.forward = forward
    with (
        pytest.raises(ObjectiveError, match=r"returns another hidden_states.*leave output_hidden_states out"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        for output in call_otherwise(model, how):
            output.loss.backward()


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
