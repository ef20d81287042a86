from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch
from pico import wrappers
from safetensors.torch import save_file

import solidify
from solidify.errors import SurgeryError
from solidify.model import anatomy, probing
from solidify.modules.trashcan_moe import TrashCanMoE

MLP = "model.layers.*.mlp"


def refused(model: torch.nn.Module, *arguments: object, **options: object) -> str:
    """Replaces, expects a refusal, makes sure that the model is as it was, and returns the message."""
    before = {name: id(module) for name, module in model.named_modules()}
    inputs = probing.probe_inputs(model)
    logits = anatomy.run(model, inputs)
    with pytest.raises(SurgeryError) as caught:
        solidify.replace(model, *arguments, **options)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert torch.equal(anatomy.run(model, inputs), logits)
    return str(caught.value)


def test_a_module_stands_where_it_was_asked_to_by_identity() -> None:
    model = pico.olmoe()
    originals = [layer.mlp for layer in model.model.layers]
    edits = solidify.replace(model, MLP, wrappers.Scaled, expect="OlmoeSparseMoeBlock", count=2)
    assert [edit.name for edit in edits] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for layer, original in zip(model.model.layers, originals, strict=True):
        assert type(layer.mlp) is wrappers.Scaled
        assert layer.mlp.original is original


def test_nothing_else_changes() -> None:
    model = pico.olmoe()
    before = {n: p for n, p in model.named_parameters() if ".mlp." not in n}
    solidify.replace(model, MLP, wrappers.PlainMLP)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


def test_what_a_constructor_asks_for_is_bound_by_name() -> None:
    model = pico.olmoe()
    solidify.replace(model, MLP, wrappers.Numbered, arguments={"extra": 7})
    for place, layer in enumerate(model.model.layers):
        assert (layer.mlp.layer_idx, layer.mlp.hidden_size, layer.mlp.extra) == (place, 32, 7)
        assert type(layer.mlp.original).__name__ == "OlmoeSparseMoeBlock"


def test_adopt_runs_once_and_takes_weights_over() -> None:
    model = pico.olmoe()
    routers = [layer.mlp.gate.weight.clone() for layer in model.model.layers]
    edits = solidify.replace(model, MLP, wrappers.Adopter)
    for layer, router in zip(model.model.layers, routers, strict=True):
        assert torch.equal(layer.mlp.router.weight, router)
    assert edits[0].tensors["model.layers.0.mlp.router.weight"] == "model.layers.0.mlp.gate.weight"
    assert edits[0].tensors["model.layers.0.mlp.out.weight"] is None
    assert "model.layers.0.mlp.experts.down_proj" in edits[0].dropped


