"""A base that is itself remote code: its source is carried along."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pico
import pytest
from peft import LoraConfig, get_peft_model
from pico import wrappers

import solidify
from solidify.artifact import loading
from solidify.directory import manifest
from solidify.errors import ArtifactError, ModelError, SolidifyError
from solidify.recipe import models, references, stages
from solidify.recipe import schema as recipes

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
    with pytest.raises(ModelError, match=r"code|trust_remote_code"):
        loading.load_base(str(remote))


@pytest.mark.slow
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


def composite(kind: str) -> dict[str, object]:
    """An encoder-decoder whose decoder no Auto class of transformers builds: its configuration leads to code."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    part = {"model_type": "bert", "vocab_size": 128, **sizes}
    leading = {"AutoModelForCausalLM": "payload.Evil", "AutoModel": "payload.Evil", "AutoConfig": "payload.Evil"}
    decoder = {**part, "is_decoder": True, "add_cross_attention": True, "model_type": kind, "auto_map": leading}
    heads = {"architectures": ["EncoderDecoderModel"], "model_type": "encoder-decoder", "is_encoder_decoder": True}
    return {**heads, "encoder": part, "decoder": decoder}


EVIL: dict[str, dict[str, object]] = {
    "an Auto class": {
        "architectures": ["AutoModelForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "payload.Evil"},
    },
    "an Auto class, others named": {
        "architectures": ["AutoModel", "LlamaForCausalLM"],
        "auto_map": {"AutoModel": "payload.Evil", "AutoModelForCausalLM": "payload.Evil"},
    },
    "its own class": {"architectures": ["Evil"], "auto_map": {"AutoModelForCausalLM": "payload.Evil"}},
    "a function": {"architectures": ["pipeline"], "auto_map": {"AutoModelForCausalLM": "payload.Evil"}},
    "no Auto class": {"architectures": ["Evil"], "auto_map": {"pipeline": "payload.Evil"}},
    "a configuration": {"auto_map": {"AutoConfig": "payload.Evil"}, "model_type": "evil"},
    "a base of classes": {"architectures": ["PreTrainedModel"]},
    "a base of a family": {"architectures": ["LlamaPreTrainedModel"]},
    **{f"a part, {each}": composite(each) for each in ("vit", "clip_vision_model", "encodec", "bert")},
    "kernels of the experts": {"_experts_implementation": "somebody/experts"},
    "kernels": {"_attn_implementation": "somebody/kernels"},
}


@pytest.mark.parametrize("kind", EVIL)
def test_no_field_of_a_base_runs_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Without permission, in every verb that reads a base; a plain adapter may name the base, too."""
    evil = tmp_path / "evil"
    pico.llama().save_pretrained(evil)
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**config, **EVIL[kind]}))
    asked_of: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked_of.append(prompt) or "y")
    canary = tmp_path / "canary"
    code = "from transformers import LlamaForCausalLM\nclass Evil(LlamaForCausalLM): pass\n"
    (evil / "payload.py").write_text(f"open({str(canary)!r}, 'w')\n{code}")
    adapter = tmp_path / "adapter"
    get_peft_model(pico.llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(evil)}))
    asked = tmp_path / "recipe.yaml"
    step = f"{{replace: '**.o_proj', expect: Linear, with: '{wrappers.__file__}:Scaled'}}"
    asked.write_text(f"base: {{model: {evil}}}\nsurgery:\n  - {step}\n")
    readers: list[Callable[[], object]] = [
        lambda: models.skeleton(str(evil)),
        lambda: loading.load_base(str(evil)),
        lambda: solidify.plan(recipes.load(asked)),
        lambda: stages.build(recipes.load(asked), tmp_path / "out"),
        lambda: solidify.merge(adapter, tmp_path / "merged", base=evil),
        lambda: solidify.merge(adapter, tmp_path / "merged"),
    ]
    for read in readers:
        with suppress(SolidifyError):
            read()
        assert not canary.exists() and not asked_of
    with pytest.raises(
        SolidifyError, match=r"trust_remote_code|not a model class|its own code|derived from|incomplete"
    ):
        loading.load_base(str(evil))


def _audio(directory: Path, payload: Path) -> None:
    there = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(payload)}
    (directory / "processor_config.json").write_text(json.dumps({"audio_tokenizer": there}))


def _audio_beside(directory: Path, payload: Path) -> None:
    there = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": str(payload)}
    (directory / "audio_tokenizer_config.json").write_text(json.dumps(there))
    (directory / "tokenizer_config.json").write_text(json.dumps({"processor_class": "WhisperProcessor"}))


def _tokenizer_of_a_processor(directory: Path, payload: Path) -> None:
    """Of a family that has a processor and no tokenizer: transformers forgets there what is permitted."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "vocab_size": 32}
    convolutions |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    pico.make("SEWModel", **sizes, **convolutions).save_pretrained(directory)
    leading = {"AutoTokenizer": ["payload.Evil", "payload.Evil"]}
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": leading}))
    told = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(told))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # transformers leaves a file open
@pytest.mark.parametrize("spoil", [_audio, _audio_beside, _tokenizer_of_a_processor])
def test_no_field_of_a_processor_runs_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path, Path], None]
) -> None:
    evil, canary = tmp_path / "evil", tmp_path / "canary"
    pico.llama().save_pretrained(evil)
    spoil(evil, evil)
    config = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "payload.Evil"}}))
    code = "from transformers import LlamaForCausalLM\nclass Evil(LlamaForCausalLM): pass\n"
    (evil / "payload.py").write_text(f"open({str(canary)!r}, 'w')\n{code}")
    asked_of: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked_of.append(prompt) or "y")
    for read in (
        lambda: models.skeleton(str(evil)),
        lambda: loading.load_base(str(evil)),
        lambda: loading.tokenizer_in(evil),
    ):
        with suppress(SolidifyError):
            read()
        assert not canary.exists() and not asked_of
