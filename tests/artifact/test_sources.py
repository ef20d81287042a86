from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import transformers
from pico import wrappers

import solidify
from solidify.artifact import autos, sources
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.recipe import references
from solidify.surgery.edit_record import Edit

MODULE = """
import torch
from torch import nn

class Wrapped(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original

    def forward(self, hidden_states):
        return {factor} * self.original(hidden_states)
"""


def test_the_modelling_file_reads_like_a_hand_written_one() -> None:
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    code = sources.compile_sources(model, edits)
    text = code.files["modeling_solid_olmoe.py"]
    assert len(text.splitlines()) < 50
    assert all(len(line) < 125 for line in text.splitlines())
    assert "class SolidOlmoeForCausalLM(Solid, OlmoeForCausalLM):" in text
    imported = {n.module for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and not n.level}
    assert imported == {"transformers"}
    generated = {"modeling_solid_olmoe.py", "configuration_solid_olmoe.py", "operations.py"}
    assert set(code.files) == {*generated, "trashcan_moe.py"}
    assert set(code.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForDecision"}


def test_what_the_changes_do_not_need_is_not_in_the_file() -> None:
    def text(put: Callable[..., list[Edit]]) -> str:
        model = pico.olmoe()
        edits = put(model, "**.mlp", wrappers.PlainMLP)
        return sources.compile_sources(model, edits).files["modeling_solid_olmoe.py"]

    assert "shared_keys" not in text(solidify.replace)
    assert "shared_keys" in text(solidify.share)


@pytest.mark.parametrize(("version", "loads"), [("4.57.1", False), ("5.1.9", False), ("5.2.0", True), ("6.0.0", True)])
def test_the_artifact_says_which_transformers_it_needs(
    version: str, loads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration is read first, by whatever transformers there is. (5.2.0, 5.10.4 and 5.24.0 were tried.)"""
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    text = sources.compile_sources(model, edits).files["configuration_solid_olmoe.py"]
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # a lazy module stands in its own place
    if loads:
        exec(text, {})
        return
    words = rf"made with transformers 5\.\d+\.\d+ and needs 5\.2 or later; this is transformers {re.escape(version)}"
    with pytest.raises(ImportError, match=words):
        exec(text, {})


def test_the_model_type_depends_on_code_and_surgery() -> None:
    def model_type(**arguments: object) -> str:
        model = pico.olmoe()
        return sources.compile_sources(model, solidify.replace(model, "**.mlp", TrashCanMoE, **arguments)).model_type

    assert model_type() == model_type()
    assert model_type() != model_type(arguments={"weighting": "softmax_all"})


def test_places_that_are_treated_alike_are_one_entry() -> None:
    model = pico.olmoe(layers=4)
    edits = solidify.replace(model, ["model.layers.0.mlp", "model.layers.1.mlp"], TrashCanMoE)
    edits += solidify.replace(model, "model.layers.2.mlp", wrappers.Scaled)
    edits += solidify.replace(model, "model.layers.3.mlp", TrashCanMoE)
    entries = sources.compile_sources(model, edits).surgery
    assert [entry["modules"] for entry in entries] == [
        ["model.layers.0.mlp", "model.layers.1.mlp"],
        ["model.layers.2.mlp"],
        ["model.layers.3.mlp"],
    ]


def test_classes_of_one_name_get_names_of_their_own(tmp_path: Path) -> None:
    modules = []
    for factor, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(MODULE.format(factor=factor + 2))
        modules.append(references.resolve("mine.py:Wrapped", tmp_path / name))
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", modules[0])
    edits += solidify.replace(model, "model.layers.1.mlp", modules[1])
    code = sources.compile_sources(model, edits)
    assert [entry["class"] for entry in code.surgery] == ["Wrapped", "Wrapped_2"]
    artifact = solidify.build(model, edits, tmp_path / "out")
    assert all(finding.passed for finding in artifact.findings)


def test_a_module_called_like_the_base_does_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE.format(factor=3).replace("Wrapped", "OlmoeModel"))
    model = pico.olmoe()
    edits = solidify.replace(model, "**.mlp", references.resolve("mine.py:OlmoeModel", tmp_path))
    assert sources.compile_sources(model, edits).surgery[0]["class"] == "OlmoeModel_2"
    assert all(finding.passed for finding in solidify.build(model, edits, tmp_path / "out").findings)


def test_a_head_of_ones_own_travels_too(tmp_path: Path) -> None:
    (tmp_path / "head.py").write_text(
        "from transformers import OlmoeForCausalLM\n\n\nclass Mine(OlmoeForCausalLM):\n"
        "    def forward(self, *args, **kwargs):\n        outputs = super().forward(*args, **kwargs)\n"
        "        outputs.logits = outputs.logits * 2\n        return outputs\n"
    )
    plain = pico.olmoe()
    model = references.resolve("head.py:Mine", tmp_path)(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    artifact = solidify.build(model, solidify.replace(model, "**.mlp", TrashCanMoE), tmp_path / "out")
    assert all(finding.passed for finding in artifact.findings)
    assert "from .head import Mine" in (tmp_path / "out" / "modeling_solid_olmoe.py").read_text()


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        (
            "LlamaForCausalLM",
            {**pico.SIZES, "intermediate_size": 48},
            [
                "AutoConfig",
                "AutoModel",
                "AutoModelForCausalLM",
                "AutoModelForDecision",
                "AutoModelForSequenceClassification",
                "AutoModelForTokenClassification",
            ],
        ),
        (
            "LlamaModel",
            {**pico.SIZES, "intermediate_size": 48},
            ["AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"],
        ),
        ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4}, ["AutoModelForCausalLM"]),
        ("BertForMaskedLM", {**pico.SIZES, "intermediate_size": 48}, ["AutoModelForMaskedLM", "AutoModel"]),
    ],
)
def test_the_auto_classes_are_all_that_can_hold_the_change(
    name: str, settings: dict[str, object], expected: list[str]
) -> None:
    model = pico.make(name, **settings)
    target = next(n for n, m in model.named_modules() if type(m).__name__.endswith("MLP") or n.endswith("intermediate"))
    code = sources.compile_sources(model, solidify.replace(model, target, wrappers.Scaled))
    assert set(expected) <= set(code.auto_map)
    if name.startswith("Llama"):
        assert set(expected) == set(code.auto_map)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("BartForConditionalGeneration", {"d_model": 32, "vocab_size": 99}, "AutoModelForSeq2SeqLM"),
        ("T5ForConditionalGeneration", {"d_model": 32, "vocab_size": 99}, "AutoModelForSeq2SeqLM"),
        ("BertForMaskedLM", {**pico.SIZES, "intermediate_size": 48}, "AutoModelForMaskedLM"),
        ("BertForPreTraining", {**pico.SIZES, "intermediate_size": 48}, "AutoModelForPreTraining"),
        ("BertModel", {**pico.SIZES, "intermediate_size": 48}, "AutoModel"),
        ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4}, "AutoModelForCausalLM"),
        ("LlavaForConditionalGeneration", {}, "AutoModelForImageTextToText"),
        ("SpeechT5ForSpeechToText", {}, "AutoModelForSpeechSeq2Seq"),
    ],
)
def test_the_auto_class_of_a_plain_model_says_what_its_head_is_for(
    name: str, settings: dict[str, object], expected: str, tmp_path: Path
) -> None:
    """Many classes stand under several: under the name of the task first, and under that of pre-training last."""
    config = getattr(transformers, name).config_class(**settings)
    config.architectures = [name]
    config.save_pretrained(tmp_path)
    assert autos.auto_class(tmp_path) == expected
