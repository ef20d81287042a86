"""Documents in one window do not see each other, and a model in which they would is refused."""

from __future__ import annotations

from typing import Any

import datasets
import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from solidify.errors import DataError
from solidify.training import data, packing
from solidify.training.collating import Packed

GPT2 = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
PACKABLE: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2},
    "Qwen3ForCausalLM": {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "MistralForCausalLM": {
        **pico.SIZES,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
        "sliding_window": 4,
    },
    "GPT2LMHeadModel": GPT2,
    "OlmoeForCausalLM": {**pico.SIZES, **pico.EXPERTS, "intermediate_size": 16, "eos_token_id": 0},
}
LEAKING: dict[str, tuple[dict[str, Any], str]] = {
    "MambaForCausalLM": (
        {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "takes no position_ids",
    ),
    "BloomForCausalLM": ({"vocab_size": 128, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "takes no position_ids"),
    "Lfm2ForCausalLM": (
        {
            **pico.SIZES,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        "one document of a window reaches the next",
    ),
}


def documents() -> datasets.Dataset:
    made = pico.ragged(9)
    return datasets.Dataset.from_list([{**row, "labels": [-100, *row["labels"][1:]]} for row in made])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", PACKABLE)
def test_no_document_sees_another_and_each_keeps_its_loss(head: str, attention: str) -> None:
    model: Any = pico.make(head, **PACKABLE[head])
    model.set_attn_implementation(attention)
    packing.refuse_leaking(model)
    rows = documents()
    packed = packing.pack(rows, 24, seed=0)
    assert len(packed) < len(rows)
    assert sum(map(len, packed["input_ids"])) == sum(map(len, rows["input_ids"]))
    collate = Packed()
    batch = collate([packed[n] for n in range(len(packed))])
    with torch.no_grad():
        logits = model(**batch).logits[0]
        start = 0
        for row, lengths in zip(packed, packed["seq_lengths"], strict=True):
            offset = 0
            for length in lengths:
                ids = row["input_ids"][offset : offset + length]
                alone = model(torch.tensor([ids])).logits[0]
                assert torch.allclose(logits[start : start + length], alone, atol=1e-5)
                start, offset = start + length, offset + length
    unpacked = data.mean_loss(model, rows, pico.collate, batch_size=1)
    assert data.mean_loss(model, packed, collate, batch_size=2) == pytest.approx(unpacked, rel=1e-5)


@pytest.mark.parametrize("head", LEAKING)
def test_a_model_that_remembers_across_documents_is_refused(head: str) -> None:
    settings, words = LEAKING[head]
    with pytest.raises(DataError, match=words):
        packing.refuse_leaking(pico.make(head, **settings))


class Gated(nn.Module):
    """An MLP beside which runs a branch over the row, whose gate starts at zero."""

    def __init__(self, inner: nn.Module, mixes: bool) -> None:
        super().__init__()
        self.inner, self.mixes = inner, mixes
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        beside = hidden_states.cumsum(1) if self.mixes else hidden_states
        out: torch.Tensor = self.inner(hidden_states) + self.gate * beside
        return out


@pytest.mark.parametrize("mixes", [True, False])
def test_a_branch_that_starts_at_zero_is_tried_as_it_will_be(mixes: bool) -> None:
    model: Any = pico.make("LlamaForCausalLM", **PACKABLE["LlamaForCausalLM"]).requires_grad_(False)
    model.model.layers[0].mlp = Gated(model.model.layers[0].mlp, mixes)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    if mixes:
        with pytest.raises(DataError, match="one document of a window reaches the next once its trained parameters"):
            packing.refuse_leaking(model)
    else:
        packing.refuse_leaking(model)
    after = dict(model.named_parameters())
    assert all(after[n].data_ptr() == at and torch.equal(after[n], value) for n, (at, value) in before.items())
    assert isinstance(model.model.layers[0].mlp.gate, nn.Parameter)


@pytest.mark.parametrize(
    "around",
    [
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda each: next(iter(each)),
)
@pytest.mark.parametrize("head", ["LlamaForCausalLM", "Lfm2ForCausalLM"])
def test_embeddings_that_peft_has_wrapped_are_counted(around: dict[str, Any], head: str) -> None:
    sizes = {**(PACKABLE.get(head) or LEAKING[head][0]), "tie_word_embeddings": False}
    model = get_peft_model(pico.make(head, **sizes), LoraConfig(**{"target_modules": ["q_proj"], **around}))
    if head in PACKABLE:
        packing.refuse_leaking(model)
    else:
        with pytest.raises(DataError, match="one document of a window reaches the next"):
            packing.refuse_leaking(model)


def test_rows_are_shuffled_by_a_seed_before_they_are_packed() -> None:
    rows = documents()
    first, again, other = (packing.pack(rows, 24, seed=seed)["input_ids"][:] for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(map(len, packing.pack(rows, 24, seed=None)["input_ids"]))[0] > 0
