"""What a recipe says of its data stays with what is built: in every way in which a model is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
from transformers import AutoConfig, AutoTokenizer, ViTImageProcessor, pipeline
from words import MARKED, UNMARKED, tokenizer

import solidify
from solidify.checks import check
from solidify.directory import manifest, results
from solidify.errors import ArtifactError, DataError
from solidify.recipe import data_facts, models, stages
from solidify.recipe.schema import Recipe
from solidify.system import files

WRAPPERS = Path(pico.__file__).parent / "user_modules" / "wrappers.py"
SMALL = {**pico.SIZES, "intermediate_size": 48, "pad_token_id": 0}
DENSE = "bert.encoder.layer.*.intermediate.dense"
STEP = {"replace": DENSE, "expect": "Linear", "with": f"{WRAPPERS}:Scaled"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
WAYS = ("changed", "plain", "artifact")  # how it is built: with surgery, without, and without on an artifact


def save_base(directory: Path, head: str = "BertForSequenceClassification", **settings: Any) -> Path:
    pico.make(head, **SMALL, **{"num_labels": 2, **settings}).save_pretrained(directory)
    tokenizer(wrapped=True).save_pretrained(directory)
    return directory


def recipe_of(directory: Path, base: Path, data: dict[str, Any], *, changed: bool = False, **more: Any) -> Recipe:
    """Makes a recipe with rows of its own, which trains the classifier alone."""
    rows = data.pop("rows", [{"text": "a b", "label": 1}, {"text": "c", "label": 0}])
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = {
        "base": {"model": str(base)},
        "surgery": [STEP] if changed else [],
        "adapter": {"train": ["classifier"]},
        "data": {"train": "rows.jsonl", "max_length": 16, **data},
        "training": {"max_steps": 1, "learning_rate": 1e-3},
        **more,
    }
    return Recipe.model_validate({**document, "directory": directory})


def build(directory: Path, base: Path, way: str, data: dict[str, Any]) -> Path:
    """Builds a recipe on a base in one of the ways."""
    if way == "artifact":
        first = recipe_of(directory, base, {}, changed=True)
        base = solidify.build(first, directory=directory / "first").directory
    asked = recipe_of(directory, base, data, changed=way == "changed")
    built = solidify.build(asked, directory=directory / "out").directory
    assert results.is_made_by(built, results.built_by(asked.document()), manifest.MODELS)
    return built


@pytest.mark.parametrize("way", WAYS)
def test_names_and_template_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Whoever loads the result gets the names of the classes, and can chat by the template that it learned from."""
    pico.unwitnessed(monkeypatch)
    base = save_base(tmp_path / "base")
    built = build(tmp_path, base, way, {"labels": ["bad", "good"], "chat_template": TEMPLATE})
    config = AutoConfig.from_pretrained(built, trust_remote_code=True)
    assert config.id2label == {0: "bad", 1: "good"} and config.label2id == {"bad": 0, "good": 1}
    assert AutoTokenizer.from_pretrained(built).chat_template == TEMPLATE
    assert not manifest.faults(built, manifest.read(built))
    assert "id2label" not in files.document(base / "config.json")
    other = results.built_by(recipe_of(tmp_path, base, {}, changed=way == "changed").document())
    assert not results.is_made_by(built, other, manifest.MODELS)