def test_the_record_tells_kept_from_new_and_dropped() -> None:
    edits = solidify.replace(pico.olmoe(), MLP, TrashCanMoE)
    kept = {name for name, origin in edits[1].tensors.items() if origin == name}
    assert kept == {f"model.layers.1.mlp.{n}" for n in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")}
    assert [n for n, origin in edits[1].tensors.items() if origin is None] == [
        "model.layers.1.mlp.trash.weight",
        "model.layers.1.mlp.trash.bias",
        "model.layers.1.mlp.trash.kept",
        "model.layers.1.mlp.trash.worth",
    ]
    assert edits[1].dropped == ()
    assert edits[1].parameters_after - edits[1].parameters_before == 32
    assert edits[1].identical
    assert edits[1].bypass


def test_equal_constants_are_no_sign_of_descent() -> None:
    model = pico.make("BertForMaskedLM", **{**pico.SIZES, "intermediate_size": 48})
    edits = solidify.replace(model, "bert.encoder.layer.*.output.dense", wrappers.Bottleneck)
    assert edits[0].tensors["bert.encoder.layer.0.output.dense.up.bias"] is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mode_and_dtype_follow_the_replaced_module(training: bool, dtype: torch.dtype) -> None:
    model = pico.olmoe(dtype=dtype).train(training)
    solidify.replace(model, MLP, wrappers.PlainMLP)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(module.training is training for module in model.modules())


def test_a_kept_original_keeps_its_own_dtypes() -> None:
    model = pico.olmoe(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.spare = torch.nn.Parameter(torch.ones(1))
    solidify.replace(model, "model.layers.*.self_attn", wrappers.Scaled)
    assert model.model.layers[0].self_attn.original.spare.dtype == torch.float32
    assert model.model.layers[0].self_attn.scale.dtype == torch.bfloat16


def test_no_hit_is_refused_with_what_comes_close() -> None:
    assert "close to it: model.layers.*.mlp" in refused(pico.olmoe(), "model.layer.*.mlp", wrappers.Scaled)


def test_another_class_or_number_than_expected_is_refused() -> None:
    message = refused(pico.olmoe(), MLP, wrappers.Scaled, expect="MixtralSparseMoeBlock", count=3)
    assert "model.layers.0.mlp is OlmoeSparseMoeBlock, but MixtralSparseMoeBlock was expected" in message
    assert "2 modules are hit, but 3 were expected" in message


def test_overlapping_targets_are_refused() -> None:
    assert "lies inside model.layers.0" in refused(
        pico.olmoe(), ["model.layers.0", "model.layers.0.mlp"], wrappers.Scaled
    )
    assert "hit by two patterns" in refused(pico.olmoe(), [MLP, "**.mlp"], wrappers.Scaled)


def test_a_module_that_stands_in_two_places_is_refused() -> None:
    model = pico.olmoe()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert "the same module as" in refused(model, "model.layers.0.mlp", wrappers.Scaled)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (wrappers.ReturnsTuple, "returns float32[4, 12, 32], but ReturnsTuple returns (float32[4, 12, 32], None)"),
        (wrappers.WrongShape, "but WrongShape returns float32[4, 12, 64]"),
        (wrappers.Upcasts, "but Upcasts returns float64[4, 12, 32]"),
        (wrappers.TakesNothing, "TakesNothing fails on what the original takes"),
        (wrappers.Mixing, "looks ahead, once its own parameters are not at their start"),
    ],
)
def test_a_replacement_that_breaks_the_contract_is_refused(module: type, words: str) -> None:
    assert words in refused(pico.olmoe(), MLP, module)


def test_mixing_positions_is_allowed_where_the_model_is_not_causal() -> None:
    model = pico.make("BertForMaskedLM", **{**pico.SIZES, "intermediate_size": 48})
    place = "bert.encoder.layer.*.intermediate"
    assert "padding reaches" in refused(model, place, wrappers.MixingFeedForward)
    assert solidify.replace(model, place, wrappers.MixingFeedForward, declares={"padding": False})[0].probed


def test_looking_ahead_is_found_in_attention_and_in_an_encoder_decoders_decoder() -> None:
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
    assert "looks ahead" in refused(t5, "decoder.block.*.layer.2.DenseReluDense", wrappers.Mixing)
    encoder = "encoder.block.*.layer.1.DenseReluDense"
    assert "padding reaches what is not padding" in refused(t5, encoder, wrappers.Mixing)
    solidify.replace(t5, encoder, wrappers.Mixing, declares={"padding": False})


def test_a_bypass_that_is_not_the_original_is_refused() -> None:
    assert "has `bypass`, but" in refused(pico.olmoe(), "**.o_proj", wrappers.FalseBypass)


def test_arguments_must_fit_the_constructor() -> None:
    message = refused(pico.olmoe(), MLP, wrappers.PlainMLP, arguments={"factr": 2, "config": 1, "factor": {1, 2}})
    assert "takes no argument 'factr'; it takes: factor" in message
    assert "'config' is supplied by solidify" in message
    assert "plain values" in message


def test_weights_are_loaded_once_and_strictly(tmp_path: Path) -> None:
    state = wrappers.PlainMLP(pico.olmoe().config).state_dict()
    save_file(state, tmp_path / "mlp.safetensors")
    torch.save(state, tmp_path / "mlp.pth")
    for name in ("mlp.safetensors", "mlp.pth"):
        model = pico.olmoe()
        solidify.replace(model, MLP, wrappers.PlainMLP, weights=tmp_path / name)
        assert torch.equal(model.model.layers[1].mlp.up.weight, state["up.weight"])


