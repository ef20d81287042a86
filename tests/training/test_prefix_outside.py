"""What layers read, draw and leave outside of themselves: with `cache_prefix` it is looked at, or refused."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from frozen import Around, both, put, small
from torch import nn

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


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    return [pico.collate(pico.ragged(3, seed=seed)) for seed in range(count)]


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
