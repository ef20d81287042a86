"""Building without an edit names what was done otherwise, and the way that leads on."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest

import solidify
from solidify.errors import ArtifactError


def test_a_model_that_was_patched_by_hand(tmp_path: Path) -> None:
    model = pico.llama()
    model.model.layers[1].mlp = pico.wrappers.Scaled(model.model.layers[1].mlp)
    with pytest.raises(ArtifactError) as raised:
        solidify.build(model, [], tmp_path / "out")
    words = str(raised.value)
    assert "Scaled at model.layers.1.mlp that LlamaForCausalLM does not put there" in words
    assert "load the base again, make the change by solidify.replace" in words
    assert "inner" not in words  # what stands inside of it is part of it


def test_a_model_that_was_only_resized(tmp_path: Path) -> None:
    model = pico.llama()
    model.resize_token_embeddings(160)
    with pytest.raises(
        ArtifactError, match=r"only trained or resized needs no artifact.*save_pretrained.*is a base for"
    ):
        solidify.build(model, [], tmp_path / "out")


def test_an_artifact_that_is_built_once_more(wrapped_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="all modules are those of a plain SolidOlmoeForCausalLM"):
        solidify.build(solidify.load(wrapped_artifact), [], tmp_path / "out")
