"""The classes of an artifact that lack its head: what they say about tensors that they pass over, and when."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import logged
import pico
import pytest
import transformers
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

import solidify

BERT = {**pico.SIZES, "intermediate_size": 48}
BASES = {
    "a head that is not tied": ("LlamaForCausalLM", {**pico.SIZES, "intermediate_size": 48}),
    "a head with a bias, and a part without a pooler": ("BertForMaskedLM", BERT),
    "a classifier on a decoder": ("LlamaForSequenceClassification", {**pico.SIZES, "intermediate_size": 48}),
    "a classifier on an encoder": ("BertForSequenceClassification", BERT),
    "a part by another name": ("GPT2LMHeadModel", {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}),
}


@pytest.fixture(scope="module", params=BASES)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, settings = BASES[request.param]
    model = pico.make(name, **settings)
    norm = next(name for name, module in model.base_model.named_modules() if "norm" in type(module).__name__.lower())
    edits = solidify.replace(model, f"{model.base_model_prefix}.{norm}", pico.wrappers.Scaled)
    directory = tmp_path_factory.mktemp("parts") / "artifact"
    pico.artifact(model, edits, directory)
    return directory


def parts(directory: Path) -> dict[str, Any]:
    """Returns the Auto classes that lead to a class without the head of the artifact."""
    config = json.loads((directory / "config.json").read_text())
    (head,) = config["architectures"]
    return {
        auto: getattr(transformers, auto)
        for auto, place in config["auto_map"].items()
        if auto != "AutoConfig" and place.rpartition(".")[2] != head
    }


def keys(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", "pt") as tensors:
        return set(tensors.keys())


def hidden(model: PreTrainedModel, directory: Path) -> set[str]:
    """Returns the tensors of a directory that a model's hints call of no use."""
    hints = model._keys_to_ignore_on_load_unexpected or []
    return {key for key in keys(directory) if any(re.search(hint, key) for hint in hints)}


def test_a_part_loads_from_the_directory_with_nothing_to_report(artifact: Path) -> None:
    logging.set_verbosity_warning()
    logging.enable_propagation()
    try:
        for auto, kind in parts(artifact).items():
            with logged.records() as records:
                model, info = kind.from_pretrained(artifact, trust_remote_code=True, output_loading_info=True)
            assert not info["unexpected_keys"], auto
            assert not info["mismatched_keys"]
            if auto == "AutoModel":
                assert not any(info.values())
                assert not records
            assert not set(info["missing_keys"]) & keys(artifact)
            assert type(model).from_pretrained(artifact).config.surgery == model.config.surgery
    finally:
        logging.disable_propagation()


def test_a_part_that_is_built_from_the_configuration_calls_no_tensor_useless(artifact: Path) -> None:
    """Servers build it so, and leave out what it calls useless: the head would stay as it was drawn (S31)."""
    config = AutoConfig.from_pretrained(artifact, trust_remote_code=True)
    assert parts(artifact)
    for auto, kind in parts(artifact).items():
        part = kind.from_config(config, trust_remote_code=True)
        lost = hidden(part, artifact)
        if auto != "AutoModel":  # with another head stands the family's own part, with the family's own hints
            lost = {key for key in lost if not key.startswith(f"{part.base_model_prefix}.")}
        assert lost == set(), auto
