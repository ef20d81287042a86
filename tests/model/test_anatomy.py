from __future__ import annotations

import copy

import pico
import pytest
import torch
from transformers import RwkvConfig, RwkvForCausalLM

from solidify.healing import sources
from solidify.model import anatomy, operations, probing

NAMES = ["model", "model.layers", "model.layers.0", "model.layers.0.mlp", "model.layers.10.mlp", "lm_head", "mlp"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.*.mlp", ["model.layers.0.mlp", "model.layers.10.mlp"]),
        ("**.mlp", ["model.layers.0.mlp", "model.layers.10.mlp", "mlp"]),
        ("model.**", ["model.layers", "model.layers.0", "model.layers.0.mlp", "model.layers.10.mlp"]),
        ("model.layers.1*.mlp", ["model.layers.10.mlp"]),
        ("model.*", ["model.layers"]),
        ("model.layers.0", ["model.layers.0"]),
        ("layers.0", []),
        ("model.layers.?", []),
        ("**", NAMES),
    ],
)
def test_a_star_is_one_part_and_two_stars_are_any_number(pattern: str, expected: list[str]) -> None:
    assert anatomy.match(pattern, NAMES)[pattern] == expected


def test_every_pattern_answers_for_itself() -> None:
    assert anatomy.match(["lm_head", "nothing"], NAMES) == {"lm_head": ["lm_head"], "nothing": []}


def test_layers_fold_into_one_line() -> None:
    assert anatomy.fold(NAMES[2:5]) == ["model.layers.*", "model.layers.*.mlp"]


def test_the_layer_index_is_the_first_number() -> None:
    model = pico.llama()
    assert operations.layer_index(model, "model.layers.3.experts.5.up") == 3
    assert operations.layer_index(model, "lm_head") is None


def test_a_suggestion_names_what_ends_alike() -> None:
    assert "model.layers.*.mlp" in anatomy.suggestions("layer.*.mlp", NAMES)


def test_the_enclosing_configuration_is_the_innermost_models() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8).to_dict(),
        text_config=LlamaConfig(**sizes, vocab_size=99).to_dict(),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    names = [name for name, _ in model.named_modules() if name.endswith("layers.0.mlp")]
    found = {type(operations.enclosing_config(model, name)).__name__ for name in names}
    assert found == {"CLIPVisionConfig", "LlamaConfig"}


def test_modes_come_back_after_an_evaluation() -> None:
    model = pico.olmoe().train()
    model.model.layers[0].eval()
    with anatomy.evaluation(model):
        assert not any(module.training for module in model.modules())
    assert model.training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training


def test_shared_tensors_count_once() -> None:
    model = pico.llama(tie_word_embeddings=True)
    assert anatomy.count(model.parameters()) == sum(p.numel() for p in model.parameters())
    assert anatomy.count([model.lm_head.weight, model.model.embed_tokens.weight]) == model.lm_head.weight.numel()


@pytest.mark.parametrize("padded", [False, True])
def test_probe_inputs_are_random_and_repeatable(padded: bool) -> None:
    model = pico.llama()
    first = probing.probe_inputs(model, padded=padded)
    assert torch.equal(first["input_ids"], probing.probe_inputs(model, padded=padded)["input_ids"])
    assert first["input_ids"].unique().numel() > 5
    assert bool((first["attention_mask"] == 0).any()) is padded


def test_inputs_are_made_for_images_and_for_encoder_decoders() -> None:
    vit = pico.make(
        "ViTForImageClassification",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
    )
    assert anatomy.run(vit, probing.probe_inputs(vit)).shape == (2, 2)
    t5 = pico.make(
        "T5ForConditionalGeneration",
        vocab_size=99,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    assert anatomy.run(t5, probing.probe_inputs(t5)).shape == (2, 7, 99)


def test_attributes_stay_where_weights_were_written_to() -> None:
    """RWKV divides weights by two as it evaluates first, and remembers that it has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=128, context_length=64, rescale_every=2, **sizes)).eval()
    batch = {"input_ids": torch.randint(3, 128, (2, 9))}
    wanted = copy.deepcopy(model)(**batch, use_cache=False).logits
    for _ in range(2):
        sources.run_until_left(model, batch)
    assert torch.equal(model(**batch, use_cache=False).logits, wanted)
