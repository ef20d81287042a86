"""Experts that a recipe chooses by its data: planned without a run, built, recorded, and made a stock model."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import solidify
from solidify.command import views
from solidify.directory import manifest
from solidify.errors import RecipeError, SurgeryError
from solidify.healing import calibrating
from solidify.recipe.schema import Recipe

TEXTS = [f"the {word} of number {number} is {number * 7}" for number in range(20) for word in ("sum", "cat")]


def write(directory: Path, base: Path | str, *, data: bool = True, **step: Any) -> Path:
    (directory / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    surgery = {"rearrange_experts": "model.layers.*.mlp", "expect": "OlmoeSparseMoeBlock", **step}
    rows = {"data": {"train": "train.jsonl", "max_length": 32}} if data else {}
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": {"model": str(base)}, "surgery": [surgery], **rows}))
    return path


def test_a_plan_says_what_is_chosen_later_and_runs_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "score_experts", None)
    plan = solidify.plan(write(tmp_path, tiny_base, keep=5, rows=12))
    assert [edit.arguments for edit in plan.edits] == [{"keep": 5, "by": "reap", "rows": 12}] * len(plan.edits)
    assert plan.after["parameters"] < plan.before["parameters"] and plan.data is not None
    assert set(plan.tensors["new"]) == set(plan.tensors["dropped"]) and not plan.tensors["unknown"]


@pytest.mark.parametrize("by", ["reap", "frequency"])
def test_a_recipe_keeps_the_best_experts_by_its_data(tiny_base: Path, tmp_path: Path, by: str) -> None:
    """The numbers, and the digest in the record, are those of the same texts scored by hand; the result is stock."""
    artifact = solidify.build(write(tmp_path, tiny_base, keep=5, by=by, rows=12), directory=tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS[:12]]
    assert max(len(row) for row in rows) <= 32
    batches = [{"input_ids": torch.tensor([row])} for row in rows]
    expected = solidify.score_experts(model, "model.layers.*.mlp", batches, by=by).keep(5)
    edits = manifest.read(artifact.directory, "artifact").edits
    assert {edit["name"]: edit["settings"]["order"] for edit in edits} == dict(expected)
    assert {edit["arguments"]["by"] for edit in edits} == {by}
    assert len({edit["arguments"]["scores"] for edit in edits}) == 1
    plain = AutoModelForCausalLM.from_pretrained(solidify.export(artifact.directory, tmp_path / "plain").directory)
    ids = torch.arange(4, 16)[None]
    assert plain.config.num_experts == 5 and type(plain).__name__ == "OlmoeForCausalLM"
    assert torch.equal(plain.eval()(ids).logits, solidify.load(artifact.directory).eval()(ids).logits)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"keep": 2, "data": False}, "`keep` and `weights: frequency` are about what experts do on data: give `data`"),
        ({"keep": 2, "order": [0, 1]}, "order and keep say each which experts there are; give one of them"),
        ({"keep": 2, "copies": 2}, "keep and copies say each"),
        ({}, "give `order`, `keep` or `copies`, or `experts_per_token`"),
        ({"order": [0, 1], "by": "reap"}, "`by` and `rows` say how the experts that `keep` counts are chosen"),
        ({"copies": 2, "experts_per_token": 2}, "`copies` says how many experts a token gets too"),
        ({"keep": 2, "by": "magnitude"}, "'reap' or 'frequency'"),
    ],
)
def test_keys_that_do_not_go_together_are_said(tmp_path: Path, step: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.load(write(tmp_path, "base", **step))


def test_more_than_there_are_cannot_be_kept(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"model\.layers\.\S+ has \d+ experts, so 99 cannot be kept"):
        solidify.plan(write(tmp_path, tiny_base, keep=99))


def test_data_that_is_no_text_is_said_before_anything_runs(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_base, keep=5)
    (tmp_path / "train.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n')
    with pytest.raises(RecipeError, match="surgery: calibration reads the rows of `data` as text"):
        solidify.plan(path)


CLUSTERS = [[0, 3], [1, 2], *([number] for number in range(4, 16))]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"into": 6}, {"into": 6, "weights": "equal"}),
        ({"into": 6, "weights": "frequency"}, {"into": 6, "weights": "frequency"}),
        ({"into": 6, "experts_per_token": 1}, {"into": 6, "weights": "equal", "experts_per_token": 1}),
        ({"clusters": CLUSTERS}, {"clusters": CLUSTERS, "weights": "equal"}),
        ({"clusters": CLUSTERS, "weights": "frequency"}, {"clusters": CLUSTERS, "weights": "frequency"}),
    ],
)
def test_a_plan_says_which_merge_is_asked_for_and_makes_none_up(
    tiny_base: Path, tmp_path: Path, asked: dict[str, Any], said: dict[str, Any]
) -> None:
    """Which experts are alike, and how often each is chosen, is known once there are weights."""
    path = write(tmp_path, tiny_base, order=[0])
    step = {"merge_experts": "model.layers.*.mlp", "expect": "OlmoeSparseMoeBlock", **asked}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "surgery": [step]}))
    plan = solidify.plan(path)
    assert [edit.arguments for edit in plan.edits] == [said] * len(plan.edits)
    out = StringIO()
    for each in views.plan(plan.document()):
        Console(file=out, width=400).print(each)
    assert f"({', '.join(f'{key}={value!r}' for key, value in said.items())})" in out.getvalue()


def test_experts_without_values_are_not_said_to_be_alike() -> None:
    with torch.device("meta"):
        model = pico.olmoe()
    with pytest.raises(SurgeryError, match="the meta device"):
        solidify.cluster_experts(model, "**.mlp", 4)


def test_a_recipe_merges_alike_experts_by_how_often_they_are_chosen(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_base, order=[0])
    document = yaml.safe_load(path.read_text())
    step = {"merge_experts": "model.layers.*.mlp", "expect": "OlmoeSparseMoeBlock", "into": 6}
    path.write_text(yaml.safe_dump({**document, "surgery": [{**step, "weights": "frequency", "rows": 8}]}))
    planned = solidify.plan(path)
    assert planned.after["parameters"] < planned.before["parameters"]
    artifact = solidify.build(path, directory=tmp_path / "out")
    expected = solidify.cluster_experts(AutoModelForCausalLM.from_pretrained(tiny_base), step["merge_experts"], 6)
    edits = manifest.read(artifact.directory, "artifact").edits
    assert {edit["name"]: edit["arguments"]["clusters"] for edit in edits} == expected
    assert {edit["operation"] for edit in edits} == {"merge_experts"}
    assert solidify.load(artifact.directory).config.num_experts == 6
