"""Several adapters that train something in full, in every verb that PEFT has for them: right, or refused by name."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from peft import PeftModel
from torch import nn

import solidify
from solidify.adapter import base_state, lookup
from solidify.directory import manifest
from solidify.errors import AdapterError
from solidify.findings import Finding
from solidify.model import anatomy

Q, V = "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"
WAYS: dict[str, dict[str, Any]] = {
    "parameters": {"lora": {"r": 4, "target_modules": [Q]}, "train": ["**.o_proj.scale"]},
    "modules": {"lora": {"r": 4, "target_modules": [Q]}, "train": ["model.norm", "**.o_proj.up"]},
    "no lora": {"train": ["**.mlp.scale", "model.layers.0.self_attn.o_proj.down"]},
}
OTHER: dict[str, Any] = {"lora": {"r": 4, "target_modules": [V]}, "train": ["**.o_proj.scale", "model.norm"]}
APART: dict[str, Any] = {"lora": {"r": 4, "target_modules": [V]}, "train": ["lm_head"]}


def perturb(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    if not inputs:
        return anatomy.run(model, {"input_ids": pico.tokens()})
    with torch.no_grad():
        return model(input_ids=pico.tokens(), use_cache=False, **inputs).logits


def two(artifact: Path, way: dict[str, Any], other: dict[str, Any] = OTHER) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns a model with the adapters `one` and `two` (active), and what each and the base alone computes."""
    expected = {"base": logits(solidify.load(artifact))}
    model = perturb(solidify.attach(solidify.load(artifact), name="one", **way), 1)
    expected["one"] = logits(model)
    model = solidify.attach(model, name="two", **other)
    assert torch.equal(logits(model.eval()), expected["base"])  # it starts as the base, not as the other adapter
    expected["two"] = logits(perturb(model, 2))
    return model, expected


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_switching_saving_and_deleting(wrapped_artifact: Path, tmp_path: Path, way: str) -> None:
    model, expected = two(wrapped_artifact, WAYS[way])
    for name in ("one", "two", "one", "two"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), expected["base"])
    for name in ("one", "two"):  # also the one that is not active
        solidify.save_adapter(model, tmp_path / name, name=name)
        assert torch.equal(logits(solidify.load(wrapped_artifact, tmp_path / name)), expected[name])
    assert torch.equal(logits(model), expected["two"])
    model.delete_adapter("one")
    assert torch.equal(logits(model), expected["two"])


@pytest.mark.parametrize("way", WAYS)
def test_deleting_the_active_one_leaves_the_other(wrapped_artifact: Path, way: str) -> None:
    model, expected = two(wrapped_artifact, WAYS[way])
    model.delete_adapter("two")
    assert torch.equal(logits(model), expected["one"])
    model.delete_adapter("one")
    assert torch.equal(logits(model.base_model.model), expected["base"])


@pytest.mark.parametrize("name", ["one", "two", None])
@pytest.mark.parametrize("way", WAYS)
def test_merging_one_by_name_merges_that_one(wrapped_artifact: Path, way: str, name: str | None) -> None:
    model, expected = two(wrapped_artifact, WAYS[way])
    merged = model.merge_and_unload(adapter_names=None if name is None else [name])
    assert torch.allclose(logits(merged), expected[name or "two"], atol=1e-5)
    assert set(merged.state_dict()) == set(solidify.load(wrapped_artifact).state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_unload_gives_the_base_back(wrapped_artifact: Path, way: str) -> None:
    model, expected = two(wrapped_artifact, WAYS[way])
    plain = model.unload()
    assert torch.equal(logits(plain), expected["base"])
    solidify.attach(plain, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_merging_for_a_while_gives_the_very_weights_back(wrapped_artifact: Path, tmp_path: Path, way: str) -> None:
    model, expected = two(wrapped_artifact, WAYS[way])
    model.merge_adapter()
    assert torch.allclose(logits(model), expected["two"], atol=1e-5)
    if WAYS[way].get("lora"):
        with pytest.raises(AdapterError, match="is merged into its weights now: call unmerge_adapter"):
            solidify.save_adapter(model, tmp_path / "two", name="two")
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected["two"])
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), expected["base"])
    model.merge_adapter()
    model.set_adapter("one")
    assert torch.equal(logits(model), expected["one"])
    base_state.refuse_changed(model, base_state.require(model))
    solidify.save_adapter(model, tmp_path / "two", name="two")
    assert torch.equal(logits(model.unload()), expected["base"])


def test_merging_another_than_the_active_one_is_refused(wrapped_artifact: Path) -> None:
    model, expected = two(wrapped_artifact, WAYS["parameters"])
    with pytest.raises(AdapterError, match=r"'one' trained model.layers.0.self_attn.o_proj.scale.*set_adapter first"):
        model.merge_adapter(adapter_names=["one"])
    assert torch.equal(logits(model), expected["two"])


