"""What a Python user sees: a surgery that shows what it hits, recipes by their path, errors and short words."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from pico import wrappers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import solidify
from solidify.errors import ArtifactError, ModelError, RecipeError, SurgeryError, refuse


def test_a_selection_shows_what_it_hits_and_changes_nothing() -> None:
    model = pico.llama()
    surgery = solidify.Surgery(model)
    by_pattern = surgery.select("model.layers.*.mlp")
    assert list(by_pattern) == ["model.layers.0.mlp", "model.layers.1.mlp"] and len(by_pattern) == 2
    assert surgery.select(LlamaMLP) == by_pattern
    assert surgery.select(lambda name, module: name.endswith(".mlp")) == by_pattern
    assert surgery.select(["model.layers.1.mlp", "model.layers.0.mlp"]) == by_pattern  # in the order of the model
    assert repr(by_pattern) == "Selection(2 LlamaMLP)" and by_pattern.classes == {"LlamaMLP": 2}
    size = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert str(by_pattern).splitlines() == [
        "LlamaForCausalLM",
        "└ model",
        "  └ layers",
        "    └ *",
        f"      └ mlp  ● LlamaMLP x 2, {2 * size:,} parameters",
    ]
    page = by_pattern._repr_html_()
    assert "model.layers.*.mlp" in page and "<table>" in page
    assert surgery.edits == [] and isinstance(model.model.layers[0].mlp, LlamaMLP)


def test_the_last_branch_of_a_selection_ends_the_tree() -> None:
    hit = solidify.Surgery(pico.llama()).select(["model.norm", "model.layers.0.mlp", "model.layers.0", "lm_head"])
    marks = [line.partition("  ●")[0] for line in str(hit).splitlines()]
    assert marks == ["LlamaForCausalLM", "├ model", "│ ├ layers", "│ │ └ 0", "│ │   └ mlp", "│ └ norm", "└ lm_head"]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("model.layer.*.mlp", "names no module; did you mean|names no module"),
        (["model.layers.*.mlp", "nothing"], "'nothing' names no module"),
        (nn.Conv2d, "no module is of class Conv2d; the model's classes: .*Linear"),
        ([], "no pattern is given"),
        (nn.Linear(2, 2), "Linear is not a pattern, class or function"),
        (3, "int is not a pattern, class or function"),
        (lambda name, module: False, "the function is true for none of .* modules"),
    ],
)
def test_a_selection_of_nothing_is_refused(where: object, words: str) -> None:
    with pytest.raises(SurgeryError, match=words):
        solidify.Surgery(pico.llama()).select(where)  # type: ignore[arg-type]


def test_a_surgery_collects_its_edits_and_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    surgery = solidify.Surgery(pico.llama())
    assert str(surgery).splitlines()[0] == "Surgery of LlamaForCausalLM: 0 edits"
    surgery.insert("model.layers.1", zero=["self_attn.o_proj", "mlp.down_proj"])
    hit = surgery.select(lambda name, module: isinstance(module, LlamaMLP) and ".0." in name)
    assert [edit.name for edit in surgery.replace(hit, wrappers.Scaled, expect="LlamaMLP", count=1)] == list(hit)
    with pytest.raises(SurgeryError, match="the selection was made in another model"):
        solidify.Surgery(pico.llama()).replace(hit, wrappers.Scaled)
    assert hit.classes == {"LlamaMLP": 1}  # as it was when it was selected
    surgery.replace(["model.layers.1.mlp", "model.layers.2.mlp"], wrappers.Scaled, count=2)
    with pytest.raises(SurgeryError, match="4 were expected"):
        surgery.replace("model.layers.*.self_attn.q_proj", wrappers.Scaled, count=4)
    assert [edit.operation for edit in surgery.edits] == ["rearrange", "replace", "replace", "replace"]
    assert repr(surgery) == "Surgery(LlamaForCausalLM, 4 edits)" and "Scaled" in surgery._repr_html_()
    layer = sum(p.numel() for p in surgery.model.model.layers[2].parameters()) - 1  # but for the scale
    assert str(surgery).splitlines() == [
        "Surgery of LlamaForCausalLM: 4 edits",
        f"  rearrange model.layers: ModuleList, {layer:+,} parameters",
        "  replace model.layers.*.mlp x 3: LlamaMLP -> Scaled, +3 parameters",
    ]
    built = surgery.build(tmp_path / "artifact")
    assert built.directory == tmp_path / "artifact" and len(built.manifest.edits) == 4
    assert solidify.load(built.directory) is not None


def written(directory: Path) -> Path:
    pico.llama().save_pretrained(directory / "base")
    step = {"replace": "model.layers.*.mlp", "expect": "LlamaMLP", "with": f"{wrappers.__file__}:Scaled"}
    (directory / "recipe.yaml").write_text(yaml.safe_dump({"base": {"model": "base"}, "surgery": [step]}))
    return directory / "recipe.yaml"


def test_a_recipe_is_taken_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)
    path = written(tmp_path)
    recipe = solidify.Recipe.load(path, ["surgery.0.count=2"])
    assert recipe.surgery[0].count == 2  # type: ignore[attr-defined]
    plan = solidify.plan(path)
    assert repr(plan).startswith("Plan(2 edits; ") and "LlamaMLP" in plan._repr_html_()
    report = solidify.run(str(path), tmp_path / "out")
    assert repr(report).startswith(f"Report({tmp_path / 'out'}: ") and "<td" in report._repr_html_()
    built = solidify.build(path, directory=tmp_path / "other")
    assert built.directory == tmp_path / "other" / "artifact"
    assert repr(built).startswith(f"Artifact({built.directory}: ")
    assert built.manifest.tensors == solidify.build(recipe, directory=tmp_path / "third").manifest.tensors
    with pytest.raises(ArtifactError, match="a recipe says everything itself; leave out edits, base"):
        solidify.build(path, [], tmp_path / "fourth", base={})
    with pytest.raises(RecipeError, match="nothing says where results go"):
        solidify.build(recipe.model_copy(update={"name": ""}))
    with pytest.raises(ArtifactError, match="an edited model is built from its edits into a directory"):
        solidify.build(pico.llama())


def test_an_error_lists_its_faults(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("base: {modle: x, dtype: 3}\n")
    with pytest.raises(RecipeError) as caught:
        solidify.Recipe.load(tmp_path / "recipe.yaml")
    assert len(caught.value.faults) >= 3 and all(fault in str(caught.value) for fault in caught.value.faults)
    assert pickle.loads(pickle.dumps(caught.value)).faults == caught.value.faults
    with pytest.raises(RecipeError) as single:
        solidify.Recipe.load(tmp_path / "none.yaml")
    assert single.value.faults == (str(single.value),)


def test_records_are_short_words() -> None:
    model = pico.llama()
    (edit, _) = solidify.replace(model, "model.layers.*.mlp", wrappers.Scaled)
    assert repr(edit) == "Edit(replace model.layers.0.mlp: LlamaMLP -> Scaled, 1 tensors new, 0 dropped)"


def test_what_a_notebook_shows_is_escaped() -> None:
    report = solidify.Report("<script>")
    report.add("<b>", [solidify.Finding("a", True, "<img src=x>")])
    page = report._repr_html_()
    assert "<script>" not in page and "<img" not in page and "&lt;img" in page


def test_types_are_published() -> None:
    assert (Path(solidify.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize(
    ("model", "options", "kind", "words"),
    [
        (None, {}, SurgeryError, "not on a NoneType"),
        (torch.nn.Linear(2, 2), {}, SurgeryError, "not on a Linear"),
        ("/nowhere/at/all", {}, ModelError, "'/nowhere/at/all' cannot be loaded: there is no such directory"),
        ("builtin:nothing", {}, ModelError, "built in: builtin:tiny-olmoe"),
    ],
)
def test_a_surgery_says_what_it_cannot_begin_with(model: Any, options: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        solidify.Surgery(model, **options)


def test_options_of_loading_are_taken_or_refused(tmp_path: Path) -> None:
    model = pico.llama()
    with pytest.raises(SurgeryError, match="say how to load a model"):
        solidify.Surgery(model, dtype="bfloat16")
    model.save_pretrained(tmp_path)
    assert solidify.Surgery(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_one_fault_of_many_layers_is_said_once() -> None:
    said = [f"model.layers.{n}.mlp: the original returns 1 tensor, off by 0.{n % 2}" for n in range(9)]
    with pytest.raises(SurgeryError) as caught:
        refuse(SurgeryError, "it does not fit", [*said, "lm_head: is missing"])
    assert str(caught.value).splitlines() == [
        "it does not fit:",
        f"  - {said[0]} (and 4 more like this, the last of model.layers.8.mlp)",
        *(f"  - {each}" for each in said[1::2]),
        "  - lm_head: is missing",
    ]
    assert caught.value.faults == (*said, "lm_head: is missing")
    with pytest.raises(
        SurgeryError, match=r"^it does not fit: layers.1 is 3 \(and 4 more like this, the last of layers.5\)$"
    ):
        refuse(SurgeryError, "it does not fit", [f"layers.{n} is 3" for n in range(1, 6)])