def test_weights_may_differ_by_place(tmp_path: Path) -> None:
    config = pico.olmoe().config
    states = [wrappers.PlainMLP(config).state_dict() for _ in range(2)]
    save_file(
        {f"model.layers.{i}.mlp.{k}": t for i, s in enumerate(states) for k, t in s.items()},
        tmp_path / "all.safetensors",
    )
    model = pico.olmoe()
    solidify.replace(model, MLP, wrappers.PlainMLP, weights=tmp_path / "all.safetensors")
    for layer, state in zip(model.model.layers, states, strict=True):
        assert torch.equal(layer.mlp.down.weight, state["down.weight"])


def test_weights_that_do_not_fit_are_refused_with_every_fault(tmp_path: Path) -> None:
    state = wrappers.PlainMLP(pico.olmoe().config).state_dict()
    state["up.weight"] = torch.zeros(3, 3)
    state["stray"] = torch.zeros(1)
    del state["down.bias"]
    save_file(state, tmp_path / "bad.safetensors")
    message = refused(pico.olmoe(), MLP, wrappers.PlainMLP, weights=tmp_path / "bad.safetensors")
    assert "'up.weight' has shape [3, 3] in the weights, but PlainMLP needs [32, 32]" in message
    assert "hold 'stray', which PlainMLP lacks" in message
    assert "the weights lack 'down.bias'" in message


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    torch.save(wrappers.PlainMLP(pico.olmoe().config), tmp_path / "module.pth")
    assert "reading them would run code" in refused(
        pico.olmoe(), MLP, wrappers.PlainMLP, weights=tmp_path / "module.pth"
    )
    assert "do not exist" in refused(pico.olmoe(), MLP, wrappers.PlainMLP, weights=tmp_path / "none.pth")


def test_operations_stack_in_order() -> None:
    model = pico.olmoe()
    first = solidify.replace(model, MLP, wrappers.Scaled)
    second = solidify.replace(model, MLP, wrappers.Numbered, expect="Scaled")
    assert second[0].old_class == first[0].new_class
    assert type(model.model.layers[0].mlp.original).__name__ == "Scaled"


def test_a_meta_model_is_edited_without_a_probe() -> None:
    with torch.device("meta"):
        model = pico.make("OlmoeForCausalLM", **pico.SIZES, **pico.EXPERTS, intermediate_size=16)
    edits = solidify.replace(model, MLP, TrashCanMoE)
    assert not edits[0].probed
    assert anatomy.is_meta(model.model.layers[0].mlp.trash)


@pytest.mark.parametrize(
    ("name", "target", "settings"),
    [
        ("LlamaForCausalLM", "model.layers.*.self_attn", {"num_key_value_heads": 2, "intermediate_size": 48}),
        ("Qwen3MoeForCausalLM", "model.layers.*.mlp", {**pico.EXPERTS, "moe_intermediate_size": 16, "head_dim": 8}),
        (
            "MixtralForCausalLM",
            "model.layers.*.mlp",
            {"num_local_experts": 4, "intermediate_size": 48, "num_key_value_heads": 2},
        ),
        ("Gemma3ForCausalLM", "model.layers.*.mlp", {"head_dim": 8, "intermediate_size": 48}),
    ],
)
def test_other_families_are_edited_alike(name: str, target: str, settings: dict[str, object]) -> None:
    model = pico.make(name, **{**pico.SIZES, **settings})
    edits = solidify.replace(model, target, wrappers.Scaled, count=2)
    assert all(edit.identical and edit.probed for edit in edits)


def test_a_model_that_reads_an_attribute_of_what_was_replaced_is_left_as_it_was() -> None:
    """T5's feed-forward reads the dtype of `wo.weight`; a module that answers when called may still lack it."""
    settings = {"vocab_size": 99, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    model = pico.make("T5ForConditionalGeneration", **settings, decoder_start_token_id=0)
    inputs = probing.probe_inputs(model)
    before = anatomy.run(model, inputs)
    with pytest.raises(SurgeryError, match="with Scaled in place the model does not run: AttributeError"):
        solidify.replace(model, "encoder.block.0.layer.1.DenseReluDense.wo", wrappers.Scaled)
    assert type(model.encoder.block[0].layer[1].DenseReluDense.wo) is torch.nn.Linear
    assert torch.equal(anatomy.run(model, inputs), before)
