"""Adapters of other ranks, summed, resized, and one on top of another that was merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kinds import fit, outputs, same
from peft import PeftModel

import solidify
from solidify.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Q, V = "model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"


def adapter(model: Any, r: int, targets: list[str], name: str = "default") -> PeftModel:
    """A trained adapter of a rank."""
    made = solidify.attach(model, lora={"r": r, "lora_alpha": 2 * r, "target_modules": targets}, name=name)
    fit(made)
    return made


def delta(model: PeftModel, name: str, layer: int = 0) -> torch.Tensor:
    module: Any = model.get_base_model().model.layers[layer].self_attn.q_proj
    return torch.as_tensor(module.get_delta_weight(name)).double()


def test_an_adapter_on_a_merged_artifact_of_another_has_another_rank_and_more_targets(
    wrapped_artifact: Path, tmp_path: Path
) -> None:
    """Stacked: the first is merged into an artifact, the second trained on that, saved, gone on with, and merged."""
    solidify.save_adapter(adapter(solidify.load(wrapped_artifact), 4, [Q]), tmp_path / "first")
    solidify.merge(tmp_path / "first", tmp_path / "under")
    second = adapter(solidify.load(tmp_path / "under"), 2, [Q, V])
    solidify.save_adapter(second, tmp_path / "second")
    again = solidify.load_adapter(solidify.load(tmp_path / "under"), tmp_path / "second", trainable=True)
    assert same(outputs(again), outputs(second))
    fit(again)
    solidify.save_adapter(again, tmp_path / "further")
    merged = solidify.merge(tmp_path / "further", tmp_path / "both")
    assert all(finding.passed for finding in merged.findings)
    with pytest.raises(AdapterError, match="trained on another base"):
        solidify.load(wrapped_artifact, tmp_path / "second")


@pytest.mark.parametrize(("how", "rank"), [("cat", 6), ("svd", 4)])
def test_adapters_of_different_ranks_are_summed_saved_and_merged(
    wrapped_artifact: Path, tmp_path: Path, how: str, rank: int
) -> None:
    model = adapter(solidify.load(wrapped_artifact), 4, [Q])
    model = adapter(model, 2, [Q], "other")
    expected = 0.5 * delta(model, "default") + 2.0 * delta(model, "other")
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", combination_type=how)
    model.set_adapter("sum")
    assert model.peft_config["sum"].r == rank
    found = delta(model, "sum")
    best = torch.linalg.svdvals(expected)[rank:].norm() / expected.norm()
    assert float((found - expected).norm() / expected.norm()) < 1e-5 + float(best)
    solidify.save_adapter(model, tmp_path / "sum", name="sum")
    loaded = solidify.load(wrapped_artifact, tmp_path / "sum")
    assert same(outputs(loaded), outputs(model))
    assert all(finding.passed for finding in solidify.merge(tmp_path / "sum", tmp_path / "merged").findings)


def test_an_adapter_is_resized_by_its_singular_values(wrapped_artifact: Path, tmp_path: Path) -> None:
    """PEFT's own verb: the nearest update of that rank."""
    model = adapter(solidify.load(wrapped_artifact), 4, [Q])
    whole = delta(model, "default")
    model.add_weighted_adapter(["default"], [1.0], "small", combination_type="svd", svd_rank=2)
    model.set_adapter("small")
    lost = torch.linalg.svdvals(whole)[2:].norm()
    assert float((delta(model, "small") - whole).norm()) == pytest.approx(float(lost), rel=1e-3, abs=1e-6)
    solidify.save_adapter(model, tmp_path / "small", name="small")
    again = solidify.load_adapter(solidify.load(wrapped_artifact), tmp_path / "small", trainable=True)
    assert again.peft_config["default"].r == 2 and same(outputs(again), outputs(model))
    fit(again)
    solidify.save_adapter(again, tmp_path / "further")


def test_another_way_to_sum_leaves_one_adapter_whole(wrapped_artifact: Path) -> None:
    """A mean of two halves, as ties takes it, would be half of the update; PEFT's default is the svd."""
    model = adapter(solidify.load(wrapped_artifact), 4, [Q])
    whole = delta(model, "default")
    model.add_weighted_adapter(["default"], [1.0], "kept", combination_type="ties_svd", density=1.0, svd_rank=4)
    model.set_adapter("kept")
    assert float((delta(model, "kept") - whole).norm() / whole.norm()) < 1e-5
    model.add_weighted_adapter(["default"], [1.0], "small", svd_rank=2)
    assert model.peft_config["small"].r == 2


@pytest.mark.parametrize(("how", "rank"), [("cat", 6), ("svd", 6), ("linear", 4)])
def test_a_sum_of_adapters_with_rslora_is_their_sum(
    wrapped_artifact: Path, tmp_path: Path, how: str, rank: int
) -> None:
    """The scale of a sum is one: PEFT gives it alpha / sqrt(r) of its own rank, by which it would be too large."""
    ranks = (4, 4) if how == "linear" else (4, 2)
    model = solidify.load(wrapped_artifact)
    for name, r in zip(("default", "other"), ranks, strict=True):
        lora = {"r": r, "lora_alpha": 3, "target_modules": [Q], "use_rslora": True}
        model = solidify.attach(model, lora=lora, name=name)
        fit(model)
    expected = 0.5 * delta(model, "default") + 2.0 * delta(model, "other")
    if how == "linear":  # PEFT's: of the factors and not of the products
        layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj
        a, b = (
            sum(
                (w * layer.scaling[n]) ** 0.5 * factor[n].weight.double() for n, w in (("default", 0.5), ("other", 2.0))
            )
            for factor in (layer.lora_A, layer.lora_B)
        )
        expected = b @ a
    model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", how, rank if how == "svd" else None)
    assert model.peft_config["default"].use_rslora and model.peft_config["sum"].r == rank
    assert float((delta(model, "sum") - expected).norm() / expected.norm()) < 1e-5
    model.set_adapter("sum")
    before = outputs(model)
    solidify.save_adapter(model, tmp_path / "sum", name="sum")
    assert same(outputs(solidify.load(wrapped_artifact, tmp_path / "sum")), before)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"trainable_token_indices": [1, 2]}])
def test_what_is_no_low_rank_update_is_not_summed(wrapped_artifact: Path, more: dict[str, Any]) -> None:
    model = solidify.load(wrapped_artifact)
    for name in ("default", "other"):
        model = solidify.attach(model, lora={"r": 2, "target_modules": [Q], **more}, name=name)
    with pytest.raises(AdapterError, match=f"'default' has {next(iter(more))}.*merge one adapter after the other"):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.0], "sum", combination_type="cat")
    assert "sum" not in model.peft_config
