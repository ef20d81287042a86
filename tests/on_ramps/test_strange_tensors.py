"""Tensors that no file brings back are refused by name when a module is wrapped, and not when it is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import strange_nets
import torch
from torch import nn

import solidify
from solidify.errors import ArtifactError, ModelError

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning"),
]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (strange_nets.sparse, r"a sparse tensor \(sparse_coo\), which weight files do not hold; keep its values and"),
        (strange_nets.nested, r"a nested tensor, which weight files do not hold; keep its values and its offsets"),
        (strange_nets.quantised, r"a quantised tensor \(torch.qint8\), which weight files do not hold; keep whole"),
        (strange_nets.without_values, r"a tensor without values \(on the meta device\); fill it first"),
        (strange_nets.conjugated, r"conjugated or negated as it is read \(a view\); make it one of its own: resolve_"),
        (strange_nets.wide, r"a tensor of torch.complex128, which weight files do not hold; keep it in another dtype"),
    ],
)
def test_a_tensor_that_no_file_brings_back_is_refused_by_name(make: Callable[[], torch.Tensor], words: str) -> None:
    module = strange_nets.InBuffer(make)
    with pytest.raises(ModelError, match=rf"InBuffer cannot be wrapped: module\.held is {words}"):
        solidify.wrap(module, X)
    assert "held" in dict(module.named_buffers()) and module.inner.weight.is_contiguous()


@pytest.mark.parametrize("make", [strange_nets.sparse, strange_nets.nested])
def test_nor_may_an_attribute_hold_what_cannot_be_compared(make: Callable[[], torch.Tensor]) -> None:
    with pytest.raises(ModelError, match=r"module\.held holds a (sparse|nested) tensor"):
        solidify.wrap(strange_nets.InAttribute(make), X)


def test_a_complex_parameter_is_refused_before_it_is_built() -> None:
    with pytest.raises(ModelError, match=r"module\.held is a complex parameter, which transformers loads frozen"):
        solidify.wrap(strange_nets.ComplexParameter(), X)


@pytest.mark.parametrize("kind", [strange_nets.CountingInAttribute, strange_nets.CountingInParameter])
def test_what_counts_calls_where_no_artifact_brings_it_back_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"module\.calls changes whenever the module is called in evaluation; keep it"):
        solidify.wrap(kind(), X)


def test_a_transposed_weight_and_what_is_remembered_of_a_call_come_back(tmp_path: Path) -> None:
    for kind in (strange_nets.Transposed, strange_nets.LastChannels, strange_nets.Remembering):
        torch.manual_seed(0)
        module = kind()
        with torch.no_grad():
            before = module(X)
        model = solidify.wrap(module, X)
        with torch.no_grad():
            assert (module(X) - before).abs().max() < 1e-6
        solidify.build(model, [], tmp_path / kind.__name__)
        again = solidify.load(tmp_path / kind.__name__)
        with torch.no_grad():
            assert torch.equal(again(X).logits, model(X).logits)


def test_a_wrap_that_is_refused_leaves_a_transposed_weight_as_it_lies() -> None:
    module = nn.Sequential(strange_nets.Transposed(), strange_nets.CountingInAttribute())
    module[1].inner = nn.Linear(3, 3)
    weight = module[0].inner.weight
    with pytest.raises(ModelError, match=r"module\.1\.calls changes"):
        solidify.wrap(module, X)
    assert module[0].inner.weight is weight and weight.stride() == (1, 3)


def test_a_text_that_is_none_is_one_sentence_when_it_is_built(tmp_path: Path) -> None:
    model = solidify.wrap(strange_nets.Naming(), X)
    with pytest.raises(ArtifactError, match=r"half a character .* no text.*: module\.title is '\\ud800'"):
        solidify.build(model, [], tmp_path / "built")
    assert not (tmp_path / "built").exists()