def test_two_that_train_the_same_are_not_active_together(wrapped_artifact: Path) -> None:
    for way in ("parameters", "modules"):
        model, expected = two(wrapped_artifact, WAYS[way])
        with pytest.raises(AdapterError, match="cannot be active together: each trained its own model"):
            model.base_model.set_adapter(["one", "two"])
        assert torch.equal(logits(model), expected["two"])
        with pytest.raises(AdapterError, match="cannot be active together"):
            model.merge_and_unload(adapter_names=["one", "two"])


def test_two_that_train_apart_are_active_together(wrapped_artifact: Path) -> None:
    model, _ = two(wrapped_artifact, WAYS["parameters"], APART)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    by_hand = solidify.load(wrapped_artifact)
    state = {}
    for name in ("one", "two"):
        alone = deepcopy(model)
        alone.set_adapter(name)
        base = solidify.load(wrapped_artifact).state_dict()
        state |= {k: t for k, t in alone.merge_and_unload().state_dict().items() if not torch.equal(t, base[k])}
    by_hand.load_state_dict(state, strict=False)
    assert torch.allclose(logits(by_hand), both, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged), both, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_weighted_sums_of_what_is_trained_in_full_are_refused(wrapped_artifact: Path, way: str) -> None:
    model, expected = two(wrapped_artifact, WAYS[way])
    with pytest.raises(AdapterError, match="add_weighted_adapter cannot take adapters that trained something in full"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type="linear")
    assert list(model.peft_config) == ["one", "two"]
    assert torch.equal(logits(model), expected["two"])


def test_weighted_sums_of_low_rank_updates_are_peft_s(wrapped_artifact: Path) -> None:
    lora: dict[str, Any] = {"lora": {"r": 4, "target_modules": [Q]}}
    model, expected = two(wrapped_artifact, lora, lora)
    model.add_weighted_adapter(["one", "two"], [1.0, 0.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert torch.allclose(logits(model), expected["one"], atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_different_adapters_are_refused(wrapped_artifact: Path, way: str) -> None:
    model, _ = two(wrapped_artifact, WAYS[way])
    with pytest.raises(AdapterError, match="cannot mix these adapters in one batch"):
        logits(model, adapter_names=["one", "two"])
    with pytest.raises(AdapterError, match="cannot mix these adapters in one batch"):
        logits(model, adapter_names=["two", "__base__"])


def test_rows_of_different_adapters_are_right_where_peft_can_mix_them(wrapped_artifact: Path) -> None:
    lora: dict[str, Any] = {"lora": {"r": 4, "target_modules": [Q]}}
    heads = [{**lora, "train": ["lm_head"]}] * 2
    for first, second in ((lora, lora), heads):
        model, expected = two(wrapped_artifact, first, second)
        for names in (["one", "two"], ["two", "__base__"], ["__base__", "one"]):
            found = logits(model, adapter_names=names)
            for row, name in enumerate(names):
                wanted = expected["base" if name == "__base__" else name][row]
                assert torch.allclose(found[row], wanted, atol=1e-5), (names, row)
    model, _ = two(wrapped_artifact, {**lora, "train": ["lm_head"]}, lora)
    with pytest.raises(AdapterError, match="lm_head"):
        logits(model, adapter_names=["one", "two"])


def test_pefts_own_loading_does_not_write_into_the_base(wrapped_artifact: Path, tmp_path: Path) -> None:
    model, expected = two(wrapped_artifact, WAYS["parameters"])
    for name in ("one", "two"):
        solidify.save_adapter(model, tmp_path / name, name=name)
    model = solidify.load(wrapped_artifact, tmp_path / "one")
    with pytest.raises(AdapterError, match=r"would write into the base itself; load it with solidify.load_adapter"):
        model.load_adapter(tmp_path / "two", "two")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected["one"])
    model = solidify.load_adapter(model, tmp_path / "two", name="two")
    assert torch.equal(logits(model), expected["two"])


def test_pefts_own_loading_is_right_for_what_peft_knows(wrapped_artifact: Path, tmp_path: Path) -> None:
    other: dict[str, Any] = {"lora": {"r": 4, "target_modules": [V]}, "train": ["model.norm"]}
    model, expected = two(wrapped_artifact, WAYS["modules"], other)
    for name in ("one", "two"):
        solidify.save_adapter(model, tmp_path / name, name=name)
    model = solidify.load(wrapped_artifact, tmp_path / "one")
    model.load_adapter(tmp_path / "two", "two")
    assert torch.equal(logits(model), expected["one"])
    model.set_adapter("two")
    assert torch.equal(logits(model), expected["two"])


def test_pefts_own_saving_of_all_is_loaded_into_the_same_adapters(wrapped_artifact: Path, tmp_path: Path) -> None:
    """As trainers do for their checkpoints."""
    model, expected = two(wrapped_artifact, WAYS["parameters"])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for kind, _, parameter in lookup.named_parameters(model):
            if kind != "base":
                parameter.zero_()
    for name in ("one", "two"):
        model.load_adapter(tmp_path / name, name)
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])


