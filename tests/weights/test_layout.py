"""Tensor by tensor, transformers' rules make what transformers makes of the whole."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from solidify.artifact import conversion
from solidify.upstream.transformers import without_conversion
from solidify.weights import checkpoint, format, layout, store


def convert(model: PreTrainedModel, directory: Path) -> tuple[layout.Layout, PreTrainedModel, dict[str, object]]:
    """Saves a model in the hub's layout, converts that, and loads the result as it stands."""
    model.save_pretrained(directory / "hub")
    files = checkpoint.read(directory / "hub")
    config = AutoConfig.from_pretrained(directory / "hub")
    skeleton, info = conversion._load_skeleton(type(model), config, str(model.dtype).split(".")[1], files)
    assert not any(info.values())
    found = layout.read(skeleton, files)
    (directory / "memory").mkdir()
    store.write(directory / "memory", found.tensor_sources(skeleton, files))
    config.save_pretrained(directory / "memory")
    with without_conversion():
        again, info = type(model).from_pretrained(directory / "memory", output_loading_info=True, dtype=model.dtype)
    return found, again, info


def refuse_difference(model: PreTrainedModel, again: PreTrainedModel, info: dict[str, object], directory: Path) -> None:
    """What was converted must be, bit for bit, what transformers loads from the hub's layout."""
    whole = type(model).from_pretrained(directory / "hub", dtype=model.dtype)
    assert not any(info.values())
    found, wanted = again.state_dict(), whole.state_dict()
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert bytes(format.bytes_of(found[name])) == bytes(format.bytes_of(tensor)), name


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss", "qwen3_vl_moe", "gemma3", "llama"])
def test_a_family_is_converted_as_transformers_does(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_BLOCK", 2**12)  # so that experts come in several blocks
    auto = "AutoModelForImageTextToText" if "vl" in kind else "AutoModelForCausalLM"
    model = families.tiny(kind, auto)
    found, again, info = convert(model, tmp_path)
    assert found.in_memory == (kind in ("gpt_oss", "llama"))
    refuse_difference(model, again, info, tmp_path)


def test_experts_are_made_in_blocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = families.tiny("olmoe")
    model.save_pretrained(tmp_path)
    files = checkpoint.read(tmp_path)
    (first, *_) = layout.read(model, files).conversions
    assert len(list(first._split_blocks())) == 1
    monkeypatch.setattr(layout, "_BLOCK", 1)
    blocks = list(first._split_blocks())
    assert len(blocks) == model.config.num_experts
    assert sorted(key for block in blocks for key in block.keys) == sorted(first.keys)


def test_the_dtype_is_the_models(tmp_path: Path) -> None:
    model = families.tiny("olmoe")
    model.save_pretrained(tmp_path / "hub")
    files = checkpoint.read(tmp_path / "hub")
    config = AutoConfig.from_pretrained(tmp_path / "hub")
    skeleton, _ = conversion._load_skeleton(type(model), config, "bfloat16", files)
    found = layout.read(skeleton, files)
    assert not found.in_memory
    store.write(tmp_path, found.tensor_sources(skeleton, files))
    whole = type(model).from_pretrained(tmp_path / "hub", dtype="bfloat16").state_dict()
    for name, entry in checkpoint.read(tmp_path).entries.items():
        assert entry.shape.dtype == torch.bfloat16
        assert torch.equal(entry.read(), whole[name])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "auto"), families.cases())
def test_every_family_is_converted_as_transformers_does(kind: str, auto: str, tmp_path: Path) -> None:
    transformers.logging.set_verbosity_error()
    model = families.tiny(kind, auto)
    if kind == "marian":
        pytest.skip("its own save leaves out positions that it computes, and its own load then misses them")
    _, again, info = convert(model, tmp_path)
    refuse_difference(model, again, info, tmp_path)
