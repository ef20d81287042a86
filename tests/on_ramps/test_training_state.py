"""What only training uses comes back too, or is refused: an evaluation alone would not tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
import trained_nets
from torch import nn

import solidify
from solidify.errors import ArtifactError, ModelError
from solidify.surgery.comparing import held_faults

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def train(module: nn.Module) -> list[torch.Tensor]:
    """Returns what a module returns in training, twice, and the gradients."""
    torch.manual_seed(3)
    first = module.train()(X)
    second = module(X)
    (first * second).sum().backward()
    return [first.detach(), second.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "make",
    [
        trained_nets.dropped,
        trained_nets.rated,
        trained_nets.noisy,
        lambda: trained_nets.Settings(p=0.5),
        trained_nets.counted,
    ],
)
def test_it_trains_as_before(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    module = make().eval()
    pico.artifact(solidify.wrap(module, {"inputs": X}), [], tmp_path / "net")
    again = solidify.load(tmp_path / "net").module
    assert not held_faults(module, again, "module")
    mine, theirs = train(module), train(again)
    assert len(mine) == len(theirs) > 2 and all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (trained_nets.slotted, r"module.rate is 0.5, and 0.0"),
        (trained_nets.Masked, r"module.mask is array"),
    ],
)
def test_what_cannot_come_back_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        solidify.wrap(make(), {"inputs": X})


def test_a_refused_module_is_as_it_was() -> None:
    """The refusal comes after its loose tensors became buffers, to try it part by part."""
    module = trained_nets.Refused(16, 1)
    state, buffers, held = list(module.state_dict()), [name for name, _ in module.named_buffers()], dict(vars(module))
    with pytest.raises(ModelError, match=r"nor part by part: module.rate is 0.0, and not there"):
        solidify.wrap(module, {"inputs": X})
    assert (list(module.state_dict()), [name for name, _ in module.named_buffers()]) == (state, buffers)
    assert vars(module).keys() == held.keys() and module.table is held["table"]
    assert "mask" in module._non_persistent_buffers_set and "table" not in module._non_persistent_buffers_set


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")  # torch's
def test_complex_parameters_that_learn_are_refused(tmp_path: Path) -> None:
    """transformers loads them frozen."""
    words, module = r"module\.scale is a complex parameter, which transformers loads frozen", trained_nets.Spectral()
    with pytest.raises(ModelError, match=words):
        solidify.wrap(module, {"inputs": X})
    module.scale.requires_grad_(False)
    frozen = solidify.wrap(module, {"inputs": X})
    module.scale.requires_grad_(True)
    with pytest.raises(ArtifactError, match=words):
        solidify.build(frozen, [], tmp_path / "net")
    module.scale.requires_grad_(False)
    assert not solidify.build(frozen, [], tmp_path / "net").manifest.failed


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(ModelError, match="has no parameters of real numbers"):
        solidify.wrap(nn.Sequential(nn.Tanh()), {"inputs": X})


def test_a_mapping_keeps_its_order(tmp_path: Path) -> None:
    module = trained_nets.Ordered({"z": 16, "a": 16}).eval()
    model = solidify.wrap(module, {"inputs": X})
    pico.artifact(model, [], tmp_path / "net")
    again = solidify.load(tmp_path / "net").module
    assert list(again.layers) == ["z", "a"] and torch.equal(again(X), module(X))
