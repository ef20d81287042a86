"""A model is copied while `cache_prefix` is on, or given other layers, or its layers write into their arguments."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import batches, both, nothing, small, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

import solidify


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model.eval()(**batches(1)[0]).loss)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def patch_forward(model: Any) -> None:
    layer = model.model.layers[1]
    layer.forward = partial(type(layer).forward, layer)


@pytest.mark.parametrize("prepare", [nothing, patch_forward])
@pytest.mark.parametrize("kind", [copy.deepcopy, pickled])
def test_a_copy_computes_with_its_own_weights(
    kind: Callable[[Any], Any], prepare: Callable[[Any], None], tmp_path: Path
) -> None:
    model, made = small(prepare), list[Any]()

    def act(model: Any) -> None:
        made.append(kind(model))
        with torch.no_grad():
            for parameter in made[0].parameters():
                parameter.mul_(0.5)
        made.append(loss_of(made[0]))

    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        train(model, act, 2)
    plain = small(prepare)
    plain.load_state_dict(made[0].state_dict())
    assert loss_of(plain) == made[1] == loss_of(made[0]) != loss_of(model)
    assert cached.read == 4


def test_an_average_of_weights_is_evaluated(tmp_path: Path) -> None:
    def run(model: Any) -> float:
        made = AveragedModel(model)
        train(model, made.update_parameters, 2)
        return loss_of(made)

    plain, model = run(small()), small()
    with solidify.cache_prefix(model, tmp_path / "kept"):
        assert run(model) == plain


def scaled(by: float) -> Any:
    """Returns a frozen layer of other weights."""
    layer = small().model.layers[2].requires_grad_(False)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(by)
    return layer


def exchange_last(model: Any) -> None:
    model.model.layers[2] = scaled(1.5)


def exchange_first(model: Any) -> None:
    model.model.layers[0] = scaled(1.5)


def leave_out(model: Any) -> None:
    model.model.layers = nn.ModuleList([*model.model.layers[:2], model.model.layers[3]])


def turn_round(model: Any) -> None:
    one, two, *rest = model.model.layers
    model.model.layers = nn.ModuleList([two, one, *rest])


@pytest.mark.parametrize("act", [exchange_last, exchange_first, leave_out, turn_round])
def test_other_layers_in_the_list_are_run(
    act: Callable[[Any], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, found, cached = both(tmp_path / "kept", between=act, after=3)
    assert found == plain
    assert cached.read == 2
    assert capsys.readouterr().err.count("model.layers holds other layers than when cache_prefix began") == 1


def test_layers_that_are_left_for_a_while_are_found_again(tmp_path: Path) -> None:
    def exit_early(model: Any) -> float:
        whole = model.model.layers
        model.model.layers = whole[:2]
        found = loss_of(model)
        model.model.layers = whole
        model.train()
        return found

    plain, model, found = exit_early(small()), small(), list[float]()
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        losses = train(model, lambda _: found.append(exit_early(model)), 3)
    assert (found, losses) == ([plain], train(small()))
    assert cached.read == 4


class Writing(nn.Module):
    """A layer that writes, into what it is given, for batches of another length than the first."""

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__()
        self.inner, self.name = inner, name
        self.length = batches(1)[0]["input_ids"].shape[1]

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        found: torch.Tensor = self.inner(hidden_states, **given)
        if hidden_states.shape[1] != self.length:
            cosine, _ = given["position_embeddings"]
            {"cosine": cosine, "hidden": hidden_states}[self.name].mul_(1.1)
        return found


class Remembering(nn.Module):
    """A layer that reads the embeddings too."""

    def __init__(self, inner: Any, embedding: nn.Module) -> None:
        super().__init__()
        self.inner, self.held = inner, list[torch.Tensor]()
        embedding.register_forward_hook(lambda _module, _args, output: self.held.append(output))

    def forward(self, hidden_states: torch.Tensor, **given: Any) -> Any:
        return self.inner(hidden_states + self.held.pop(), **given)


@pytest.mark.parametrize(("name", "layer"), [("cosine", 1), ("hidden", 0), ("cosine", 0)])
def test_what_layers_write_into_what_others_read_is_written(name: str, layer: int, tmp_path: Path) -> None:
    def prepare() -> Any:
        model = small()
        model.model.layers[layer] = Writing(model.model.layers[layer], name).requires_grad_(False)
        model.model.layers[3] = Remembering(model.model.layers[3], model.model.embed_tokens)
        return model.train()

    def run(model: Any) -> list[float]:
        losses = [model(**batch).loss for _ in range(3) for batch in batches(3)]
        return [float(loss.detach()) for loss in losses]

    assert len({batch["input_ids"].shape for batch in batches(3)}) == 2
    plain, model = run(prepare()), prepare()
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        assert run(model) == plain
    assert (cached.computed, cached.read) == (2, 4)


def test_what_a_layer_writes_into_its_own_input_is_kept(tmp_path: Path) -> None:
    """What the layer before it returned, nobody else has."""

    def prepare(model: Any) -> None:
        model.model.layers[1] = Writing(model.model.layers[1], "hidden")
        model.model.layers[1].length = 0

    plain, found, cached = both(tmp_path / "kept", prepare)
    assert found == plain
    assert cached.read == 4


def test_a_layer_that_always_writes_into_positions_is_refused(tmp_path: Path) -> None:
    model = small()
    model.model.layers[1] = Writing(model.model.layers[1], "cosine").requires_grad_(False)
    model.model.layers[1].length = 0
    with (
        pytest.raises(solidify.SolidifyError, match=r"layers\.1 writes into what it is given \(a mask, positions\)"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        train(model)


class Nested:
    """An object in an object, and so on."""

    def __init__(self, depth: int) -> None:
        self.inner = Nested(depth - 1) if depth else None


def test_objects_that_hold_objects_are_no_traceback(tmp_path: Path) -> None:
    def prepare(model: Any) -> None:
        model.held = [Nested(9)]

    plain, found, cached = both(tmp_path / "kept", prepare)
    assert found == plain
    assert cached.read == 4
