"""What is taken for granted of an unchanged model is measured where a change would be refused by it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

import families
import pico
import solidify
from pico import wrappers
from solidify.errors import SurgeryError
from solidify.model import control


class OfItsBatch(nn.Module):
    """A feed-forward that subtracts the mean over the rows of its batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found - 0.5 * found.mean(0, keepdim=True)


class Forgets(nn.Module):
    """A layer that is wrong at a single step of one row that follows a single step."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.length = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wrong = self.length == 1 and x.shape[:2] == (1, 1)
        self.length = x.shape[1]
        found: torch.Tensor = self.inner(x)
        return found * 2 if wrong else found


class OneRow(nn.Module):
    """A layer that is wrong at a single step of several rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found * 2 if x.shape[1] == 1 and x.shape[0] > 1 else found


class NeedsFloat32(nn.Module):
    """A feed-forward whose own arithmetic is float32 whatever it is given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found + x @ torch.full((x.shape[-1], x.shape[-1]), 0.01)


def odd(kind: type[nn.Module], layer: int) -> PreTrainedModel:
    """A model one of whose feed-forwards is of a kind that no family has."""
    model = pico.llama()
    name = f"model.layers.{layer}.mlp"
    model.set_submodule(name, kind(model.get_submodule(name)))
    return model.eval()


ODD: dict[str, Callable[[], PreTrainedModel]] = {
    "rows": lambda: odd(OfItsBatch, 0),
    "later steps": lambda: odd(Forgets, 0),
    "single steps of several rows": lambda: odd(OneRow, 0),
    "half precision": lambda: odd(NeedsFloat32, 1),
    "a family whose later steps are wrong": lambda: families.tiny("moshi"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_base_that_does_not_keep_it_may_be_changed(kind: str) -> None:
    model = ODD[kind]()
    names = [name for name, _ in model.named_modules() if name.endswith("layers.1.mlp")][:1]
    lean, whole = control.take(model, names, lean=True), control.take(model, names)
    assert control.shows_less(lean, whole) and not control.shows_less(whole, whole)
    edits = solidify.replace(model, names[0], wrappers.Scaled)
    assert [edit.name for edit in edits] == names


@pytest.mark.parametrize("kind", [OfItsBatch, Forgets, OneRow, NeedsFloat32])
def test_a_change_that_does_not_keep_it_is_refused(kind: type[nn.Module]) -> None:
    class Planted(nn.Module):
        """The same as a user's module."""

        def __init__(self, original: nn.Module) -> None:
            super().__init__()
            self.inner = kind(original)
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(x)
            return found * self.scale

    model = pico.llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError, match=r"other rows of its batch|over it|bfloat16"):
        solidify.replace(model, "model.layers.*.mlp", Planted)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_what_code_of_the_user_changed_elsewhere_is_not_taken_for_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constructor patches a function of the family: refused; the whole control, which sees it too, is not used."""
    rotary = modeling_llama.apply_rotary_pos_emb

    def mixed(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> object:
        return rotary(q - 0.5 * q.mean(0, keepdim=True), k, *args, **kwargs)

    class Patching(wrappers.Scaled):
        """Patches on the way."""

        def __init__(self, original: nn.Module) -> None:
            super().__init__(original)
            monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", mixed)

    with pytest.raises(SurgeryError, match=r"other rows of its batch"):
        solidify.replace(pico.llama(), "model.layers.*.mlp", Patching)
