from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from solidify.builtin import corpus, tiny_olmoe
from solidify.demo import story
from solidify.errors import CheckFailed
from solidify.findings import Finding, Report


def test_the_embedded_model_is_genuinely_trained(tiny_base: Path) -> None:
    figures = tiny_olmoe.report()
    assert figures["heldout_loss"] < figures["unigram_loss"] - 1.5
    assert figures["train_tokens"] > 100_000
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    assert model.config.num_experts >= 8
    assert model.config.num_experts_per_tok >= 2
    tokens = torch.tensor(tokenizer(corpus.texts("heldout")[1])["input_ids"][:256])
    assert tiny_olmoe.heldout_loss(model, tokens) < figures["unigram_loss"] - 1.0


def test_training_and_held_out_text_do_not_overlap() -> None:
    """Topics of the documentation contain each other, so this is not so by itself."""

    def paragraphs(split: str) -> list[str]:
        return [p.strip() for text in corpus.texts(split) for p in text.split("\n\n") if p.strip()]

    train, heldout = paragraphs("train"), paragraphs("heldout")
    assert not set(train) & set(heldout)
    assert len(train) == len(set(train))
    assert 0.05 < sum(map(len, heldout)) / sum(map(len, train)) < 0.2


def test_the_demo_ends_in_a_table_of_what_was_proved(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo itself, with few training steps, and with few texts to measure the loss on."""
    document = yaml.safe_load(story.RECIPE.read_text())
    document["training"] |= {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
    few = SimpleNamespace(texts=lambda split: corpus.texts(split)[:4])
    monkeypatch.setattr(story, "corpus", few)
    (tmp_path / "trash_can.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.setattr(story, "RECIPE", tmp_path / "trash_can.yaml")
    report = story.tell(tmp_path / "out")
    assert report.passed
    out = capsys.readouterr().out
    for promise in story.PROVED:
        assert promise in out
    for words in ("What it bought", "expert FLOPs saved", "held-out loss", "a unigram model"):
        assert words in out
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in written["measured"]["effect"]}
    assert rows["base, top-4"]["kept"] == 1.0
    assert 0.6 < rows["trash can, threshold set, untrained"]["kept"] < 0.9
    assert len(rows) >= 6
    assert written["finished"]


def test_a_report_with_a_failure_or_without_a_check_is_no_proof() -> None:
    report = Report("x")
    with pytest.raises(CheckFailed, match="nothing was checked"):
        report.require()
    report.add("stage", [Finding("a", True, ""), Finding("b", None, "")])
    report.require()
    report.add("stage", [Finding("c", False, "because")])
    with pytest.raises(CheckFailed, match="c: because"):
        report.require()
