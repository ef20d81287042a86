"""Modules that are hard to wrap: they come back as they were, or are refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hard_nets
import pytest
import torch
from torch import nn

import solidify
from solidify.errors import ModelError

ROWS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
FLAT = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def come_back(module: nn.Module, given: torch.Tensor, directory: Path) -> nn.Module:
    """Wraps, builds and loads a module; what was loaded holds and returns the same bits."""
    with torch.no_grad():
        expected = module.eval()(given)
    model = solidify.wrap(module, given)
    solidify.build(model, [], directory)
    again = solidify.load(directory)
    held = again.state_dict()
    assert {key: t.dtype for key, t in model.state_dict().items()} == {key: t.dtype for key, t in held.items()}
    assert all(torch.equal(tensor, held[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(given)[0], expected)
    return again


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: hard_nets.Recurrent(nn.LSTM, 8),
    "gru": lambda: hard_nets.Recurrent(nn.GRU, 8),
    "part by part": lambda: hard_nets.Unkept(nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)),
    "part by part, relu": lambda: hard_nets.Unkept(nn.RNN(8, 8, batch_first=True, nonlinearity="relu")),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers_come_back_and_learn(tmp_path: Path, case: str) -> None:
    again = come_back(RECURRENT[case](), ROWS, tmp_path / "made")
    adapted = solidify.attach(again, lora={"r": 2, "target_modules": ["module.head"]}, train=["module.cell"])
    with torch.no_grad():
        before = adapted.eval()(ROWS)[0]
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        adapted.train()(ROWS)[0].square().sum().backward()
        gradients = [p.grad for name, p in adapted.named_parameters() if "modules_to_save" in name]
        assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[:2])
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        moved = adapted.eval()(ROWS)[0]
    assert not torch.equal(moved, before)
    solidify.save_adapter(adapted, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(solidify.load(tmp_path / "merged")(ROWS)[0], moved, rtol=0, atol=1e-5)


def test_lazy_layers_that_have_run_come_back(tmp_path: Path) -> None:
    module = hard_nets.Lazy(8)
    module(FLAT)
    assert type(come_back(module, FLAT, tmp_path / "made").module.layer) is nn.Linear


@pytest.mark.parametrize("case", ["one module", "one buffer", "one unsaved buffer", "one loose tensor"])
def test_a_buffer_at_two_names_stays_one(tmp_path: Path, case: str) -> None:
    again = come_back(hard_nets.Buffers(8, case), FLAT, tmp_path / "made").module
    first, second = (
        (again.norm.running_mean, again.other.running_mean) if case == "one module" else (again.b1, again.b2)
    )
    assert first is second


@pytest.mark.parametrize("by_hand", [False, True])
def test_dtypes_stay_what_they_were(tmp_path: Path, by_hand: bool) -> None:
    """By hand, the constructor makes one dtype and the module has two."""
    module: nn.Module = hard_nets.Plain(8) if by_hand else hard_nets.Mixed(8)
    if isinstance(module, hard_nets.Plain):
        module.wide.double()
        module.narrow.bfloat16()
    again = come_back(module, FLAT, tmp_path / "made").module
    assert (again.wide.weight.dtype, again.narrow.weight.dtype) == (torch.float64, torch.bfloat16)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "lazy": (lambda: hard_nets.Lazy(8), r"module.layer has no shape yet.*call the module once"),
    "list": (lambda: hard_nets.Alias(8, "list"), r"module.alias holds the memory of module.layer.weight again.*clone"),
    "view": (lambda: hard_nets.Alias(8, "view"), r"module.alias holds the memory of module.layer.weight again.*clone"),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))),
        r"module.0.weight is parametrized.*remove_parametrizations\(module.0, 'weight'\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_file_brings_back_is_refused(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(ModelError, match=words):
        solidify.wrap(make(), FLAT)


@pytest.mark.parametrize("case", ["registered", "copied"])
def test_what_the_sentence_about_aliases_advises_works(tmp_path: Path, case: str) -> None:
    come_back(hard_nets.Alias(8, case), FLAT, tmp_path / "made")


def test_what_the_sentence_about_parametrizations_advises_works(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    come_back(nn.Sequential(layer), FLAT, tmp_path / "made")
