"""What the tests of the zoo lean on sees a fault, and passes what is right."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

from solidify import modules


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


@pytest.mark.parametrize("name", ["as_original", "take_over", "Inner", "_normalize"])
def test_what_files_of_the_zoo_copy_from_each_other_stays_one_text(name: str) -> None:
    """Each file travels alone, so it has what it needs; a fault that is mended in one is mended in all."""
    found = {}
    for path in sorted(Path(modules.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                found[path.name] = ast.dump(node)
    assert len(found) > 1 and len(set(found.values())) == 1, sorted(found)
