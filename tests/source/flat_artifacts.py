"""Writes a pico Llama with a user's class in it as a remote-code directory, and loads such directories anew.

Run as a script with directories as arguments, it loads each and prints, as JSON, what it found. It cannot import
solidify.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

RESERVED = ("configuration_pico.py", "modeling_pico.py")

CONFIGURATION = """
from {module} import {name} as Config


class PicoConfig(Config):
    model_type = "{model_type}"
"""

MODELING = """
from {module} import {name} as Head
{imports}

from .configuration_pico import PicoConfig


class PicoForCausalLM(Head):
    config_class = PicoConfig

    def __init__(self, config):
        super().__init__(config)
        {build}
        self.post_init()
"""


def base() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save(directory: Path, closure: Any, classes: Sequence[type]) -> None:
    """Wraps the MLP in every class, one around the other, and writes model, code and logits."""
    model = base()
    layer = model.model.layers[0]
    imports, built = [], "self.model.layers[0].mlp"
    for n, cls in enumerate(classes):
        layer.mlp = cls(layer.mlp)
        imports.append(f"from {closure.modules[cls]} import {cls.__name__} as Class{n}")
        built = f"Class{n}({built})"
    build = f"self.model.layers[0].mlp = {built}"
    modeling = MODELING.format(module="transformers", name="LlamaForCausalLM", imports="\n".join(imports), build=build)
    _write(directory, closure, model, ("transformers", "LlamaConfig"), modeling)


def save_again(directory: Path, closure: Any, model: PreTrainedModel) -> None:
    """Writes a model whose own class and configuration class are remote code, each subclassed."""
    head, config = type(model), type(model.config)
    modeling = MODELING.format(module=closure.modules[head], name=head.__name__, imports="", build="pass")
    _write(directory, closure, model, (closure.modules[config], config.__name__), modeling)


def _write(
    directory: Path, closure: Any, model: PreTrainedModel, configuration: tuple[str, str], modeling: str
) -> None:
    directory.mkdir(parents=True)
    module, name = configuration
    model_type = f"pico_{directory.name}"
    files = {
        **closure.files,
        "configuration_pico.py": CONFIGURATION.format(module=module, name=name, model_type=model_type),
        "modeling_pico.py": modeling,
    }
    for file, text in files.items():
        (directory / file).write_bytes(text.encode())
    auto_map = {
        "AutoConfig": "configuration_pico.PicoConfig",
        "AutoModelForCausalLM": "modeling_pico.PicoForCausalLM",
    }
    config = {**model.config.to_dict(), "model_type": model_type, "auto_map": auto_map}
    config["architectures"] = ["PicoForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        logits = model(inputs()).logits
    save_file({"logits": logits}, directory / "expected.safetensors")


def inputs() -> torch.Tensor:
    return torch.arange(3, 27).reshape(2, 12)


def load(directory: Path) -> str:
    """Loads a directory; returns an empty string where it gives what was saved, else what is wrong."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
        with torch.no_grad():
            logits = model.eval()(inputs()).logits
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if any(info.values()):
        return f"loading info {info}"
    expected = load_file(directory / "expected.safetensors")["logits"]
    return "" if torch.equal(logits, expected) else f"logits differ by {(logits - expected).abs().max()}"


if __name__ == "__main__":
    sys.modules["solidify"] = None  # type: ignore[assignment]
    print(json.dumps({name: load(Path(name)) for name in sys.argv[1:]}))