@pytest.mark.slow
def test_an_artifact_with_other_names_loads_in_a_fresh_process_and_trains(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    built = build(tmp_path, base, "artifact", {"labels": ["bad", "good"], "chat_template": TEMPLATE})
    assert check.check(built).passed
    asked = recipe_of(tmp_path, tmp_path / "first" / "artifact", {"labels": ["bad", "good"], "chat_template": TEMPLATE})
    assert solidify.run(asked, tmp_path / "run").passed
    assert AutoConfig.from_pretrained(tmp_path / "run" / "merged", trust_remote_code=True).id2label[1] == "good"


@pytest.mark.slow
def test_a_template_that_changes_is_another_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name says something else: what was built and trained with it is not of this recipe."""
    pico.unwitnessed(monkeypatch)
    base = save_base(tmp_path / "base")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    asked = recipe_of(tmp_path, base, {"chat_template": "chat.jinja"})
    assert solidify.run(asked, tmp_path / "run").passed
    before = asked.document()
    assert stages.run(asked, tmp_path / "run", resume=True).passed
    changed = TEMPLATE + "\n"
    (tmp_path / "chat.jinja").write_text(changed)
    assert asked.document() != before
    artifact, adapter = (tmp_path / "run" / part for part in ("artifact", "adapter"))
    assert not results.is_made_by(artifact, results.built_by(asked.document()), manifest.MODELS)
    assert not results.is_made_by(adapter, asked.document(), "adapter")
    with pytest.raises(ArtifactError, match="holds results of another recipe"):
        stages.train(asked, tmp_path / "run")
    assert solidify.run(asked, tmp_path / "run", resume=True).passed
    for part in ("artifact", "merged"):
        assert AutoTokenizer.from_pretrained(tmp_path / "run" / part).chat_template == changed
    inline = recipe_of(tmp_path, base, {"chat_template": changed})
    assert results.is_made_by(adapter, inline.document(), "adapter")  # the same words, wherever they stand
    assert tmp_path / "chat.jinja" in asked.inputs()  # nothing is written over it


def test_a_module_that_changes_is_built_anew_by_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    source = (
        "from torch import nn\n\n\nclass Passing(nn.Module):\n    def __init__(self, original):\n"
        "        super().__init__()\n        self.original = original\n\n"
        "    def forward(self, x):\n        return self.original(x)\n"
    )
    (tmp_path / "gate.py").write_text(source)
    step = {**STEP, "with": "gate.py:Passing"}
    asked = recipe_of(tmp_path, save_base(tmp_path / "base"), {}, surgery=[step])
    assert solidify.run(asked, tmp_path / "run").passed
    parts = [tmp_path / "run" / part for part in ("artifact", "adapter", "merged")]
    before = [manifest.read(part) for part in parts]
    assert solidify.run(asked, tmp_path / "run", resume=True).passed
    assert [manifest.read(part) for part in parts] == before  # nothing is repeated
    (tmp_path / "gate.py").write_text(source.replace("self.original(x)", "1.0 * self.original(x)"))
    assert solidify.run(asked, tmp_path / "run", resume=True).passed
    assert "1.0 *" in (tmp_path / "run" / "artifact" / "gate.py").read_text()
    after = [manifest.read(part) for part in parts]
    assert after[1].base["code"] == after[0].digest()["code"] != before[0].digest()["code"]
    assert not results.misfits(tmp_path / "run")


def test_an_artifact_of_which_nothing_is_said_stays_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    built = build(tmp_path, save_base(tmp_path / "base"), "artifact", {})
    first = manifest.read(tmp_path / "first" / "artifact")
    assert manifest.read(built).listed() == first.listed()


LISTED: dict[str, tuple[Any, Any]] = {  # where a base keeps several templates: their files, or the configuration
    "files": ({"default": MARKED, "tool_use": UNMARKED, "rag": MARKED + " "}, None),
    "configuration": (None, [{"name": "default", "template": MARKED}, {"name": "tool_use", "template": UNMARKED}]),
    "one in the configuration": (None, MARKED),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", LISTED)
def test_the_other_templates_of_a_base_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, way: str
) -> None:
    pico.unwitnessed(monkeypatch)
    base = save_base(tmp_path / "base")
    held, configured = LISTED[where]
    (base / "chat_template.jinja").unlink()
    if held is not None:
        maker = tokenizer(wrapped=True)
        maker.chat_template = held
        maker.save_pretrained(base)
    else:
        path = base / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": configured}))
    before = AutoTokenizer.from_pretrained(base).chat_template
    others = {name: text for name, text in before.items() if name != "default"} if isinstance(before, dict) else {}
    assert len(others) == {"files": 2, "configuration": 1}.get(where, 0)
    built = build(tmp_path, base, way, {"chat_template": TEMPLATE})
    found = AutoTokenizer.from_pretrained(built).chat_template
    assert found == ({"default": TEMPLATE, **others} if others else TEMPLATE)
    assert "chat_template" not in files.document(built / "tokenizer_config.json")


PROBLEMS: dict[str, tuple[dict[str, Any], list[Any], str | None]] = {
    "multi_label": ({"num_labels": 3}, [[0, 1, 1], [1, 0, 0]], "multi_label_classification"),
    "regression": ({"num_labels": 1}, [0.5, 2.0], "regression"),
    "classification": ({"num_labels": 3}, [2, 0], None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_a_head_learns_stands_in_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, way: str
) -> None:
    """Without it, whoever loads the result takes several labels that hold for one that does, and a number for a
    probability."""
    pico.unwitnessed(monkeypatch)
    settings, labels, expected = PROBLEMS[problem]
    base = save_base(tmp_path / "base", **settings)
    rows = [{"text": "a b", "label": label} for label in labels]
    if way == "artifact":  # which was built of rows that say nothing of it
        first = recipe_of(tmp_path, base, {"rows": rows}, changed=True, adapter=None, training={})
        base = solidify.build(first, directory=tmp_path / "first").directory
        assert AutoConfig.from_pretrained(base, trust_remote_code=True).problem_type is None
    asked = recipe_of(tmp_path, base, {"rows": rows}, changed=way == "changed")
    built = solidify.build(asked, directory=tmp_path / "out").directory
    assert AutoConfig.from_pretrained(built, trust_remote_code=True).problem_type == expected


def test_a_format_that_the_recipe_names_is_kept_without_a_look_at_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    base, more = save_base(tmp_path / "base", num_labels=3), {"changed": True, "adapter": None, "training": {}}
    plain, asked = (recipe_of(tmp_path, base, data, **more) for data in ({}, {"format": "multi_label"}))
    built = solidify.build(asked, directory=tmp_path / "out").directory
    assert AutoConfig.from_pretrained(built, trust_remote_code=True).problem_type == "multi_label_classification"
    assert results.is_made_by(built, results.built_by(asked.document()), manifest.MODELS)
    assert not results.is_made_by(built, results.built_by(plain.document()), manifest.MODELS)


def test_several_labels_come_out_of_a_merged_model_as_they_were_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    rows = [{"text": "a b", "label": ["x", "z"]}, {"text": "c", "label": []}]
    base = save_base(tmp_path / "base", num_labels=3)
    report = solidify.run(recipe_of(tmp_path, base, {"rows": rows, "labels": ["x", "y", "z"]}), tmp_path / "run")
    assert report.passed
    made = pipeline("text-classification", str(tmp_path / "run" / "merged"), device="cpu")
    scores = made(["a b"], top_k=None)[0]
    assert {each["label"] for each in scores} == {"x", "y", "z"}
    assert sum(each["score"] for each in scores) != pytest.approx(1.0, abs=1e-3)


def test_labels_are_judged_where_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of surgery alone wrote names over those of the base, or dropped those of another number."""
    pico.unwitnessed(monkeypatch)
    base = save_base(tmp_path / "base", id2label={0: "no", 1: "yes"})
    for labels, words in ((["yes", "no"], "class 0 is 'yes'"), (["a"], "names 1 classes"), (["a", "a"], "'a' twice")):
        asked = recipe_of(tmp_path, base, {"labels": labels}, changed=True, adapter=None, training={})
        with pytest.raises(DataError, match=words):
            solidify.build(asked, directory=tmp_path / "out")
    assert not (tmp_path / "out" / "artifact").exists()


def test_a_template_needs_a_tokenizer_to_stand_beside(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    pico.make("ViTForImageClassification", **sizes, image_size=16).save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    asked = recipe_of(tmp_path, tmp_path / "base", {"chat_template": TEMPLATE})
    with pytest.raises(DataError, match=r"data: chat_template is kept beside a tokenizer, and .* has none"):
        data_facts.of_base(asked, models.load_base(asked, device="meta"))
