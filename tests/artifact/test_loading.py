from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

import solidify
from solidify.artifact import loading
from solidify.directory import manifest
from solidify.errors import ArtifactError, ModelError
from solidify.model import anatomy, probing
from solidify.recipe import references


def test_an_artifact_loads_as_what_it_was(trash_artifact: Path) -> None:
    model = solidify.load(trash_artifact)
    assert type(model).__name__ == "SolidOlmoeForCausalLM"
    assert not model.training
    inputs = probing.probe_inputs(model)
    assert torch.equal(anatomy.run(model, inputs), anatomy.run(pico.olmoe(), inputs))


@pytest.mark.parametrize(
    "spoil",
    ["code", "config", "weights", "additional code", "missing file"],
)
def test_one_changed_byte_is_refused_before_any_code_runs(
    trash_artifact: Path, copy_of: Callable[[Path], Path], tmp_path: Path, spoil: str
) -> None:
    directory = copy_of(trash_artifact)
    witness = tmp_path / "ran"
    path = directory / "trashcan_moe.py"
    if spoil == "code":
        path.write_text(f"open({str(witness)!r}, 'w').close()\n" + path.read_text())
    elif spoil == "config":
        text = (directory / "config.json").read_text()
        (directory / "config.json").write_text(text.replace('"num_experts": 8', '"num_experts": 9'))
    elif spoil == "weights":
        content = bytearray((directory / "model.safetensors").read_bytes())
        content[-200] ^= 1
        (directory / "model.safetensors").write_bytes(bytes(content))
    elif spoil == "additional code":
        (directory / "extra.py").write_text("x = 1\n")
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match="is not what was written"):
        solidify.load(directory)
    assert not witness.exists()


def test_code_from_elsewhere_runs_only_when_allowed(
    trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "another machine"))
    with pytest.raises(ArtifactError, match=r"code that is not trusted on this machine: .*trashcan_moe.py"):
        solidify.load(trash_artifact)
    assert type(solidify.load(trash_artifact, trust_remote_code=True)).__name__ == "SolidOlmoeForCausalLM"


def test_two_artifacts_with_equal_directory_names_run_their_own_code(tmp_path: Path) -> None:
    outputs = []
    for sign in ("", "-"):
        place = tmp_path / f"place{sign}"
        place.mkdir()
        (place / "mine.py").write_text(
            "from torch import nn\n\nclass Signed(nn.Module):\n"
            "    def __init__(self, original):\n        super().__init__()\n        self.original = original\n\n"
            f"    def forward(self, x):\n        return {sign}self.original(x)\n"
        )
        model = pico.olmoe()
        edits = solidify.replace(model, "**.mlp", references.resolve("mine.py:Signed", place))
        pico.artifact(model, edits, place / "model")
        inputs = probing.probe_inputs(model)
        outputs.append(anatomy.run(solidify.load(place / "model"), inputs))
        assert torch.equal(outputs[-1], anatomy.run(model, inputs))
    assert not torch.equal(*outputs)


def test_a_class_registered_in_this_process_does_not_pass_for_the_artifacts(
    trash_artifact: Path, copy_of: Callable[[Path], Path]
) -> None:
    from transformers import AutoModelForCausalLM, OlmoeForCausalLM

    directory = copy_of(trash_artifact)
    config = type(solidify.load(directory).config)
    impostor = type("SolidOlmoeForCausalLM", (OlmoeForCausalLM,), {"config_class": config, "__module__": __name__})
    before = dict(AutoModelForCausalLM._model_mapping._extra_content)
    AutoModelForCausalLM.register(config, impostor, exist_ok=True)
    try:
        with pytest.raises(ArtifactError, match="was not loaded completely"):
            solidify.load(directory)
    finally:
        AutoModelForCausalLM._model_mapping._extra_content = before


def test_what_is_no_artifact_is_named(tmp_path: Path, trash_artifact: Path, copy_of: Callable[[Path], Path]) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        solidify.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="was not made by solidify"):
        solidify.load(tmp_path)
    directory = copy_of(trash_artifact)
    document = json.loads((directory / manifest.NAME).read_text())
    (directory / manifest.NAME).write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(ArtifactError, match="this solidify reads up to 1; upgrade solidify"):
        solidify.load(directory)
    (directory / manifest.NAME).write_text("[]")
    with pytest.raises(ArtifactError, match="is not a manifest"):
        solidify.load(directory)


def test_a_base_is_loaded_completely_or_not_at_all(tmp_path: Path) -> None:
    pico.olmoe().save_pretrained(tmp_path / "base")
    assert loading.load_base(str(tmp_path / "base")).origin["class"] == "OlmoeForCausalLM"
    state = load_file(tmp_path / "base" / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"would fill in random values: missing_keys: model.norm.weight"):
        loading.load_base(str(tmp_path / "base"))


def test_bases_that_cannot_be_had_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        loading.load_base(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="'float31', which torch does not know"):
        loading.load_base(str(tmp_path), dtype="float31")
    pico.olmoe().save_pretrained(tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(ModelError, match="has the class NoSuchModel, which is not a model class of transformers"):
        loading.load_base(str(tmp_path / "odd"))


def test_a_skeleton_reads_no_weights(tmp_path: Path) -> None:
    pico.olmoe(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    model = loading.load_base(str(tmp_path / "base"), device="meta").model
    assert anatomy.is_meta(model)
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_is_found_or_its_absence_is_said(trash_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no tokenizer"):
        loading.load_tokenizer(trash_artifact)


def test_moving_an_artifact_does_not_break_it(trash_artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(trash_artifact, tmp_path / "a" / "b.c-d")
    assert type(solidify.load(tmp_path / "a" / "b.c-d").model.layers[0].mlp).__name__ == "TrashCanMoE"
