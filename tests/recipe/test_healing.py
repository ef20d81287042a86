"""`heal` of a recipe: layers are chosen, modules aligned, the model distilled; what was done is kept and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import solidify
from solidify.command.cli import app
from solidify.directory import manifest, ours
from solidify.errors import ArtifactError, HealingError, RecipeError
from solidify.findings import Report
from solidify.healing import placing
from solidify.healing.ledger import Aligned
from solidify.recipe import placement, stages
from solidify.recipe.schema import Recipe

MODULES = Path(__file__).parents[1] / "support" / "user_modules" / "healing_modules.py"


def write(directory: Path, base: Path, **heal: Any) -> Path:
    shutil.copy(MODULES, directory / "healing_modules.py")
    texts = [
        {"text": f"the {word} of number {number} is {number * 7}"} for number in range(24) for word in ("sum", "cat")
    ]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    document = {
        "base": {"model": str(base)},
        "surgery": [
            {
                "replace": "model.layers.*.mlp",
                "expect": "OlmoeSparseMoeBlock",
                "with": "healing_modules.py:Narrow",
                "arguments": {"width": 24},
            }
        ],
        "heal": heal,
        "data": {"train": "train.jsonl", "max_length": 16},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


ALIGN = {"max_steps": 8, "learning_rate": 1e-2}
DISTILL = {"training": {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1}}


def test_a_run_places_aligns_distils_and_resumes(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_base, place={"layers": 1, "max_steps": 3}, align=ALIGN, distill=DISTILL)
    out = tmp_path / "out"
    report = solidify.run(path, out)
    assert report.passed, [f.evidence for f in report.failed]
    placed = report.measured["place"]
    assert len(placed["chosen"]) == 1 and len(placed["scores"]) > 1
    record = manifest.read(out / "heal" / "merged", "artifact")
    assert [edit["name"] for edit in record.edits] == placed["chosen"]
    assert [step["step"] for step in record.lineage] == ["base", "surgery", "heal", "merge"]
    stages = report.measured["heal"]["stages"]
    assert [stage["stage"] for stage in stages] == ["surgery", "align", "distill"]
    assert stages[2]["kl"] < stages[0]["kl"] and stages[0]["recovered"] == 0
    assert not (out / "heal" / "alignment").exists()
    checked = solidify.check(out)
    assert checked.passed and "heal/merged" in checked.stages
    assert ours.unlike_a_run(out / "heal") == []
    for written in (out, out / "heal"):
        found = Report.read(written / "report.json")
        assert found["finished"] and found["recipe"] == Recipe.load(path).document()
        assert (written / "report.html").is_file() and "distill" in found["stages"]
    before = {name: (out / "heal" / name / "solidify.json").stat().st_mtime_ns for name in ("artifact", "merged")}
    again = solidify.run(path, out, resume=True)
    assert again.passed and again.measured["place"] == placed
    assert before == {name: (out / "heal" / name / "solidify.json").stat().st_mtime_ns for name in before}


@pytest.mark.slow
def test_what_answers_as_its_base_has_nothing_to_learn_from_it(tiny_base: Path, tmp_path: Path) -> None:
    """A module that starts as its original: the divergence from the base is rounding, and so is its gradient."""
    shutil.copy(MODULES.with_name("wrappers.py"), tmp_path)
    path = write(tmp_path, tiny_base, distill=DISTILL)
    document = yaml.safe_load(path.read_text())
    document["surgery"][0] |= {"with": "wrappers.py:Scaled", "arguments": {}}
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(HealingError, match=r"heal\.distill: .* which is rounding, so there is nothing to bring back"):
        solidify.run(path, tmp_path / "out")


@pytest.mark.slow
def test_shares_of_the_command_are_put_together(tiny_base: Path, tmp_path: Path) -> None:
    path, run = write(tmp_path, tiny_base, align=ALIGN), CliRunner()
    assert run.invoke(app, ["build", str(path), "-o", str(tmp_path / "a")]).exit_code == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert run.invoke(app, ["heal", str(path), "-o", str(tmp_path / "a")]).exit_code == 0
    for part in ("1/2", "2/2"):
        assert run.invoke(app, ["heal", str(path), "-o", str(tmp_path / "b"), "--share", part]).exit_code == 0
        assert not (tmp_path / "b" / "heal" / "artifact").exists()
    assert run.invoke(app, ["heal", str(path), "-o", str(tmp_path / "b")]).exit_code == 0
    one, two = (manifest.read(tmp_path / name / "heal" / "artifact").tensors for name in "ab")
    assert one == two and one != manifest.read(tmp_path / "a" / "artifact").tensors


@pytest.mark.parametrize(
    ("heal", "words"),
    [
        ({}, "give `place`, `align` or `distill`"),
        ({"align": {"learning_rat": 1}}, "heal.align.learning_rat: unknown key; did you mean 'learning_rate'"),
        ({"place": {"layers": 1, "flops": 3}}, "a budget is one of"),
        ({"align": {"train": "**.nothing"}}, "nothing in it learns"),
        ({"align": {"optim": "Adamm"}}, "optim is a class of torch.optim"),
        ({"place": {"layers": 1, "step": 3}, "align": {}}, "is not a `replace`"),
        (
            {"distill": {"train": "**.nothing"}},
            r"^heal\.distill cannot be trained as declared: heal\.distill\.train: '\*\*\.nothing' hits nothing",
        ),
        (
            {"distill": {"lora": {"target_modules": ["nope"]}}},
            r"heal\.distill\.lora: target_modules: 'nope' hits nothing",
        ),
        (
            {"distill": {"training": {"max_step": 3}}},
            r"^heal\.distill\.training does not fit: heal\.distill\.training\.max_st",
        ),
        ({"distill": {"objective": [{"loss": "model"}]}}, r"^heal\.distill\.objective: no term looks at the base"),
        ({"distill": {"objective": [{"loss": "x:y"}]}}, r"^heal\.distill: "),
        (
            {"distill": {"parameter_groups": [{"parameters": "**.no", "learning_rate": 1}]}},
            r"^heal\.distill\.parameter_groups do not fit what is trained: '\*\*\.no' names nothing",
        ),
        ({"place": {"layers": 9}, "align": {}}, "9 are to be changed, but the step names 4 candidates"),
        ({"align": {"match": "heads"}}, "has no output projection that is known here"),
    ],
)
def test_what_is_wrong_is_said_by_plan(tiny_base: Path, tmp_path: Path, heal: dict[str, Any], words: str) -> None:
    path = write(tmp_path, tiny_base, **heal)
    with pytest.raises((RecipeError, solidify.AdapterError), match=words):
        solidify.plan(Recipe.load(path))


def test_what_a_recipe_may_say_is_what_python_takes() -> None:
    """The recipe is read without torch and typed for a checker, so it names the fields and what they may be itself."""
    from dataclasses import fields
    from typing import get_args

    from solidify.healing import matching
    from solidify.healing.learning import Alignment
    from solidify.healing.placing import METHODS, Budget
    from solidify.recipe.sections import Align, Place

    for field, known in (("match", matching.AT), ("distance", matching.DISTANCES), ("inputs", ("base", "healed"))):
        assert get_args(Align.model_fields[field].annotation) == tuple(known)
    assert get_args(Place.model_fields["method"].annotation) == tuple(METHODS)
    for wrong in ({"max_steps": 0}, {"warmup_steps": -1}, {"patience": 0}, {"learning_rate": 0.0}):
        assert Alignment(**wrong).faults(), wrong
        with pytest.raises(ValueError, match="greater than"):
            Align(**wrong)
    for wrong in ({"layers": -1}, {"cache_bytes": -1}, {"flops": -1}, {"layers": 1, "length": 0}):
        assert Budget(**wrong).faults(), wrong
        with pytest.raises(ValueError, match="greater than"):
            Place(**wrong)

    for section, kind, own, other in (
        (Align, Alignment, {"batch_size"}, {"share"}),
        (Place, Budget, {"step", "max_steps"}, set()),
    ):
        python = {f.name: getattr(kind(), f.name) for f in fields(kind)}
        recipe = {name: field.default for name, field in section.model_fields.items()}
        assert set(recipe) - own == set(python) - other
        same = set(recipe) - own
        assert {n: recipe[n] or None for n in same} == {n: python[n] or None for n in same}


@pytest.mark.parametrize("verb", ["heal", "train"])
def test_a_verb_that_needs_a_choice_of_layers_asks_for_it(tiny_base: Path, tmp_path: Path, verb: str) -> None:
    path = write(tmp_path, tiny_base, place={"layers": 1, "max_steps": 2}, align={"max_steps": 2})
    document = yaml.safe_load(path.read_text())
    document["adapter"] = {"train": ["**.mlp.up"]}
    path.write_text(yaml.safe_dump(document))
    found = CliRunner().invoke(app, [verb, str(path), "-o", str(tmp_path / "out")])
    assert isinstance(found.exception, HealingError) and "are not chosen yet" in str(found.exception)


@pytest.mark.slow
def test_build_chooses_and_heal_takes_the_choice(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_base, place={"layers": 1, "max_steps": 2}, align={"max_steps": 2})
    out = tmp_path / "out"
    assert CliRunner().invoke(app, ["build", str(path), "-o", str(out)]).exit_code == 0
    built = manifest.read(out / "artifact").edits
    assert len(built) == 1
    report = solidify.heal(path, out)
    assert manifest.read(out / "heal" / "artifact").edits == built and len(report.measured["heal"]["layers"]) == 1
    found = Report.read(out / "heal" / "report.json")
    assert found["stages"].keys() == {"heal"} and found["finished"] and found["recipe"]["heal"]["place"]["layers"] == 1
    assert solidify.check(out).passed
    (out / "heal" / "report.html").write_text("mine")
    assert not solidify.check(out).passed
    with pytest.raises(ArtifactError, match=r"report\.html is not the page that a run wrote"):
        solidify.heal(path, out)
    assert (out / "heal" / "report.html").read_text() == "mine"


def test_a_resumed_run_reports_the_layers_that_were_chosen_before(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, tiny_base, place={"layers": 1, "max_steps": 2}, align={"max_steps": 2})
    out = tmp_path / "out"

    def stop(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_heal", stop)
        with pytest.raises(KeyboardInterrupt):
            solidify.run(path, out)
    chosen = json.loads((out / "heal" / "placement.json").read_text())
    report = solidify.run(path, out, resume=True)
    assert report.measured["place"] == {key: chosen[key] for key in report.measured["place"]}
    assert [edit["name"] for edit in manifest.read(out / "artifact").edits] == chosen["chosen"]
    for written in (out, out / "heal"):
        found = Report.read(written / "report.json")
        assert found["finished"] and [each["name"] for each in found["stages"]["place"]] == ["layers chosen"]
        page = (written / "report.html").read_text()
        assert "Divergence of the base with one module changed" in page and "Smallest sum of scores" in page


@pytest.mark.parametrize("edited", [False, True])
def test_layers_are_chosen_anew_for_other_code(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edited: bool
) -> None:
    path = write(tmp_path, tiny_base, place={"layers": 1, "max_steps": 2}, align={"max_steps": 2})
    recipe, out, chosen = Recipe.load(path), tmp_path / "out", []
    choose = placing.place
    monkeypatch.setattr(placing, "place", lambda *args, **given: chosen.append(1) or choose(*args, **given))
    stages.build(recipe, out)
    if edited:
        source = (tmp_path / "healing_modules.py").read_text()
        (tmp_path / "healing_modules.py").write_text(source.replace("torch.tanh", "torch.sigmoid"))
    assert (placement.placed_before(recipe, out) == recipe) is edited
    assert placement.require_placed(recipe, out) != recipe  # what healing goes on with is the artifact
    stages.build(recipe, out, resume=True)
    assert len(chosen) == (2 if edited else 1)


@pytest.mark.slow
def test_a_healing_that_is_stopped_leaves_a_report_that_says_so(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = write(tmp_path, tiny_base, align={"max_steps": 2}, distill=DISTILL), tmp_path / "out"
    assert CliRunner().invoke(app, ["build", str(path), "-o", str(out)]).exit_code == 0

    def stop(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_distill", stop)
    with pytest.raises(KeyboardInterrupt):
        solidify.heal(path, out)
    found = Report.read(out / "heal" / "report.json")
    assert not found["finished"] and found["stages"].keys() == {"heal"}
    assert ours.in_run(out) == [] and solidify.check(out).passed


def test_plan_says_what_healing_takes(tiny_base: Path, tmp_path: Path) -> None:
    heal = {"place": {"layers": 2}, "align": {**ALIGN, "stream": True}, "distill": DISTILL}
    path = write(tmp_path, tiny_base, **heal)
    planned = solidify.plan(path).heal
    assert planned is not None
    assert planned["align"]["modules"] == 4 and planned["align"]["tokens"] == 8 * 4 * 16
    assert planned["align"]["disk"] > 0 and planned["place"]["candidates"] == 4
    assert planned["distill"]["objective"] == ["chunked_distillation"]
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0 and "layer by layer" in shown.stdout and "4 candidates, layers 2" in shown.stdout


def test_a_recipe_without_heal_is_not_healed(tiny_base: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tiny_base, align=ALIGN)
    recipe = Recipe.load(path).model_copy(update={"heal": None})
    with pytest.raises(RecipeError, match="no `heal`"):
        solidify.heal(recipe, tmp_path / "out")
    with pytest.raises(RecipeError, match="a share is written as 1/4"):
        from solidify.recipe.healing import read_share

        read_share("0/4")
    assert issubclass(HealingError, solidify.SolidifyError)


def test_many_units_are_shown_by_what_they_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    from solidify.recipe.healing import layers_table
    from solidify.system import console

    def shown(count: int) -> str:
        units = [Aligned(f"model.layers.{n}.mlp", (), 1.0 + n, 0.5, 8, 1000 * n, 1.0, [1.0]) for n in range(count)]
        console.words.print(layers_table(units))
        return capsys.readouterr().err

    assert "model.layers.11.mlp" in shown(12)
    folded = shown(13)
    assert "model.layers.*.mlp (13)" in folded and "1 to 13" in folded and "0 to 12,000" in folded
    assert len(folded.splitlines()) == 6
