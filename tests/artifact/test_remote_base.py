"""A base that is itself remote code: its source is carried along."""

from __future__ import annotations

from pathlib import Path

import pytest

import pico
import solidify
from pico import wrappers
from solidify import recipe as recipes
from solidify import references
from solidify.artifact import loading, manifest
from solidify.errors import ArtifactError, RecipeError

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from .scales_of_mine import FACTOR


class MineConfig(LlamaConfig):
    model_type = "mine"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * FACTOR
        return outputs
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as people publish them: weights, configuration and code, saved by transformers itself."""
    directory = tmp_path_factory.mktemp("remote")
    (directory / "code").mkdir()
    (directory / "code" / "modeling_mine.py").write_text(CODE)
    (directory / "code" / "scales_of_mine.py").write_text("FACTOR = 3.0\n")
    head = references.resolve("modeling_mine.py:MineForCausalLM", directory / "code")
    kind = references.resolve("modeling_mine.py:MineConfig", directory / "code")
    kind.register_for_auto_class("AutoConfig")
    head.register_for_auto_class("AutoModelForCausalLM")
    plain = pico.llama()
    values = {k: v for k, v in plain.config.to_dict().items() if k not in ("model_type", "architectures")}
    model = head(kind(**values)).eval()
    model.load_state_dict(plain.state_dict())
    model.save_pretrained(directory / "base")
    return directory / "base"


def test_its_code_runs_only_when_it_may(remote: Path) -> None:
    with pytest.raises(RecipeError, match=r"code|trust_remote_code"):
        loading.load_base(str(remote))


def test_its_code_travels_with_the_artifact(remote: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base: {{model: {remote}, trust_remote_code: true}}\n"
        "surgery:\n"
        f"  - {{replace: model.layers.*.mlp, expect: LlamaMLP, with: '{wrappers.__file__}:Scaled'}}\n"
    )
    assert solidify.run(recipes.load(recipe), tmp_path / "out").passed
    artifact = tmp_path / "out" / "artifact"
    assert {"modeling_mine.py", "scales_of_mine.py", "wrappers.py"} <= set(manifest.read(artifact).code)
    text = (artifact / "modeling_solid_mine.py").read_text()
    assert "from .modeling_mine import" in text
    assert "is_custom_code" not in text  # its own initialisation may write in place
    with pytest.raises(ArtifactError, match="solidify trust"):  # the permission was the run's
        solidify.load(artifact)
    model = solidify.load(artifact, trust_remote_code=True)
    base = loading.load_base(str(remote), trust_remote_code=True).model
    assert model(pico.tokens()).logits.equal(base(pico.tokens()).logits)
