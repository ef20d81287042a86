"""What a model costs, counted by hand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import families
import pico
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import solidify
from solidify.model.cost import cost, experts, flops

served: Any = import_module("served")  # tests/support/user_modules, which pico puts on the path


def test_every_matrix_counts_twice_its_numbers_and_embeddings_nothing() -> None:
    layer = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32
    assert cost(pico.llama()).flops_per_token == 2 * (2 * layer + 128 * 32)


@pytest.mark.parametrize(
    ("family", "head", "unit"),
    [
        ("llava", "AutoModelForImageTextToText", "token"),
        ("whisper", "AutoModelForSpeechSeq2Seq", "token"),
        ("bert", "AutoModelForSequenceClassification", "token"),
        ("vit", "AutoModelForImageClassification", "patch"),
        ("resnet", "AutoModelForImageClassification", "position"),
        ("wav2vec2", "AutoModelForCTC", "frame"),
    ],
)
def test_flops_are_said_of_what_the_model_reads(family: str, head: str, unit: str) -> None:
    assert cost(families.tiny(family, head)).unit == unit


def test_experts_count_as_the_router_picks_them() -> None:
    stacked = flops(pico.olmoe())["model.layers.0.mlp.experts"]
    assert stacked == 2 * (8 * 32 * 32 + 8 * 32 * 16) * 2 // 8
    model = pico.olmoe(8)  # as many layers as experts: the list of layers is no list of experts
    solidify.replace(model, "model.layers.3.mlp", served.PooledMoE)
    own = flops(model)
    assert own["model.layers.3.mlp.experts.5.up"] == 2 * 32 * 8 * 2 // 8
    assert own["model.layers.3.self_attn.q_proj"] == 2 * 32 * 32
    assert experts(model.config) == (8, 2)
    assert experts(pico.llama().config) == (0, 1)


def test_bytes_on_disk_and_in_memory() -> None:
    model = pico.llama(tie_word_embeddings=True)
    found = cost(model)
    saved = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    assert found.bytes == sum(saved.values()) == 4 * found.parameters
    assert found.memory == found.bytes + sum(buffer.nbytes for _, buffer in model.named_non_persistent_buffers())
    assert found.memory > found.bytes
    kept = cost(model).bytes
    solidify.replace(model, "model.layers.0.mlp", pico.wrappers.Forgetful, arguments={"how": "kept"})
    assert cost(model).bytes == kept + 32 * 4


def test_nothing_needs_to_be_loaded() -> None:
    config = AutoConfig.for_model("llama", **pico.SIZES, intermediate_size=48, num_key_value_heads=2)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert cost(empty) == cost(pico.llama())


class Mixture(torch.nn.Module):
    """Experts of its own, as a list or as one parameter; its router may say how many a token gets."""

    def __init__(
        self, original: torch.nn.Module, experts: int = 4, top_k: int | None = 1, stacked: bool = False
    ) -> None:
        super().__init__()
        self.router = torch.nn.Linear(32, experts, bias=False)
        if top_k is not None:
            self.router.top_k = top_k
        if stacked:
            self.up = torch.nn.Parameter(torch.randn(experts, 32, 32) * 0.1)
        else:
            self.ups = torch.nn.ModuleList(torch.nn.Linear(32, 32, bias=False) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ups = self.up if hasattr(self, "up") else torch.stack([each.weight for each in self.ups])
        return torch.einsum("...i,eoi,...e->...o", x, ups, self.router(x).softmax(-1))


def test_a_mixture_of_the_users_counts_what_a_token_uses_or_says_that_it_is_not_known() -> None:
    router, expert = 2 * 4 * 32, 2 * 32 * 32
    for stacked in (False, True):
        for top_k, counted in ((1, 1), (3, 3), (None, 4)):
            model = pico.llama()
            arguments = {"top_k": top_k, "stacked": stacked}
            before = cost(model).flops_per_token
            solidify.replace(model, "model.layers.0.mlp", Mixture, arguments=arguments)
            found = cost(model)
            assert found.flops_per_token == before - 2 * 3 * 48 * 32 + router + counted * expert
            place = "model.layers.0.mlp.up" if stacked else "model.layers.0.mlp.ups"
            assert found.uncertain == ((place,) if top_k is None else ())


def test_own_experts_go_by_their_own_router_and_not_by_the_configuration() -> None:
    model = pico.olmoe()
    solidify.replace(model, "model.layers.1.mlp", Mixture, arguments={"experts": 8, "top_k": 1, "stacked": True})
    assert flops(model)["model.layers.1.mlp"] == 2 * 32 * 32  # the configuration says two of eight
    assert cost(model).uncertain == ()
