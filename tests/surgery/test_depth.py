from __future__ import annotations

import pico
import pytest
import torch

import solidify
from solidify.errors import SurgeryError
from solidify.model import anatomy

ZERO = ["self_attn.o_proj", "mlp.down_proj"]
QWEN = {
    **pico.SIZES,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "sliding_window": 8,
    "max_window_layers": 2,
}


def logits(model: torch.nn.Module, seed: int = 5) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens(seed=seed)})


def test_a_block_expanded_model_computes_what_it_computed() -> None:
    """LLaMA-Pro (arXiv 2401.02415): copies whose projections into the residual stream are zero."""
    model = pico.llama(num_hidden_layers=4)
    before = logits(model)
    edits = solidify.insert(model, ["model.layers.1", "model.layers.3"], zero=ZERO, expect="LlamaDecoderLayer", count=2)
    assert torch.equal(logits(model), before)
    assert len(model.model.layers) == model.config.num_hidden_layers == 6
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4, 5]
    assert edits[0].identical
    assert edits[0].settings["order"] == [0, 1, 1, 2, 3, 3]
    assert model.model.layers[2].self_attn.config is model.config
    new = {name for name, origin in edits[0].tensors.items() if origin is None}
    assert new == {f"model.layers.{i}.{part}.weight" for i in (2, 5) for part in ZERO}


def test_an_inserted_layer_can_learn() -> None:
    model = pico.llama(num_hidden_layers=2)
    solidify.insert(model, "model.layers.0", zero=ZERO)
    model(input_ids=pico.tokens(), labels=pico.tokens()).loss.backward()
    assert model.model.layers[1].self_attn.o_proj.weight.grad.abs().sum() > 0


def test_generation_with_a_cache_equals_generation_without() -> None:
    model = pico.llama(num_hidden_layers=3)
    solidify.insert(model, "model.layers.1")
    solidify.remove(model, "model.layers.0")
    tokens = pico.tokens(1, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    with_cache = model.generate(tokens, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(tokens, use_cache=False, **options))


def test_removed_layers_are_gone_and_the_others_keep_their_weights() -> None:
    model = pico.llama(num_hidden_layers=4)
    kept = [model.model.layers[i].mlp.up_proj.weight for i in (0, 3)]
    edits = solidify.remove(model, ["model.layers.1", "model.layers.2"], expect="LlamaDecoderLayer", count=2)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert all(layer.mlp.up_proj.weight is weight for layer, weight in zip(model.model.layers, kept, strict=True))
    assert edits[0].tensors["model.layers.1.mlp.up_proj.weight"] == "model.layers.3.mlp.up_proj.weight"
    assert "model.layers.2.mlp.up_proj.weight" in edits[0].dropped


def test_choices_per_layer_move_with_their_layers() -> None:
    model = pico.make("Qwen3ForCausalLM", **QWEN)
    kinds = list(model.config.layer_types)
    assert kinds == ["full_attention"] * 2 + ["sliding_attention"] * 2
    solidify.insert(model, "model.layers.2")
    assert model.config.layer_types == [*kinds[:3], kinds[2], kinds[3]]
    solidify.remove(model, "model.layers.0")
    assert model.config.layer_types == ["full_attention", *["sliding_attention"] * 3]
    assert model.config.num_hidden_layers == 4


def test_lists_of_layer_numbers_are_renumbered() -> None:
    settings = {**pico.SIZES, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 4}
    settings |= {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0, 2], "num_key_value_heads": 2}
    model = pico.make("Qwen3MoeForCausalLM", **settings)
    solidify.insert(model, "model.layers.0")
    assert model.config.mlp_only_layers == [0, 1, 3]
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == [
        "Qwen3MoeMLP",
        "Qwen3MoeMLP",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeMLP",
        "Qwen3MoeSparseMoeBlock",
    ]


def test_each_stack_of_an_encoder_decoder_has_its_own_depth() -> None:
    settings = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4}
    settings |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    model = pico.make("BartForConditionalGeneration", **settings)
    solidify.insert(model, "model.decoder.layers.0")
    solidify.remove(model, "model.encoder.layers.1")
    assert (model.config.encoder_layers, model.config.decoder_layers) == (1, 4)
    assert [layer.self_attn.layer_idx for layer in model.model.decoder.layers] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: solidify.insert(m, "model.layers.0.mlp"), "not an item of a list of layers"),
        (lambda m: solidify.insert(m, "model.layers.9"), "names no module"),
        (lambda m: solidify.insert(m, "model.layers.0", zero=["mlp.down"]), "no 'mlp.down' to set to zero"),
        (lambda m: solidify.insert(m, "model.layers.0", expect="BertLayer"), "BertLayer was expected"),
        (lambda m: solidify.remove(m, "model.layers.*"), "no layer of model.layers would be left"),
        (lambda m: solidify.remove(m, "model.layers.*", count=1), "1 were expected"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_model_untouched(change: object, words: str) -> None:
    model = pico.llama()
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(SurgeryError, match=words):
        change(model)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


def test_a_depth_at_which_the_model_does_not_run_is_refused_and_undone() -> None:
    """Falcon-H1, Zamba and their kin share blocks between layers; here the last layer feeds on the first's shape."""
    model = pico.llama(num_hidden_layers=3)
    narrow = torch.nn.Linear(32, 16, bias=False)
    wide = torch.nn.Linear(16, 32, bias=False)

    class Narrow(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
            return self.linear(hidden_states)

    model.model.layers[0], model.model.layers[1] = Narrow(narrow), Narrow(wide)
    before = logits(model)
    with pytest.raises(SurgeryError, match="does not run"):
        solidify.remove(model, "model.layers.0")
    assert torch.equal(logits(model), before)
    assert model.config.num_hidden_layers == 3
