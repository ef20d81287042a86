"""How a model is loaded, and saved again, is the user's choice: types, devices, disk, shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from clients import strangers


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=pico.tokens()).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64])
def test_a_type_given_at_load_casts_every_saved_tensor_and_no_computed_one(
    artifact: Path, stranger: Callable[..., PreTrainedModel], dtype: torch.dtype | str
) -> None:
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model, plain = stranger(artifact, dtype=dtype), stranger(artifact)
    assert model.dtype == wanted
    state = model.state_dict()
    assert set(state) == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert state[name].dtype == wanted
        assert torch.equal(state[name], tensor.to(wanted))
    computed = dict(model.named_non_persistent_buffers())
    assert computed
    for name, tensor in plain.named_non_persistent_buffers():
        assert computed[name].dtype == tensor.dtype
        assert torch.equal(computed[name], tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_computes_what_the_base_computes_in_half_precision(
    trash_artifact: Path, stranger: Callable[..., PreTrainedModel], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Bit for bit: the trash cans are asleep."""
    pico.olmoe().save_pretrained(tmp_path / "base")
    base, model = (strangers.aligned(stranger(d, dtype=dtype)) for d in (tmp_path / "base", trash_artifact))
    assert logits(model).dtype == dtype
    assert torch.equal(logits(model), logits(base))


def test_the_automatic_type_is_the_saved_one(
    artifact: Path, stranger: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    assert stranger(artifact, dtype="auto").dtype == torch.float32
    stranger(artifact, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert stranger(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "sequential", "cpu"])
def test_a_device_map_changes_no_bit(
    artifact: Path, stranger: Callable[..., PreTrainedModel], device_map: str | dict[str, str]
) -> None:
    room = {"max_memory": {"cpu": "1GB"}} if device_map in ("auto", "sequential") else {}  # no accelerator takes part
    model, plain = stranger(artifact, device_map=device_map, **room), stranger(artifact)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert torch.equal(logits(model), logits(plain))


def test_layers_that_find_no_room_run_from_disk(
    artifact: Path, stranger: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """What a machine with little memory does: the layers' weights stay on the meta device between their calls."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = stranger(artifact, device_map={**places, "model.layers": "disk"}, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    assert torch.equal(logits(model), logits(stranger(artifact)))


def test_the_architecture_alone_can_be_had_from_the_configuration(
    artifact: Path, stranger: Callable[..., PreTrainedModel]
) -> None:
    """As somebody does who trains it from scratch."""
    config = AutoConfig.from_pretrained(artifact, trust_remote_code=True)
    fresh, plain = AutoModelForCausalLM.from_config(config, trust_remote_code=True), stranger(artifact)
    assert type(fresh).__name__ == type(plain).__name__
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes
    assert all(torch.isfinite(tensor).all() for tensor in fresh.state_dict().values())
    assert not torch.equal(logits(fresh), logits(plain))


def test_tokens_can_be_added_and_stay(artifact: Path, stranger: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """The tolerance is rounding: plain `save_pretrained` does not align."""
    model = stranger(artifact)
    before = logits(model)
    model.resize_token_embeddings(136)
    assert torch.equal(logits(model)[..., :128], before)
    model.save_pretrained(tmp_path)
    loaded = stranger(tmp_path)
    assert loaded.config.vocab_size == 136
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def again(
    moe: Path, dense: Path, wrapped_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path, dict[str, torch.Tensor]]]:
    """By case: an artifact, the directory where it was saved again, and what a fresh process found there."""
    scratch = tmp_path_factory.mktemp("again")
    cases = {"moe": (moe, {}), "dense": (dense, {}), "shards": (wrapped_artifact, {"max_shard_size": "20KB"})}
    for name, (directory, options) in cases.items():
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        model.save_pretrained(scratch / name / "model", **options)
    jobs = {name: {"directory": str(scratch / name / "model")} for name in cases}
    found = strangers.load(jobs, pico.tokens(), scratch)
    return {name: (directory, scratch / name / "model", found[name]) for name, (directory, _) in cases.items()}


@pytest.mark.parametrize("case", ["moe", "dense", "shards"])
def test_saved_again_it_reloads_in_a_fresh_process(
    again: dict[str, tuple[Path, Path, dict[str, torch.Tensor]]],
    stranger: Callable[..., PreTrainedModel],
    case: str,
) -> None:
    """The state is bit-identical, and so are outputs once the tensors stand at aligned addresses.

    `save_pretrained` packs tensors without gaps, so a number behind which matrices stand (a trash can has two) moves
    them to odd addresses; as loaded, outputs may differ by float32 rounding. An artifact of ours is written aligned.
    """
    directory, saved, found = again[case]
    model = stranger(directory)
    state = {key: tensor for key, tensor in found.items() if key not in ("logits", "aligned")}
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(found["aligned"], logits(model))
    torch.testing.assert_close(found["logits"], logits(model), rtol=1e-5, atol=1e-6)
    assert (len(list(saved.glob("*.safetensors"))) > 1) == (case == "shards")


@pytest.mark.parametrize("case", ["moe", "dense", "shards"])
def test_saved_again_it_has_all_its_code(
    again: dict[str, tuple[Path, Path, dict[str, torch.Tensor]]], case: str
) -> None:
    directory, saved, _ = again[case]
    code = {path.name: path.read_bytes() for path in directory.glob("*.py")}
    assert {path.name: path.read_bytes() for path in saved.glob("*.py")} == code
    before, after = (json.loads((d / "config.json").read_text(encoding="utf-8")) for d in (directory, saved))
    assert {key: after[key] for key in ("auto_map", "model_type", "architectures", "surgery")} == {
        key: before[key] for key in ("auto_map", "model_type", "architectures", "surgery")
    }
