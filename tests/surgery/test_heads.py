from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from pico import wrappers
from safetensors.torch import save_file

import solidify
from solidify.errors import SurgeryError


def test_an_added_head_speaks_in_the_outputs_and_moves_nothing_else() -> None:
    model = pico.llama()
    tokens = pico.tokens()
    before = model(input_ids=tokens).logits
    edits = solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    outputs = model(input_ids=tokens, output_hidden_states=True)
    assert torch.equal(outputs.logits, before)
    assert torch.equal(outputs["value_head"], model.value_head(outputs.hidden_states[-1]))
    assert outputs["value_head"].shape == tokens.shape
    assert edits[0].operation == "add"
    assert edits[0].identical
    outputs["value_head"].sum().backward()
    assert model.value_head.linear.weight.grad.abs().sum() > 0


def test_a_head_reads_a_layer_within() -> None:
    model = pico.llama()
    solidify.add(model, "early_exit", wrappers.ValueHead, reads="model.layers.0")
    outputs = model(input_ids=pico.tokens(), output_hidden_states=True)
    assert torch.equal(outputs["early_exit"], model.early_exit(outputs.hidden_states[1]))


def test_a_part_may_run_without_the_whole() -> None:
    """TRL runs the part without the head; the new head is called there too, and keeps nothing."""
    model = pico.llama()
    solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    called = []
    model.value_head.register_forward_hook(lambda *_: called.append(1))
    assert "value_head" not in model.model(input_ids=pico.tokens())
    assert called == [1]


def test_a_tuple_is_answered_with_a_longer_tuple() -> None:
    model = pico.llama()
    plain = model(input_ids=pico.tokens(), return_dict=False)
    solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    assert len(model(input_ids=pico.tokens(), return_dict=False)) == len(plain) + 1


@pytest.mark.parametrize(
    ("name", "module", "reads", "words"),
    [
        ("value_head", wrappers.ValueHead, "model.nrom", "not a module"),
        ("lm_head", wrappers.ValueHead, "model.norm", "is there already"),
        ("generate", wrappers.ValueHead, "model.norm", "is there already"),
        ("heads.first", wrappers.ValueHead, "model.norm", "there is no 'heads'"),
        ("value_head", wrappers.Scaled, "model.norm", "cannot be supplied where nothing stood before"),
        ("value_head", wrappers.ValueHead, "lm_head", "fails on what lm_head returns"),
        ("value_head", wrappers.Spoiler, "model.norm", "changes what it reads in place"),
    ],
)
def test_what_cannot_be_added_is_refused_and_nothing_stays(name: str, module: type, reads: str, words: str) -> None:
    model = pico.llama()
    keys, tokens = list(model.state_dict()), pico.tokens()
    before = model(input_ids=tokens)
    with pytest.raises(SurgeryError, match=words):
        solidify.add(model, name, module, reads=reads)
    after = model(input_ids=tokens)
    assert list(model.state_dict()) == keys
    assert torch.equal(after.logits, before.logits)
    assert set(after) == set(before)


def test_initial_weights_are_loaded_strictly(tmp_path: Path) -> None:
    weights = {"linear.weight": torch.randn(1, 32), "linear.bias": torch.randn(1)}
    save_file(weights, tmp_path / "whole.safetensors")
    save_file({"linear.weight": weights["linear.weight"]}, tmp_path / "part.safetensors")
    model = pico.llama()
    with pytest.raises(SurgeryError, match=r"lack 'linear\.bias'"):
        solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm", weights=tmp_path / "part.safetensors")
    assert not hasattr(model, "value_head")
    solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm", weights=tmp_path / "whole.safetensors")
    assert torch.equal(model.value_head.linear.weight, weights["linear.weight"])
