"""Weights in another precision on disk: what an artifact is when it is loaded so, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import solidify
from solidify.errors import ArtifactError, ModelError
from solidify.exporting import comparison, forms
from solidify.model import anatomy
from solidify.modules.gated_attention import GatedAttention
from solidify.system import console
from solidify.upstream.bitsandbytes import keep_as_quantized

pytestmark = pytest.mark.filterwarnings("ignore:.*inputs will be cast from:UserWarning")


def logits(model: Any) -> torch.Tensor:
    keep_as_quantized(model)
    return anatomy.run(model, {"input_ids": pico.tokens()})


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.*.self_attn", GatedAttention)
    return pico.artifact(model, edits, tmp_path_factory.mktemp("packed") / "gated")


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_a_packed_artifact_loads_by_transformers_as_it_stands(gated: Path, tmp_path: Path, word: str) -> None:
    made = solidify.export(gated, tmp_path / word, word)
    assert [finding.verdict for finding in made.findings[:3]] == ["proved", "proved", "measured"]
    model = AutoModelForCausalLM.from_pretrained(made.directory, trust_remote_code=True).eval()
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype in (torch.uint8, torch.int8)
    assert attention.output_gate.weight.dtype == torch.float32  # new modules are not packed
    assert torch.equal(logits(model), logits(solidify.load(gated, quantization=word)))
    assert solidify.check(made.directory).passed
    again = solidify.load(made.directory, trust_remote_code=True)
    assert torch.equal(logits(model), logits(again))
    with pytest.raises(ArtifactError, match=r"are packed .*, and what was rounded is lost"):
        solidify.export(made.directory, tmp_path / "twice", "float32", trust_remote_code=True)
    with pytest.raises(ModelError, match="are packed as they stand"):
        solidify.load(made.directory, trust_remote_code=True, quantization=word)


def test_a_merged_plain_model_is_packed_and_no_base_to_merge_into(tmp_path: Path) -> None:
    pico.llama().save_pretrained(tmp_path / "base")
    adapted = solidify.attach(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora={"r": 2, "target_modules": "**.q_proj"}
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = solidify.save_adapter(adapted.eval(), tmp_path / "adapter")
    merged = solidify.merge(adapter, tmp_path / "merged").directory
    count = sum(p.numel() for p in pico.llama().parameters())
    assert f"\n{count:,} parameters.\n" in (merged / "README.md").read_text()  # the model's, without the adapter's
    made = solidify.export(merged, tmp_path / "nf4", "nf4")
    assert "3 cases bit-identical" in made.findings[1].evidence and " became " in made.findings[2].evidence
    card = (made.directory / "README.md").read_text()
    assert f"\n{count:,} parameters.\n" in card and "bitsandbytes (nf4)" in card and "| low rank |" in card
    found = AutoModelForCausalLM.from_pretrained(made.directory).eval()
    assert torch.equal(logits(found), logits(solidify.load(merged, quantization="nf4")))
    again = solidify.attach(solidify.load(made.directory), lora={"r": 2, "target_modules": "**.v_proj"})
    saved = solidify.save_adapter(again.eval(), tmp_path / "second")
    with pytest.raises(ModelError, match=r"stored quantised \(bitsandbytes\)"):
        solidify.merge(saved, tmp_path / "twice")


@pytest.mark.parametrize("word", ["bfloat16", "float16"])
def test_another_dtype_is_every_number_rounded_once(gated: Path, tmp_path: Path, word: str) -> None:
    made = solidify.export(gated, tmp_path / word, word)
    assert [finding.verdict for finding in made.findings[:3]] == ["proved", "proved", "measured"]
    dtype = getattr(torch, word)
    full, half = solidify.load(gated).state_dict(), solidify.load(made.directory, trust_remote_code=True).state_dict()
    assert full.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(dtype)) for name, tensor in full.items())
    assert solidify.check(made.directory).passed
    with pytest.raises(ArtifactError, match="the model is in float32 already"):
        solidify.export(gated, tmp_path / "same", "float32")


@pytest.mark.parametrize("key", ["absmax", "q_proj.weight", "output_gate.weight"])
def test_packed_weights_that_are_not_the_artifacts_do_not_appear(
    gated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """One number of the packed weights, of the scales beside them, or of what is not packed."""
    honest = comparison.align

    def wrong(path: Path) -> dict[str, str]:
        held = load_file(path)
        name = next(name for name in held if name.endswith(key))
        flat = held[name].flatten()
        flat[0] = flat[0] + 1
        save_file(held, path, metadata={"format": "pt"})
        return honest(path)

    monkeypatch.setattr(comparison, "align", wrong)
    with pytest.raises(ArtifactError, match=r"the nf4 form is not what the artifact is:\s+(- )?weights are"):
        solidify.export(gated, tmp_path / "nf4", "nf4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["bfloat16", "stock"])
def test_outputs_of_a_large_artifact_are_not_called_proved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """Nor is it run to find inputs, which nothing would read."""
    model = pico.make("BertForSequenceClassification", **pico.SIZES, intermediate_size=48)
    edits = solidify.remove(model, "bert.encoder.layer.1")
    artifact = pico.artifact(model, edits, tmp_path / "artifact")
    monkeypatch.setattr(anatomy, "LARGE", 1)
    monkeypatch.setattr(type(model), "forward", lambda *_, **__: pytest.fail("it was run"))
    made = solidify.export(artifact, tmp_path / word, word)
    verdicts = [finding.verdict for finding in made.findings[: 2 if word == "stock" else 3]]
    assert verdicts == ["proved", "not looked at", "not looked at"][: len(verdicts)]
    assert "cases" not in made.findings[0].evidence
    assert "a model of this size is not run as a whole" in made.findings[1].evidence


def test_a_form_that_is_not_known_is_refused(tmp_path: Path) -> None:
    words = ["stock", "onnx", "float32", "bfloat16", "float16", "nf4", "int8"]
    assert list(forms.FORMS) == words
    with pytest.raises(ArtifactError, match=f"there are {', '.join(words)}"):
        solidify.export(tmp_path, tmp_path / "out", "int4")


@pytest.mark.parametrize(("word", "name"), [("float16", "model.embed_tokens"), ("int8", "model.layers.1.mlp.up_proj")])
def test_numbers_that_are_too_large_for_it_are_refused(tmp_path: Path, word: str, name: str) -> None:
    """Also where no input of the comparison reaches them: a row of one token."""
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.*.self_attn", GatedAttention)
    with torch.no_grad():
        model.get_submodule(name).weight[-1] = 1e5
    artifact = pico.artifact(model, edits, tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=f"cannot be written as {word}.*32 numbers of {name}.weight would become"):
        solidify.export(artifact, tmp_path / word, word)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert solidify.export(artifact, tmp_path / "half", "bfloat16").findings[0].passed


def test_a_wrapped_module_is_given_the_dtype_that_it_takes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).eval()
    example = torch.randn(4, 16)
    artifact = pico.artifact(solidify.wrap(module, {"inputs": example}), [], tmp_path / "artifact")
    made = solidify.export(artifact, tmp_path / "half", "bfloat16")
    assert [finding.verdict for finding in made.findings[:3]] == ["proved", "proved", "measured"]
    again = solidify.load(made.directory, trust_remote_code=True)
    assert torch.equal(again.module(example.bfloat16()), module.to(torch.bfloat16)(example.bfloat16()))


def reading() -> torch.nn.Module:
    """Layers of torch whose weights are read past them, and one of a user that does so in a list."""
    torch.manual_seed(1)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return torch.nn.Sequential(torch.nn.Linear(16, 32), encoder, pico.wrappers.Functional(32, 4)).eval()


@pytest.mark.parametrize("word", ["nf4", "int8"])
def test_layers_whose_weights_are_read_past_them_are_not_packed(tmp_path: Path, word: str) -> None:
    """The fast path of torch's encoder, its attention, and a functional call take a matrix, not packed numbers."""
    model = solidify.wrap(reading(), {"inputs": torch.randn(2, 5, 16)})
    artifact = pico.artifact(model, [], tmp_path / "artifact")
    made = solidify.export(artifact, tmp_path / word, word)
    assert [finding.verdict for finding in made.findings[:4]] == ["proved", "proved", "measured", "measured"]
    again = solidify.load(made.directory, trust_remote_code=True)
    packed = [name for name, parameter in again.named_parameters() if not parameter.is_floating_point()]
    assert packed == ["module.0.weight"]
    assert "read by another module" in made.findings[3].evidence
    card = (made.directory / "README.md").read_text()
    assert "| `module.*.layers.*.linear1.weight` (read by another module) | 16.4 kB |" in card
    loaded = solidify.load(artifact, quantization=word)
    assert torch.equal(logits_of(loaded), logits_of(again))


def logits_of(model: Any) -> torch.Tensor:
    keep_as_quantized(model)
    return anatomy.run(model, {"inputs": torch.ones(2, 5, 16)})


def test_the_card_says_that_experts_stay_as_they_are(tmp_path: Path) -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.self_attn", GatedAttention)
    made = solidify.export(pico.artifact(model, edits, tmp_path / "artifact"), tmp_path / "nf4", "nf4")
    experts = sum(p.nbytes for name, p in model.named_parameters() if "experts.gate_up" in name)
    said = "| `model.layers.*.mlp.experts.gate_up_proj` (a stack of matrices, as of experts, is no linear layer) | "
    card = (made.directory / "README.md").read_text()
    assert f"{said}{console.size(experts)} |" in card
    assert "packed by bitsandbytes (nf4), " in card and "experts.gate_up_proj" in made.findings[3].evidence
