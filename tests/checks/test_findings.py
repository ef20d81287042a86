"""What was not looked at is never called proved: the four verdicts, where they come from and where they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pico
import pytest
import torch
from pico import wrappers

import solidify
from solidify import findings
from solidify.artifact import sources
from solidify.checks import check, gradients, roundtrip, structure
from solidify.command import cli
from solidify.findings import Finding, Report, fold
from solidify.merging import agreement, read_back, sums
from solidify.model.extent import Extent
from solidify.objective.objective import Objective, Term
from solidify.objective.sanity import Sanity
from solidify.system import console


def four() -> list[Finding]:
    return [
        Finding("a", True, "x"),
        Finding("b", False, "x"),
        Finding("c", None, "x"),
        Finding.unseen("d", "nobody was there"),
    ]


def test_a_finding_has_one_of_four_verdicts_and_keeps_it_in_its_document() -> None:
    found = four()
    assert [finding.verdict for finding in found] == list(findings.VERDICTS)
    assert [finding.passed for finding in found] == [True, False, None, None]
    assert [Finding.of(json.loads(json.dumps(each.document()))) for each in found] == found
    older = {"name": "c", "passed": None, "evidence": "x"}  # a report of before
    assert Finding.of(older).verdict == "measured"


@pytest.mark.parametrize("passed", [True, False])
def test_what_was_not_looked_at_is_not_judged(passed: bool) -> None:
    with pytest.raises(ValueError, match="neither holds nor fails"):
        Finding("a", passed, "x", looked=False)


def test_a_report_holds_when_something_is_proved_and_nothing_failed() -> None:
    good, bad, measured, unseen = four()
    assert Report("r", {"s": [good, measured, unseen]}).passed
    assert not Report("r", {"s": [measured, unseen]}).passed  # nothing was proved
    assert not Report("r", {"s": [good, bad]}).passed
    assert Report("r", {"s": [good, measured, unseen]}).verdicts == {
        "proved": 1,
        "failed": 0,
        "measured": 1,
        "not looked at": 1,
    }


def test_all_four_are_shown_in_the_table_the_document_and_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("subject", {"stage": four()})
    document = report.document()
    assert [each["verdict"] for each in document["stages"]["stage"]] == list(findings.VERDICTS)
    monkeypatch.setattr(console, "results", console.Console(width=120, highlight=False))
    cli._show_report(document)
    shown = capsys.readouterr().out
    for word in ("proved", "FAILED", "measured", "not looked at", "1 proved, 1 failed, 1 measured, 1 not looked at"):
        assert word in shown
    page = sources.render("report.html.jinja", report=report, recipe={}, versions={})
    for verdict in findings.VERDICTS:
        assert f">{verdict}</td>" in page
    assert "1 proved, 1 failed, 1 measured, 1 not looked at" in page


def test_what_is_proved_is_one_line_for_each_stage_and_the_rest_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, measured, unseen = four()
    report = Report("subject", {"a": [good, good, measured], "b": [good, unseen, bad], "c": [good]})
    cli._show_report(report.document())
    shown = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line.split("│")[3].strip() for line in shown] == [
        "proved", "measured", "proved", "not looked at", "FAILED", "proved",
    ]  # fmt: skip
    assert "2 promises" in shown[0] and good.name in shown[0] and good.name in shown[2]
    cli._show_report(report.document(), verbose=True)
    assert len([line for line in capsys.readouterr().out.splitlines() if "│" in line]) == 7


def test_the_page_sums_up_stages_and_losses_and_leaves_out_what_is_not_there() -> None:
    good, _, measured, _ = four()
    logs = [{"loss": 2.0, "term/model": 1.5, "weighted/model": 1.5}, {"loss": 1.0, "term/model": 0.75}]
    report = Report("subject", {"build": [good, good, measured]}, {"history": logs, "heldout": 0.5})
    page = sources.render("report.html.jinja", report=report, recipe={}, versions={})
    assert "<p>build: 2 proved, 1 measured</p>" in page
    assert "<tr><td>total</td>\n<td>2</td><td>1</td></tr>" in page
    assert "<tr><td>model</td>\n<td>1.5</td><td>0.75</td></tr>" in page
    assert "<h2>measured</h2>" in page and page.count("<table>") == page.count("</table>") == 3
    bare = sources.render("report.html.jinja", report=Report("subject"), recipe={}, versions={})
    assert "<h2>measured</h2>" not in bare and "<h2>objective</h2>" not in bare and "<table>" not in bare


def test_a_stage_is_told_when_it_starts_where_no_spinner_turns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "words", console._Console(stderr=True))
    with console.stage("Loading [it]"):
        assert capsys.readouterr().err == "… Loading [it]\n"
    shown = capsys.readouterr()
    assert "✓" in shown.err and not shown.out


def test_nothing_to_look_at_is_not_looked_at(trash_artifact: Path) -> None:
    model = pico.llama()
    nothing = [
        structure.structure(model, []),
        structure.in_use(model, [], Extent.of(model)),
        structure.untouched(model, {}, []),
        structure.start({}, {}, promised=False),
        gradients.parts_sum([]),
        gradients.terms(Sanity(Objective([Term("model")]))),
        roundtrip.adapter_reload({}, {}),
        sums.compare({}, {}, []),
        read_back.Comparison().finding(["a.weight"]),
        agreement.not_looked_at("no inputs can be made up"),
        *roundtrip.adapter_effect(model, {}, {}),
    ]
    assert {finding.verdict for finding in nothing} == {"not looked at"}


def test_what_is_said_of_every_auto_class_is_one_line_and_a_failure_its_own() -> None:
    names = ["state (AutoModel)", "outputs (AutoModel)", "state (AutoModelForCausalLM)", "behaviour: cache (sdpa)"]
    found = [Finding(name, None, name) for name in names]
    wrong = Finding("state (AutoModelForTokenClassification)", False, "other")
    folded = fold([*found, wrong])
    assert [each.name for each in folded] == ["state (2 Auto classes)", *names[1:2], names[3], wrong.name]
    assert [each.verdict for each in folded] == ["measured"] * 3 + ["failed"]


def test_a_sample_is_measured_and_a_fault_in_it_failed() -> None:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.*.mlp", wrappers.Scaled)
    records = [edit.document() for edit in edits]
    assert structure.in_use(model, records, Extent.of(model)).verdict == "proved"
    bounded = Extent(whole=False)
    sampled = structure.in_use(model, records, bounded)
    assert sampled.verdict == "measured" and "the first of each kind" in sampled.evidence
    assert structure.start({}, {}, promised=True).verdict == "measured"
    model.model.layers[0].forward = lambda hidden_states, **_: hidden_states  # never calls what it holds
    assert structure.in_use(model, records, bounded).verdict == "failed"


def test_a_sum_is_proved_when_every_changed_weight_was_compared() -> None:
    sampled = read_back.Comparison({"a.weight": sums.Off(0.5)})
    assert sampled.finding(["a.weight"]).verdict == "proved"
    finding = sampled.finding(["a.weight", "b.weight"])
    assert finding.verdict == "measured" and finding.evidence.startswith("1 of 2 changed tensors")
    for parts in ([0.5, float("nan")], [float("nan"), 0.5]):
        whole = sums.Off.of_all([sums.Off(units) for units in parts])
        assert read_back.Comparison({"a.weight": whole}).finding(["a.weight"]).verdict == "failed"
    sampled.found["b.weight"] = sums.Off(2.0)
    assert sampled.finding(["a.weight", "b.weight", "c.weight"]).verdict == "failed"


def test_parts_that_are_no_numbers_do_not_sum() -> None:
    assert gradients.parts_sum([{"loss": float("nan"), "weighted/model": 1.0}]).verdict == "failed"


def test_a_server_that_was_not_run_is_not_proved(trash_artifact: Path) -> None:
    found = {finding.name: finding for finding in check.check(trash_artifact).findings}
    assert found["rules of vLLM"].verdict == "measured"
    assert found["nothing was changed since it was written"].verdict == "proved"


def test_outputs_that_move_within_rounding_are_not_identical(trash_artifact: Path) -> None:
    from solidify.artifact import certificate

    parts = ("state", "attributes", "values")
    load = {
        "loading_info": {}, "meta": [], "sampled": False, "seconds": 0.1,
        **{kind: {"absent": [], "additional": [], "different": [], "equal": 3} for kind in parts},
        "outputs": {"short": {"equal": False, "distance": 1e-6, "scale": 1.0}},
    }  # fmt: skip
    assert certificate._judge_load("AutoModel", load, "torch 1 -> 2")[1].verdict == "measured"
    assert certificate._judge_load("AutoModel", load, "")[1].verdict == "failed"
    assert [f.verdict for f in certificate._judge_load("AutoModel", {**load, "outputs": {}}, "")] == [
        "proved",
        "not looked at",
    ]
    load["outputs"]["short"] = {"equal": True, "distance": 0.0, "scale": 1.0}
    assert [f.verdict for f in certificate._judge_load("AutoModel", load, "")] == ["proved", "proved"]
    assert {f.verdict for f in certificate._judge_load("AutoModel", {**load, "sampled": True}, "")} == {"measured"}


def test_gradients_of_no_step_and_of_one_example_prove_nothing() -> None:
    model = solidify.attach(pico.llama(), lora={"target_modules": ["**.q_proj"]})
    assert gradients.GradientWitness(model).finding().verdict == "not looked at"
    witness = gradients.GradientWitness(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    witness.steps, witness.seen = 1, {name: float("lora_B" in name) for name in names}
    assert witness.finding().verdict == "measured"  # LoRA's A: none yet
    witness.look_again({name: torch.ones(1) for name in names})
    assert witness.finding().verdict == "proved"
    witness.steps, witness.seen = 3, {name: float("lora_B" in name) for name in names}
    assert witness.finding().verdict == "failed"
