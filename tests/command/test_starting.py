"""`init` and `schema`: what they write is what the other verbs accept."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, ViTImageProcessorPil

import solidify
from solidify.command import starting
from solidify.errors import RecipeError, SolidifyError
from solidify.recipe import dry_run, json_schema
from solidify.recipe.drafting import Asked, Drafting
from solidify.recipe.schema import Recipe

FAMILIES = {
    "gpt2": "AutoModelForCausalLM",
    "mamba": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "gemma3": "AutoModelForImageTextToText",
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
    "distilbert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "resnet": "AutoModelForImageClassification",
    "wav2vec2": "AutoModelForCTC",
}


def save_tokenizer(directory: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", "a", "b"])}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    pico.llama(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def made(base: Path, path: Path, **more: Any) -> Recipe:
    written = Drafting(Asked(str(base), path, **more)).write()
    starting._write_files(written)
    return Recipe.load(path)


def test_a_draft_is_planned_as_it_is(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "work" / "first.yaml"
    recipe = made(base, path)
    text = path.read_text()
    assert (path.parent / "gate.py").is_file()
    plan = dry_run.plan(recipe)
    assert [edit.name for edit in plan.edits] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert set(plan.trainable) == {
        *(f"lora model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"),
        *(f"full model.layers.{n}.mlp.scale" for n in (0, 1)),
    }
    assert "#   model.layers.*.self_attn.q_proj" in text and "LlamaAttention x 2" in text
    assert recipe.output == "build/first"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_draft_for_any_family_is_planned_as_it_is(family: str, tmp_path: Path) -> None:
    families.tiny(family, FAMILIES[family]).save_pretrained(tmp_path / "base")
    if FAMILIES[family] == "AutoModelForCausalLM":
        save_tokenizer(tmp_path / "base")
    recipe = made(tmp_path / "base", tmp_path / "recipe.yaml")
    plan = dry_run.plan(recipe)
    assert plan.edits and all(edit.new_class == "Gate" for edit in plan.edits)
    if family not in ("gemma3", "bert"):  # which get an empty tokenizer of their family from transformers
        assert (recipe.adapter is not None) == (FAMILIES[family] == "AutoModelForCausalLM")
    text = (tmp_path / "recipe.yaml").read_text()
    assert ("# Nothing is trained yet" in text) == (recipe.adapter is None)


def test_what_is_asked_for_stands_in_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"text": "a b a"}) + "\n")
    (tmp_path / "work").mkdir()
    recipe = made(
        Path("base"), Path("work/r.yaml"), replace="model.layers.*.self_attn.o_proj", data="rows.jsonl",
        module="solidify.modules.bit_linear:BitLinear", dtype="bfloat16",
    )  # fmt: skip
    assert recipe.base.model == "../base" and recipe.base.dtype == "bfloat16"
    assert recipe.data is not None and recipe.data.train == "../rows.jsonl" and recipe.data.eval is None
    assert not Path("work/gate.py").exists()


def save_classified(directory: Path, kind: str) -> tuple[Path, Path]:
    """Writes a base that classifies, what prepares its inputs, and rows for it."""
    head = {"bert": "SequenceClassification", "distilbert": "SequenceClassification"}.get(kind, "ImageClassification")
    base = directory / "base"
    families.tiny(kind, f"AutoModelFor{head}").save_pretrained(base)
    rows = [{"text": "a b a", "label": n % 2} for n in range(8)]
    if "Image" in head:
        size = AutoConfig.from_pretrained(base).to_dict().get("image_size", 32)
        ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(base)
        Image.new("RGB", (16, 16)).save(directory / "0.png")
        rows = [{"image": "0.png", "label": n % 2} for n in range(8)]
    else:
        save_tokenizer(base)
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return base, directory / "rows.jsonl"


def test_a_causal_model_is_trained_as_it_is(base: Path, tmp_path: Path) -> None:
    recipe = made(base, tmp_path / "work" / "plain.yaml", replace="none")
    assert not recipe.surgery and os.listdir(tmp_path / "work") == ["plain.yaml"]
    assert recipe.adapter is not None and recipe.adapter.train == []
    assert recipe.data is not None and recipe.data.eval == "builtin:pydoc-heldout"
    assert set(dry_run.plan(recipe).trainable) == {
        f"lora model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"
    }


@pytest.mark.parametrize(
    ("kind", "lora", "full"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query", {"classifier.weight", "classifier.bias"}),
        ("distilbert", "distilbert.transformer.layer.0.attention.q_lin", {"pre_classifier.weight", "classifier.bias"}),
        ("vit", "vit.layers.0.attention.q_proj", {"classifier.weight", "classifier.bias"}),
        ("resnet", "", {"classifier.1.weight"}),
    ],
)
def test_a_head_is_trained_on_labelled_rows(kind: str, lora: str, full: set[str], tmp_path: Path) -> None:
    base, rows = save_classified(tmp_path, kind)
    path = tmp_path / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"does not learn from the text that is built in, but from .* \(--data\)"):
        made(base, path, replace="none")
    recipe = made(base, path, replace="none", data=str(rows))
    plan = dry_run.plan(recipe)
    assert not recipe.surgery and "max_length" not in path.read_text()
    assert {f"full {name}" for name in full} <= set(plan.trainable)
    assert (f"lora {lora}" in plan.trainable) if lora else not any(name.startswith("lora") for name in plan.trainable)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_what_is_drafted_for_labelled_rows_runs(kind: str, tmp_path: Path) -> None:
    base, rows = save_classified(tmp_path, kind)
    recipe = made(base, tmp_path / "recipe.yaml", replace="none", data=str(rows))
    report = solidify.run(tmp_path / "recipe.yaml", tmp_path / "out")
    assert report.passed and recipe.adapter is not None and recipe.adapter.train == ["classifier"]


def test_labelled_rows_are_trained_on_with_surgery_too(tmp_path: Path) -> None:
    base, rows = save_classified(tmp_path, "bert")
    recipe = made(base, tmp_path / "recipe.yaml", data=str(rows))
    assert recipe.surgery and recipe.adapter is not None and recipe.adapter.train == ["**.scale", "classifier"]


def test_classes_are_called_as_the_rows_call_them_where_the_base_does_not(tmp_path: Path) -> None:
    base, _ = save_classified(tmp_path, "bert")
    config = json.loads((base / "config.json").read_text())
    classes = len(config.get("id2label", {0: "", 1: ""}))
    words = [f"word {number}" for number in range(classes)]
    config["id2label"] = {str(number): f"LABEL_{number}" for number in range(classes)}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (base / "config.json").write_text(json.dumps(config))
    rows = tmp_path / "named.csv"
    rows.write_text("text,label\n" + "".join(f"w{n} w{n + 2},{word}\n" for n, word in enumerate(reversed(words))))
    recipe = made(base, tmp_path / "recipe.yaml", replace="none", data=str(rows))
    assert recipe.data is not None and recipe.data.labels == words


def test_nothing_is_put_in_the_place_of_nothing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--with says by what modules are replaced, and --replace none that none is"):
        made(base, tmp_path / "recipe.yaml", replace="none", module="gate.py:Gate")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"replace": "model.layer.*.mlp"}, "names no module; close to it"),
        ({"replace": "model.layers.*.*"}, "modules of several classes"),
        ({"module": "none.py:X"}, "none.py does not exist"),
        ({"data": "none.jsonl"}, "none.jsonl does not exist"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    base: Path, tmp_path: Path, more: dict[str, str], words: str
) -> None:
    with pytest.raises(SolidifyError, match=words):
        made(base, tmp_path / "work" / "recipe.yaml", **more)
    assert not (tmp_path / "work").exists()


def test_data_that_the_model_cannot_learn_from_yet_leaves_a_recipe(base: Path, tmp_path: Path) -> None:
    """The tokenizer has no chat template: the recipe is there to say one in."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    recipe = made(base, tmp_path / "recipe.yaml", data=str(tmp_path / "talks.jsonl"))
    text = (tmp_path / "recipe.yaml").read_text()
    assert recipe.adapter is None and "no chat template; give one with" in text and "talks.jsonl" in text


