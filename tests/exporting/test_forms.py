"""An artifact in other forms: what a family can express, what it cannot, and that the form is what the artifact is."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import solidify
from solidify.artifact import stock
from solidify.artifact.loading import load_base
from solidify.errors import ArtifactError
from solidify.exporting import compared_alone, forms, graph
from solidify.model import anatomy
from solidify.system import files
from solidify.weights import checkpoint


def words() -> PreTrainedTokenizerFast:
    ids = {"<eos>": 0, "<pad>": 1, **{f"w{number}": number for number in range(2, 128)}}
    made = Tokenizer(models.WordLevel(ids, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def logits(model: Any) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens()})


def test_layers_experts_and_a_merged_adapter_become_the_plain_model(tmp_path: Path) -> None:
    model = pico.olmoe(layers=3)
    edits = solidify.remove(model, "model.layers.1")
    edits += solidify.rearrange_experts(model, "**.mlp", [5, 2, 0, 1, 1])
    base = pico.artifact(model, edits, tmp_path / "base")
    peft_model = solidify.attach(solidify.load(base), lora={"r": 2, "target_modules": "**.q_proj"})
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    solidify.save_adapter(peft_model, tmp_path / "adapter")
    merged = solidify.merge(tmp_path / "adapter", tmp_path / "merged").directory
    made = solidify.export(merged, tmp_path / "plain")
    assert all(finding.passed for finding in made.findings) and len(made.findings) >= 2
    assert repr(made) == f"Exported({made.directory}: {len(made.findings)} proved)"
    config = files.document(made.directory / "config.json")
    assert (config["architectures"], config["model_type"], config["num_experts"]) == (["OlmoeForCausalLM"], "olmoe", 5)
    assert not {"surgery", "auto_map"} & set(config) and not list(made.directory.glob("*.py"))
    read = [made.directory / name for name in ("config.json", "generation_config.json", "README.md")]
    assert not any(str(tmp_path) in path.read_text() for path in read)
    assert "pipeline_tag: text-generation\ntags: [solidify]\n" in read[-1].read_text()
    plain = AutoModelForCausalLM.from_pretrained(made.directory).eval()
    assert torch.equal(logits(plain), logits(solidify.load(merged)))
    assert "model.layers.0.mlp.experts.4.up_proj.weight" in checkpoint.read(made.directory).entries  # the hub's layout
    assert solidify.check(made.directory).passed


@pytest.mark.slow
def test_added_tokens_and_their_tokenizer_become_the_plain_model(tmp_path: Path) -> None:
    model, tokenizer = pico.llama(tie_word_embeddings=True, eos_token_id=0, bos_token_id=None), words()
    edits = solidify.add_tokens(model, tokenizer, ["<a>", "<b>"], pad_to_multiple_of=8)
    made = solidify.export(pico.artifact(model, edits, tmp_path / "base", tokenizer=tokenizer), tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(made.directory)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.vocab_size == 136
    assert torch.equal(logits(plain.eval()), logits(model))
    assert AutoTokenizer.from_pretrained(made.directory)("w5 <b>").input_ids == [5, 129]


def scaled(model: PreTrainedModel) -> Any:
    return solidify.replace(model, "**.mlp", pico.wrappers.Scaled)


def masked(model: PreTrainedModel) -> Any:
    return solidify.mask(model, "window", window=4)


def uneven(model: PreTrainedModel) -> Any:
    return solidify.rearrange_experts(model, "model.layers.1.mlp", [0, 1, 2])


INEXPRESSIBLE: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[PreTrainedModel], Any], str]] = {
    "new modules": (
        pico.llama,
        scaled,
        r"LlamaForCausalLM cannot express: model\.layers\.\*\.mlp \(2 modules\), a Scaled",
    ),
    "masks": (pico.llama, masked, r"model\.layers\.0\.self_attn, which has a mask of its own"),
    "unequal blocks": (
        pico.olmoe,
        uneven,
        r"model\.layers\.1\.mlp\.gate\.weight of shape \[3, 32\], where it has \[8, 32\]",
    ),
}


@pytest.mark.parametrize("kind", INEXPRESSIBLE)
def test_what_the_family_cannot_express_is_named_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    make, change, sentence = INEXPRESSIBLE[kind]
    model = make()
    base = pico.artifact(model, change(model), tmp_path / "base")
    with pytest.raises(ArtifactError, match=sentence):
        solidify.export(base, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_comparison_sees_another_tensor_and_another_output(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"short/input_ids": pico.tokens()}, tmp_path / "inputs.safetensors")
    one, same, other = pico.llama(), pico.llama(), pico.llama(seed=1)
    count, faults = compared_alone.compare_state(one, same)
    assert count == len(dict(one.named_parameters())) + len(dict(one.named_buffers())) and not faults
    assert compared_alone.compare_outputs(one, same, str(tmp_path / "inputs.safetensors")) == {"short": 0.0}
    assert "lm_head.weight differs" in compared_alone.compare_state(one, other)[1]
    assert compared_alone.compare_outputs(one, other, str(tmp_path / "inputs.safetensors"))["short"] > 0
    del other.lm_head
    assert "lm_head.weight is in one of them only" in compared_alone.compare_state(one, other)[1]


def test_a_form_that_is_not_the_artifact_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama(num_hidden_layers=3)
    base = pico.artifact(model, solidify.remove(model, "model.layers.1"), tmp_path / "base")

    def spoilt(*_: Any) -> Any:
        return {}, [solidify.Finding("the same", False, "lm_head.weight differs")]

    monkeypatch.setattr(forms, "FORMS", {"stock": spoilt})
    with pytest.raises(ArtifactError, match="the stock form is not what the artifact is: the same: lm_head"):
        solidify.export(base, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_unknown_forms_and_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pico.llama()
    base = pico.artifact(model, scaled(model), tmp_path / "base")
    with pytest.raises(ArtifactError, match=r"'gguf': no kept converter to GGUF can be installed.*convert_hf_to_gguf"):
        solidify.export(base, tmp_path / "out", "gguf")
    with pytest.raises(ArtifactError, match="'pickle': there are stock, onnx"):
        solidify.export(base, tmp_path / "out", "pickle")
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match=r"needs onnx, onnxscript, onnxruntime, which are not.*solidify\[onnx\]"):
        solidify.export(base, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_a_plain_model_needs_no_stock_form(tmp_path: Path) -> None:
    pico.llama(eos_token_id=0).save_pretrained(tmp_path / "base")
    plain = stock.build(load_base(str(tmp_path / "base")), tmp_path / "plain")
    with pytest.raises(ArtifactError, match="is a plain model of its family already: use it as it is"):
        solidify.export(plain.directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_outputs_of_a_graph_are_compared() -> None:
    expected = {"short": torch.ones(2, 3, 4)}
    assert graph.compare(expected, {"short": torch.ones(2, 3, 4)}, torch.float32).passed
    assert graph.compare(expected, {"short": torch.ones(2, 3, 4) * 1.01}, torch.float32).passed is False
    assert graph.compare(expected, {"short": torch.full((2, 3, 4), torch.nan)}, torch.float32).passed is False
    assert graph.compare(expected, {"short": torch.ones(2, 3, 5)}, torch.float32).passed is False


@pytest.mark.slow
@pytest.mark.skipif(any(find_spec(name) is None for name in graph.NEEDED), reason="onnx is not installed")
def test_a_graph_of_new_modules_computes_the_same_in_onnx_runtime(tmp_path: Path) -> None:
    model = pico.llama(eos_token_id=0)
    base = pico.artifact(model, scaled(model), tmp_path / "base", tokenizer=words())
    made = solidify.export(base, tmp_path / "graph", "onnx")
    assert made.findings[0].passed and "3 cases" in made.findings[0].evidence
    assert {"model.onnx", "model.onnx.data", "export.json", "tokenizer.json", "solidify.json"} <= {
        path.name for path in made.directory.iterdir()
    }