def test_adapters_that_overlap_are_refused_in_both_orders(wrapped_artifact: Path, tmp_path: Path) -> None:
    inner: dict[str, Any] = {"lora": {"r": 2, "target_modules": ["**.o_proj.up"]}, "train": ["**.o_proj.scale"]}
    outer: dict[str, Any] = {"train": ["model.layers.*.self_attn.o_proj"]}
    for first, second in ((inner, outer), (outer, inner)):
        model = perturb(solidify.attach(solidify.load(wrapped_artifact), name="one", **first), 1)
        before = logits(model)
        with pytest.raises(AdapterError, match="cannot stand on one model"):
            solidify.attach(model, name="two", **second)
        assert torch.equal(logits(model), before)
        solidify.save_adapter(perturb(solidify.attach(solidify.load(wrapped_artifact), **second), 2), tmp_path / "a")
        with pytest.raises(AdapterError, match="cannot stand on one model"):
            solidify.load_adapter(model, tmp_path / "a", name="two")
        assert torch.equal(logits(model), before)


def test_what_stands_beside_another_adapters_update_is_saved_as_if_alone(
    wrapped_artifact: Path, tmp_path: Path
) -> None:
    lora: dict[str, Any] = {"lora": {"r": 2, "target_modules": ["**.o_proj.down"]}}
    model, expected = two(wrapped_artifact, lora, {"train": ["**.o_proj.down.bias"]})
    for name in ("one", "two"):
        solidify.save_adapter(model, tmp_path / name, name=name)
        assert torch.equal(logits(solidify.load(wrapped_artifact, tmp_path / name)), expected[name])


def test_switching_trains_and_freezes_as_before(wrapped_artifact: Path, tmp_path: Path) -> None:
    solidify.save_adapter(
        perturb(solidify.attach(solidify.load(wrapped_artifact), **WAYS["modules"]), 1), tmp_path / "adapter"
    )
    model: PeftModel = solidify.load(wrapped_artifact, tmp_path / "adapter")
    with model.disable_adapter():
        logits(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_failed_of_an_adapter_is_its_own(wrapped_artifact: Path, tmp_path: Path) -> None:
    """It goes with the adapter, and into what is made of it; another one of its name has none of it."""
    found = {name: Finding(f"a check of {name}", False, "it does not hold") for name in ("one", "two")}
    lora = {"r": 4, "target_modules": [Q]}
    model: Any = None
    for seed, name in enumerate(found):
        alone = perturb(solidify.attach(solidify.load(wrapped_artifact), lora=lora), seed)
        solidify.save_adapter(alone, tmp_path / name, found=[found[name]])
        model = solidify.load_adapter(model or solidify.load(wrapped_artifact), tmp_path / name, name=name)

    def failed(name: str, of: Any = None) -> list[str]:
        solidify.save_adapter(of or model, tmp_path / "saved", name=name)
        return [each["name"] for each in manifest.read(tmp_path / "saved").failed]

    assert failed("one", deepcopy(model)) == ["a check of one"]
    for names, expected in ((["two", "one"], ["a check of two", "a check of one"]), (["two"], ["a check of two"])):
        mixed = " and ".join(names)
        model.add_weighted_adapter(names, [0.5] * len(names), mixed, combination_type="linear")
        assert failed(mixed) == expected
    model.add_weighted_adapter(["two"], [1.0], "one", combination_type="linear")  # which PEFT passes over: it is there
    assert failed("one") == ["a check of one"]
    model.delete_adapter("one")
    assert failed("two and one") == ["a check of two", "a check of one"]
    model = perturb(solidify.attach(model, lora=lora, name="one"), 3)
    assert failed("one") == []
    assert failed("two") == ["a check of two"]
    model.add_weighted_adapter(["one", "two and one"], [0.5, 0.5], "again", combination_type="linear")
    assert failed("again") == ["a check of two", "a check of one"]


@pytest.mark.parametrize("other", [Q, V])
@pytest.mark.parametrize("way", ["modules", "no lora"])
def test_the_plain_model_inside_is_not_taken_for_one_without_adapters(
    wrapped_artifact: Path, tmp_path: Path, way: str, other: str
) -> None:
    plain = solidify.load(wrapped_artifact)
    model = perturb(solidify.attach(plain, name="one", **WAYS[way]), 1)
    solidify.save_adapter(model, tmp_path / "one", name="one")
    expected, keys = logits(model), {*plain.state_dict()}
    trained = [p for p in model.parameters() if p.requires_grad]
    words = r"plain one inside a PeftModel \(of the adapter 'one'\).*give the PeftModel that `attach`"
    for inside in (plain, model.base_model):
        with pytest.raises(AdapterError, match=words):
            solidify.attach(inside, name="two", lora={"r": 2, "target_modules": [other]})
        with pytest.raises(AdapterError, match=words):
            solidify.load_adapter(inside, tmp_path / "one", name="two")
    assert torch.equal(logits(model), expected) and {*plain.state_dict()} == keys
    assert all(p is q for p, q in zip(trained, (p for p in model.parameters() if p.requires_grad), strict=True))
    assert [*model.peft_config] == ["one"] and model.active_adapter == "one"
    apart = {"lora": {"r": 2, "target_modules": [V]}}
    assert [*solidify.attach(model, name="two", **apart).peft_config] == ["one", "two"]
    assert isinstance(solidify.attach(model.unload(), lora={"r": 2, "target_modules": [V]}), PeftModel)
