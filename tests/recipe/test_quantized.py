"""A recipe that trains on a quantised base, in one line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import solidify
from solidify.command import views
from solidify.directory import manifest
from solidify.errors import RecipeError

MATRICES = ["model.layers.*.self_attn.*_proj"]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16 with a tokenizer, data and modules."""
    root = tmp_path_factory.mktemp("recipes")
    pico.llama(eos_token_id=2, dtype=torch.bfloat16).save_pretrained(root / "base")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", unk_token="w3")
    wrapped.save_pretrained(root / "base")
    lines = [" ".join(f"w{n + more}" for more in range(6)) for n in range(5, 21)]
    (root / "train.txt").write_text("\n".join(lines))
    shutil.copy(pico.HERE / "user_modules" / "wrappers.py", root)
    return root


def written(beside: Path, quantization: Any, **more: Any) -> Path:
    document = {
        "base": {"model": "base", "quantization": quantization},
        "surgery": [{"replace": "model.layers.*.mlp", "expect": "LlamaMLP", "with": "wrappers.py:Scaled"}],
        "adapter": {"train": ["model.layers.*.mlp.scale"], "lora": {"r": 2, "target_modules": MATRICES}},
        "data": {"train": "train.txt", "max_length": 16},
        # `completion_only_loss` asks for TRL's trainer, which rounds what is trained on a quantised model.
        "training": {
            "max_steps": 2,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "bf16": True,
            "completion_only_loss": False,
        },
        **more,
    }
    path = beside / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("quantization", "more", "words"),
    [
        ("nf5", {}, "write nf4 or int8"),
        ({"load_in_4bit": True, "double_quant": True}, {}, "is not a field of BitsAndBytesConfig"),
        ("nf4", {"adapter": None, "training": None}, "nothing is trained"),
        ("int8", {"adapter": {"lora": {"target_modules": MATRICES, "use_dora": True}}}, "use_dora does not go with"),
        ("nf4", {"adapter": {"train": ["model"]}}, "no weight is quantised"),
        ("nf4", {"teacher": {"model": "base", "quantization": "nf4"}}, "teacher.quantization"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(
    beside: Path, quantization: Any, more: dict[str, Any], words: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'solidify[quantized]'")
    with pytest.raises(RecipeError, match=words):
        solidify.plan(written(beside, quantization, **more))


def test_the_plan_says_what_it_takes_and_what_is_left_out(beside: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'solidify[quantized]'")
    more = {"adapter": {"train": ["model.layers.0.self_attn.o_proj"]}}
    planned = solidify.plan(written(beside, "nf4", **more)).document()
    found = planned["quantization"]
    assert found["memory"] < found["memory_unquantized"] == planned["after"]["memory"]
    assert found["kept_out"] == {
        "model.layers.0.self_attn.o_proj.weight": "trained, or kept as asked",
        "lm_head.weight": "left out by transformers",
    }
    shown = Console(record=True, width=200, file=io.StringIO())
    for part in views.plan(planned):
        shown.print(part)
    text = shown.export_text()
    assert "Trained as nf4" in text
    assert "not quantised, left out by transformers: lm_head.weight" in text


@pytest.mark.slow
def test_one_line_makes_it_a_training_on_four_bits(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'solidify[quantized]'")
    pico.unwitnessed(monkeypatch)
    report = solidify.run(written(beside, "nf4"), tmp_path / "out")
    verdicts = {finding.name: finding.verdict for finding in report.findings}
    for name in (
        "adapter off is the base",
        "adapter reload exact",
        "frozen tensors unchanged",
        "gradients reach what is trained",
        "gradient does not depend on accumulation",
        "merged equals attached",
    ):
        assert verdicts[name] == "proved", name
    assert verdicts["merged against trained (quantised base)"] == "measured"
    assert "quantization" not in manifest.read(tmp_path / "out" / "artifact").recipe["base"]  # type: ignore[index]
    config = (tmp_path / "out" / "merged" / "config.json").read_text()
    assert "quantization" not in config
    adapter = manifest.read(tmp_path / "out" / "adapter")
    assert '"load_in_4bit": true' in adapter.base["quantization"]