def test_what_is_there_is_not_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "gate.py").write_text("mine")
    with pytest.raises(RecipeError, match=r"gate\.py exists"):
        made(base, tmp_path / "recipe.yaml")
    assert (tmp_path / "gate.py").read_text() == "mine" and not (tmp_path / "recipe.yaml").exists()


def test_the_gate_starts_as_what_it_holds(base: Path, tmp_path: Path) -> None:
    from solidify.recipe import models

    recipe = made(base, tmp_path / "recipe.yaml")
    model = models.load_base(recipe).model
    tokens = pico.tokens()
    before = model(tokens).logits
    assert all(edit.identical for edit in models.operate(recipe, model))
    assert torch.equal(before, model(tokens).logits) and solidify.__version__


def command(directory: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "solidify", *words, "--output", str(directory / "recipe.yaml")]


@pytest.mark.slow
def test_without_a_terminal_nothing_is_asked(base: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "init", str(base)), stdin=subprocess.PIPE, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "recipe.yaml"), str(tmp_path / "gate.py")]
    assert "Which modules" not in done.stderr


@pytest.mark.slow
def test_on_a_terminal_what_no_option_says_is_asked(base: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(tmp_path, "init", str(base), "--data", "builtin:pydoc"), stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, b"2\n\n")
    shown = _read_all(ours)
    assert process.wait(300) == 0, shown
    assert "Which modules are replaced" in shown and "By which class" in shown and "File to train on" not in shown
    assert Recipe.load(tmp_path / "recipe.yaml").surgery[0].replace == "model.layers.*.self_attn"  # type: ignore[attr-defined]


def test_nothing_is_an_answer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(words: str, **_: Any) -> str:
        asked.append(words)
        return "none" if "replaced" in words else ""

    monkeypatch.setattr(starting.typer, "prompt", answer)
    found = starting._ask(Drafting(Asked(str(base), tmp_path / "recipe.yaml")))
    assert found.plain and len(asked) == 2, "by which class is not asked"


def _read_all(terminal: int) -> str:
    shown = b""
    try:
        while piece := os.read(terminal, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    return shown.decode(errors="replace")


def test_schema_prints_or_writes_the_schema(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    starting.schema()
    assert json.loads(capsys.readouterr().out) == json_schema.json_schema()
    starting.schema(tmp_path / "recipe.schema.json")
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == json_schema.json_schema()
    with pytest.raises(RecipeError, match="exists; name another file"):
        starting.schema(tmp_path / "recipe.schema.json")


def test_a_shell_completes_verbs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    complete: Callable[..., str] = lambda words: subprocess.run(  # noqa: E731
        [sys.executable, "-c", "from solidify.command.cli import app; app(prog_name='solidify')"],
        env={**os.environ, "_SOLIDIFY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "1"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert {"init", "inspect"} <= set(complete("solidify in").split())
