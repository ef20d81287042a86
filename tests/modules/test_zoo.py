"""What the tests of the zoo lean on sees a fault, and passes what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico  # noqa: F401 (puts the user's modules on the path)
import pytest
import torch
import zoo
from family_modules import Gained
from torch import nn

import solidify


class Counting(nn.Module):
    """Scales what the original returns by how many positions it is given at once."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        output, *rest = self.original(hidden_states, **kwargs)
        return output * hidden_states.shape[1], *rest


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family_generates_with_a_cache_what_it_generates_without(name: str) -> None:
    zoo.assert_cache_changes_nothing(zoo.model(name))


def test_an_attention_that_needs_the_whole_text_is_seen() -> None:
    model = zoo.model("llama")
    model.set_submodule("model.layers.0.self_attn", Counting(model.model.layers[0].self_attn))
    with pytest.raises(AssertionError):
        zoo.assert_cache_changes_nothing(model)


def test_the_whole_life_of_a_wrap(tmp_path: Path) -> None:
    model = zoo.model("llama")
    edits = solidify.replace(model, zoo.FAMILIES["llama"].attention, Gained)
    zoo.stir(model, ["gain"])
    zoo.whole_life(model, edits, tmp_path, lora=["**.q_proj"], train=["**.gain"])
