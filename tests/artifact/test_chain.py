"""Every operation in one artifact, and a second surgery on an artifact: one history, one list of changes."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from pico import wrappers
from transformers import AutoModelForSequenceClassification

import solidify
from solidify.checks import structure
from solidify.directory import manifest
from solidify.model import anatomy

BOTTLENECKS = ["model.layers.0.self_attn.o_proj", "model.layers.3.self_attn.o_proj"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a copied and a removed layer, wrapped MLPs, a module at two places, and a new head."""
    directory = tmp_path_factory.mktemp("chain") / "everything"
    model = pico.llama(num_hidden_layers=4)
    edits = solidify.insert(model, "model.layers.1", zero=["self_attn.o_proj", "mlp.down_proj"])
    edits += solidify.replace(model, "model.layers.*.mlp", wrappers.Scaled)
    edits += solidify.remove(model, "model.layers.4")
    edits += solidify.share(model, BOTTLENECKS, wrappers.Bottleneck, arguments={"width": 4})
    edits += solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    artifact = solidify.build(model, edits, directory)
    assert all(finding.passed for finding in artifact.findings)
    torch.save(model(pico.tokens()).logits, directory.parent / "logits.pt")
    return directory


def test_all_operations_come_back_in_one_artifact(everything: Path) -> None:
    model = solidify.load(everything)
    assert torch.equal(model(pico.tokens()).logits, torch.load(everything.parent / "logits.pt"))
    assert "value_head" in model(pico.tokens())
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert structure.structure(model, manifest.read(everything).edits).passed
    classes = set(json.loads((everything / "config.json").read_text())["auto_map"])
    assert {"AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModel"} <= classes


def test_a_shared_module_stays_one_module(everything: Path, tmp_path: Path) -> None:
    model = solidify.load(everything)
    first, second = (model.get_submodule(name) for name in BOTTLENECKS)
    assert first is second
    assert not any(name.startswith(BOTTLENECKS[1]) for name in manifest.read(everything).tensors)
    model.save_pretrained(tmp_path / "again")  # transformers' own saving knows of the tie
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(again(pico.tokens()).logits, model(pico.tokens()).logits)
    before = second.up.weight.clone()
    first.up.weight.data += 1
    assert not torch.equal(second.up.weight, before)


def test_a_new_head_learns_on_the_changed_backbone(everything: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(everything, trust_remote_code=True, num_labels=3)
    assert type(model.model.layers[0].mlp).__name__ == "Scaled"
    labels = torch.tensor([0, 2])
    model(input_ids=pico.tokens(), labels=labels).loss.backward()
    assert model.score.weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.scale.grad.abs().sum() > 0


def test_a_second_surgery_adds_to_the_first(everything: Path, tmp_path: Path) -> None:
    model = solidify.load(everything)
    before = anatomy.run(model, {"input_ids": pico.tokens()})
    edits = solidify.insert(model, "model.layers.3", zero=["self_attn.o_proj", "mlp"])
    edits += solidify.replace(model, "model.layers.*.self_attn.q_proj", wrappers.Scaled)
    assert torch.equal(anatomy.run(model, {"input_ids": pico.tokens()}), before)
    artifact = solidify.build(model, edits, tmp_path / "second")
    assert all(finding.passed for finding in artifact.findings)
    steps = [step["step"] for step in artifact.manifest.lineage]
    assert steps == ["base", "surgery", "surgery"]
    first = manifest.read(everything)
    assert artifact.manifest.edits[: len(first.edits)] == first.edits
    assert artifact.manifest.base == first.base
    again = solidify.load(tmp_path / "second")
    assert torch.equal(anatomy.run(again, {"input_ids": pico.tokens()}), before)
    assert (
        "class SolidLlamaForCausalLM(Solid, LlamaForCausalLM)"
        in (tmp_path / "second" / "modeling_solid_llama.py").read_text()
    )
    assert structure.structure(again, artifact.manifest.edits).passed


@pytest.mark.slow
def test_an_artifact_is_a_base_in_a_recipe(everything: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {{model: {everything}}}\n"
        "surgery:\n"
        "  - {insert: model.layers.0, expect: LlamaDecoderLayer, zero: [self_attn.o_proj, mlp]}\n"
        "  - {remove: model.layers.4, expect: LlamaDecoderLayer, count: 1}\n"
        f"  - {{add: reward, with: '{wrappers.__file__}:ValueHead', reads: model.norm}}\n"
    )
    report = solidify.run(solidify.recipe.schema.load(recipe), tmp_path / "out")
    assert report.passed
    record = manifest.read(tmp_path / "out" / "artifact")
    assert [step["step"] for step in record.lineage] == ["base", "surgery", "surgery"]
    assert [edit["operation"] for edit in record.edits][-3:] == ["rearrange", "rearrange", "add"]
