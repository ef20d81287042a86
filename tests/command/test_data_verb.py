"""`solidify data` shows rows as the model will read them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from PIL import Image
from rich.console import Console
from transformers import ViTImageProcessorPil
from words import CHATS, tokenizer

from solidify.__main__ import main
from solidify.command import rows
from solidify.recipe import showing

LLAMA = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "eos_token_id": 1}
TALK = [{"role": role, "content": text} for role, text in CHATS[1]]


def recipe(directory: Path, head: str, rows: list[Any], data: dict[str, Any] | None = None, **settings: Any) -> Path:
    values = {**pico.SIZES, "intermediate_size": 48, **settings}
    pico.make(head, **values).save_pretrained(directory / "base")
    tokenizer(wrapped="Bert" in head).save_pretrained(directory / "base")
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "base": {"model": str(directory / "base")},
        "surgery": [{"remove": "model.layers.1", "expect": "LlamaDecoderLayer"}],
        "data": {"train": "rows.jsonl", "max_length": 32, **(data or {})},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def run(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["solidify", *words])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def test_images_are_images_and_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {key: value for key, value in pico.SIZES.items() if key not in ("vocab_size", "pad_token_id")}
    pico.make("ViTForImageClassification", **sizes, image_size=16, patch_size=4).save_pretrained(tmp_path / "base")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    for n in range(8):
        Image.new("RGB", (16, 16), (20 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": f"{n}.png", "label": n % 2}) for n in range(8)))
    document = {
        "base": {"model": str(tmp_path / "base")},
        "adapter": {"lora": {"r": 2, "target_modules": ["vit.layers.*.attention.q_proj"]}},
        "data": {"train": "rows.jsonl"},
        "training": {"max_steps": 1, "learning_rate": 1e-3},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    assert run("data", str(path)) == 0
    shown = capsys.readouterr().out
    assert "train: 8 rows, 8 images, 8 count" in shown and "token" not in shown
    assert run("plan", str(path)) == 0
    shown = capsys.readouterr().out
    assert "Data: image_classification\n" in shown and "matrix FLOPs per patch" in shown
    assert run("inspect", str(tmp_path / "base")) == 0
    assert "matrix FLOPs per patch" in capsys.readouterr().out
    assert run("run", str(path), "--output", str(tmp_path / "out")) == 0
    told = capsys.readouterr()
    assert "images/s" in told.err and "tokens" not in told.out + told.err
    assert "per patch" in (tmp_path / "out" / "report.html").read_text()


def test_a_conversation_is_shown_with_what_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "LlamaForCausalLM", [{"messages": TALK}, {"messages": TALK[1:3]}], **LLAMA)
    assert run("data", str(path), "--rows", "2") == 0
    shown = capsys.readouterr().out
    assert "messages; the assistant's turns count, told by the chat template's own marks; at most 32 tokens" in shown
    assert "train: 2 rows, 2 examples of 23 tokens, 8 count; none was cut" in shown
    assert "text: 17 tokens, 6 count" in shown
    assert "<|user|>ab<|assistant|>⟦d<end>⟧" in shown
    assert run("data", str(path), "--json", "--rows", "1", "--set", "data.max_length=9") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counted"]["train"]["cut"] == 1
    assert document["rows"][0]["cut"] == 8
    tokens = document["rows"][0]["parts"]["text"]
    assert [token["text"] for token in tokens if token["counts"]] == ["d", "<end>"]


def test_what_counts_is_coloured_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path, "LlamaForCausalLM", [{"messages": TALK}], **LLAMA)
    console = Console(force_terminal=True, color_system="standard", width=120, file=io.StringIO())
    monkeypatch.setattr(rows.console, "results", console)
    for each in rows.tell(showing.show(str(path), 1)):
        console.print(each)
    written = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[1;32md\x1b[0m" in written
    assert "⟦" not in written


SHOWN: dict[str, tuple[str, dict[str, Any], Any, list[str]]] = {
    "text": ("LlamaForCausalLM", LLAMA, {"text": "a b c"}, ["text: 4 tokens, 3 count", "a⟦bc<end>⟧"]),
    "pairs": (
        "LlamaForCausalLM",
        LLAMA,
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        ["preference", "prompt: 1 tokens, 0 count", "chosen: 2 tokens, 2 count", "⟦c<end>⟧"],
    ),
    "classes": (
        "BertForSequenceClassification",
        {"id2label": {0: "no", 1: "yes"}},
        {"text": "a b", "label": "yes"},
        ["row 0, label: yes", "<cls>ab<sep>"],
    ),
    "tags": (
        "BertForTokenClassification",
        {"id2label": {0: "O", 1: "X"}},
        {"words": ["ab"], "tags": ["X"]},
        ["⟦a/X ⟧##b<sep>"],
    ),
    "hidden": ("BertForMaskedLM", {}, {"text": "a b c d e f g h"}, ["masked; at most 32 tokens", "⟦"]),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_every_format_is_shown(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head, settings, row, words = SHOWN[kind]
    path = recipe(tmp_path, head, [row] * 4, {"mask_probability": 0.5}, **settings)
    assert run("data", str(path), "--rows", "1") == 0
    shown = capsys.readouterr().out
    for each in words:
        assert each in shown


def test_rows_that_a_head_does_not_learn_from_end_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(tmp_path, "BertForSequenceClassification", [{"messages": TALK}], num_labels=2)
    assert run("data", str(path)) == 2
    assert "BertForSequenceClassification learns from classification (text, label)" in capsys.readouterr().err
    path.write_text("base: {model: none}\nsurgery: [{remove: x, expect: Y}]\n")
    assert run("data", str(path)) == 2
    assert "the recipe has no `data`" in capsys.readouterr().err
