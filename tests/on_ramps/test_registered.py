"""What torch registers beside names and values comes back: places, order, hooks, what is set on parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import registered_nets
import shadowing_nets
import torch
from torch import nn

import solidify
from solidify.errors import ModelError

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def train(module: nn.Module) -> list[torch.Tensor]:
    """Returns what a module returns in training, twice, and the gradients."""
    torch.manual_seed(3)
    given = X.clone().requires_grad_()
    first = module.train()(given)
    second = module(given)
    (first * second).sum().backward()
    return [first.detach(), second.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


PLACES: dict[str, Callable[[], nn.Module]] = {
    "one module twice in a sequence": registered_nets.repeated,
    "one module twice in a nested sequence": registered_nets.nested,
    "one module at two names, by hand": registered_nets.paired,
    "one module given twice": registered_nets.given,
    "one module twice in a sequence that is given": registered_nets.given_sequence,
    "another order": registered_nets.reordered,
    "places with nothing there": registered_nets.Empty,
    "a place less": registered_nets.emptied,
    "a buffer that is saved by hand": registered_nets.saved,
    "hooks that the class registers": registered_nets.Hooking,
}


def list_places(module: nn.Module) -> list[tuple[str, str, list[str]]]:
    """Lists what stands where, repeated modules and empty places too."""
    first: dict[int, str] = {}
    return [
        (name, first.setdefault(id(part), name), [*part._parameters, *part._buffers, *part._modules])
        for name, part in module.named_modules(remove_duplicate=False)
    ]


@pytest.mark.parametrize("case", PLACES)
def test_everything_stands_where_it_stood(tmp_path: Path, case: str) -> None:
    module = PLACES[case]().eval()
    pico.artifact(solidify.wrap(module, {"inputs": X}), [], tmp_path / "net")
    again = solidify.load(tmp_path / "net").module
    assert list_places(again) == list_places(module)
    mine, theirs = train(module), train(again)
    assert len(mine) == len(theirs) > 2 and all(map(torch.equal, mine, theirs))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a hook": (registered_nets.hooked, "module has hooks"),
    "another hook": (registered_nets.rehooked, "module has hooks"),
    "a hook of a parameter": (registered_nets.hooked_parameter, r"module\.weight has hooks of its own .* remove them"),
    "a class of parameters": (registered_nets.special, r"module\.weight is a Special, .* with a plain one"),
    "a tensor set on a parameter": (
        registered_nets.marked_with_tensor,
        r"module\.weight\.before is Tensor, .*register",
    ),
    "extra state": (registered_nets.Extra, r"module has state beside tensors \(get_extra_state\).* keep it in buffers"),
    "renamed state": (registered_nets.Renaming, r"state_dict\(\) lacks lin\.weight and holds lin\.kernel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_artifact_holds_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ModelError, match=words):
        solidify.wrap(make(), {"inputs": X})


@pytest.mark.parametrize("make", [registered_nets.Marked, registered_nets.marked_by_hand])
def test_what_is_set_on_parameters_comes_back(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    """Of a changed model too, and in what is trained in full and merged."""
    model = solidify.wrap(make().eval(), {"inputs": X})
    target = "module.lin" if isinstance(model.module, registered_nets.Marked) else "module.0.body.lin"
    edits = solidify.replace(model, target, pico.wrappers.Scaled)
    expected = read_marks(model)
    assert expected
    pico.artifact(model, edits, tmp_path / "net")
    again = solidify.load(tmp_path / "net")
    assert read_marks(again) == expected
    adapted = solidify.attach(again, train=[name.rpartition(".")[0] for name in expected if "rate" not in name][:1])
    trained = [p for p in adapted.parameters() if p.requires_grad and read_marks_of(p)]
    assert len(trained) == 1
    with torch.no_grad():
        trained[0].add_(1)
    solidify.merge(solidify.save_adapter(adapted, tmp_path / "adapter"), tmp_path / "merged")
    assert read_marks(solidify.load(tmp_path / "merged")) == expected


def read_marks_of(tensor: torch.Tensor) -> dict[str, Any]:
    return {key: value for key, value in vars(tensor).items() if key in ("_no_weight_decay", "_optim", "unit")}


def read_marks(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {name: read_marks_of(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    return {name: marks for name, marks in found.items() if marks}


@pytest.mark.parametrize("place", [True, False])
def test_buffers_that_a_call_moves_are_put_back(tmp_path: Path, place: bool) -> None:
    module = registered_nets.Counting(place).eval()
    calls = module.calls
    model = solidify.wrap(module, {"inputs": X})
    assert module.calls is calls and module.calls == 0
    assert not solidify.build(model, [], tmp_path / "net").manifest.failed
    assert module.calls is calls and module.calls == 0
    assert torch.equal(solidify.load(tmp_path / "net").module(X), module(X))


@pytest.mark.parametrize("make", [registered_nets.Writing, registered_nets.writing_first])
def test_the_example_stays_as_it_was(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    example = X.clone()
    model = solidify.wrap(make().eval(), {"inputs": example})
    assert torch.equal(example, X)
    assert not solidify.build(model, [], tmp_path / "net").manifest.failed


def test_parameters_of_whole_numbers_come_back(tmp_path: Path) -> None:
    module = registered_nets.Whole(5).eval()
    assert not solidify.build(solidify.wrap(module, {"inputs": X}), [], tmp_path / "net").manifest.failed
    again = solidify.load(tmp_path / "net").module
    assert torch.equal(again(X), module(X))
    assert (again.order.dtype, again.order.requires_grad, again.mask.dtype) == (torch.int64, False, torch.bool)


@pytest.mark.parametrize("name", ["WrappedConfig", "SolidWrappedModel", "Solid", "operate", "super"])
def test_classes_may_have_names_of_the_generated_file(tmp_path: Path, name: str) -> None:
    module = getattr(shadowing_nets, name)().eval()
    pico.artifact(solidify.wrap(module, {"inputs": X}), [], tmp_path / "net")
    assert torch.equal(solidify.load(tmp_path / "net").module(X.clone()), module(X.clone()))
