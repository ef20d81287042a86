"""A weight of several names is trained for all of them, or the training is refused before it begins."""

from __future__ import annotations

import families
import pico
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import solidify
from solidify.errors import AdapterError
from solidify.model import anatomy

KEPT = ("gemma2", "opt", "cohere")
PARTED = ("gpt2", "bloom", "falcon", "mamba")


def embeddings(model: torch.nn.Module) -> str:
    own = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is own)


@pytest.mark.parametrize("family", [*KEPT, *PARTED])
def test_embeddings_are_trained_with_their_tie_or_not_at_all(family: str) -> None:
    model, plain = (families.tiny(family, "AutoModelForCausalLM").eval() for _ in range(2))
    assert model.all_tied_weights_keys
    inputs, name = {"input_ids": pico.tokens(vocab_size=60)}, embeddings(model)
    if family in PARTED:
        before = set(model.state_dict())
        with pytest.raises(AdapterError, match=r"are tied \(one weight\), and this training would break the tie"):
            solidify.attach(model, train=[name])
        assert set(model.state_dict()) == before
        return
    trained = solidify.attach(model, train=[name]).eval()
    weight = next(p for p in trained.parameters() if p.requires_grad)
    with torch.no_grad():
        weight.add_(0.1 * torch.randn_like(weight))
        plain.get_input_embeddings().weight.copy_(weight)  # the plain tied model with the same weight
    found, expected = anatomy.run(trained, inputs), anatomy.run(plain, inputs)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_s_shared_embeddings_are_not_half_trained(family: str) -> None:
    model = families.tiny(family, "AutoModelForSeq2SeqLM")
    shared = embeddings(model)
    names = sorted({name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair})
    assert len(names) > 2
    with pytest.raises(AdapterError, match="are tied"):
        solidify.attach(model, train=[shared])
    with pytest.raises(AdapterError, match="gives them updates of their own"):
        solidify.attach(model, lora={"r": 2, "target_modules": names})


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_one_update_serves_both_names(family: str) -> None:
    model = families.tiny(family, "AutoModelForCausalLM")
    trained = solidify.attach(model, lora={"r": 2, "target_modules": [embeddings(model), "lm_head"]})
    layers = [module for module in trained.modules() if isinstance(module, BaseTunerLayer)]
    memory = [{p.untyped_storage().data_ptr() for p in layer.parameters() if p.requires_grad} for layer in layers]
    assert len(layers) == 2 and memory[0] == memory[1] and len(memory[0]) == 2
