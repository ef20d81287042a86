"""A run that is interrupted says how to go on, a finished one is finished, and two recipes are not mixed up."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import typer
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import solidify
from solidify.artifact import certificate
from solidify.checks import check
from solidify.command import cli
from solidify.directory import manifest, ours, results
from solidify.errors import ArtifactError, CheckFailed, ObjectiveError, RecipeError
from solidify.findings import Finding, Report
from solidify.merging import export
from solidify.recipe import build_stage, dry_run, schema, stages, training
from solidify.recipe import models as models_of_recipes
from solidify.training import checkpoints


def document(**training: Any) -> dict[str, Any]:
    return {
        "base": {"model": "base"},
        "surgery": [{"replace": "model.layers.*.mlp", "expect": "LlamaMLP", "with": "wrappers.py:Scaled"}],
        "adapter": {"train": ["model.layers.*.mlp.scale"]},
        "objective": [{"loss": "model"}],
        "data": {"train": "train.txt", "max_length": 16},
        "training": {
            "max_steps": 2,
            "save_steps": 1,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            **training,
        },
    }


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, data and modules."""
    root = tmp_path_factory.mktemp("recipes")
    pico.llama(eos_token_id=2).save_pretrained(root / "base")
    words = {f"w{number}": number for number in range(128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", unk_token="w3")
    wrapped.save_pretrained(root / "base")
    (root / "train.txt").write_text(
        "\n".join(f"w{n} w{n + 1} w{n + 2} w{n + 3} w{n + 4} w{n + 5}" for n in range(5, 21))
    )
    shutil.copy(pico.HERE / "user_modules" / "wrappers.py", root)
    return root


def load(beside: Path, name: str, content: dict[str, Any]) -> schema.Recipe:
    (beside / name).write_text(yaml.safe_dump(content))
    return schema.load(beside / name)


@pytest.fixture(autouse=True)
def unwitnessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fresh process looks at what is built here."""
    pico.unwitnessed(monkeypatch)


@pytest.fixture(scope="module")
def trained(beside: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    made = load(beside, "a.yaml", document())
    with pytest.MonkeyPatch.context() as patch:
        pico.unwitnessed(patch)
        stages.run(made, output)
    return output


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "out"))


def end(*words: Any) -> tuple[int, str]:
    """Runs the command in this process; returns its exit code."""
    try:
        cli.app([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0), ""
    except Exception as error:
        return 2, str(error)
    return 0, ""


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    beside: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With every option that the command had: without --share, the whole would be aligned, without --copy linked."""
    load(beside, "a.yaml", document())
    for verb in ("run", "train", "heal"):
        monkeypatch.setattr(stages, verb, interrupted)
    given = ("--output", copied, "--set", "training.seed=1", "--set", "training.max_steps=3")
    more = {
        "run": ((), ("--copy", "--verbose")),
        "train": ((), ("--verbose",)),
        "heal": ((), ("--copy", "--share", "1/4", "--verbose")),
    }
    for verb, options in ((verb, options) for verb, each in more.items() for options in each):
        for resumes in ((), ("--resume",)):
            code, _ = end(verb, *options, beside / "a.yaml", *resumes, *given)
            out, err = capsys.readouterr()
            assert code == 130
            assert out == ""
            (line,) = err.strip().splitlines()
            assert line.startswith(
                "solidify: interrupted; kept: artifact, adapter, merged, checkpoints/checkpoint-2 in"
            )
            again = " ".join(map(str, ("solidify", verb, beside / "a.yaml", *given, "--resume", *options)))
            assert line.endswith(f"; go on with: {again}")
    monkeypatch.setattr("solidify.checks.check.check", interrupted)
    assert end("check", copied)[0] == 130
    assert capsys.readouterr().err == "solidify: interrupted; nothing half-written is left\n"


def test_ctrl_c_says_how_to_start_again_what_leaves_all_or_nothing(
    beside: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    load(beside, "a.yaml", document())
    monkeypatch.setattr(build_stage, "build", interrupted)
    monkeypatch.setattr("solidify.merging.export.merge", interrupted)
    merged = ("merge", copied / "adapter", "--output", tmp_path / "merged")
    for words in (
        ("build", beside / "a.yaml", "--output", tmp_path / "new", "--set", "training.seed=1", "--copy", "--verbose"),
        merged,
        (*merged, "--base", copied, "--copy", "--layout", "peft", "--trust-remote-code", "--verbose"),
    ):
        assert end(*words)[0] == 130
        again = " ".join(map(str, ("solidify", *words)))
        told = f"solidify: interrupted; nothing half-written is left; start it again with: {again}"
        assert capsys.readouterr().err.splitlines()[-1] == told


def test_the_command_that_is_printed_is_the_one_that_was_given(
    beside: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever options a verb has, now or later: what was said of each is said again."""
    load(beside, "a.yaml", document())
    values = {"set_": "training.seed=1", "share": "1/4"}
    monkeypatch.setattr("solidify.merging.export.merge", interrupted)
    monkeypatch.setattr(build_stage, "build_alone", interrupted)
    for name in ("run", "train", "heal"):
        monkeypatch.setattr(stages, name, interrupted)
    verbs: Any = typer.main.get_command(cli.app)
    for verb, subject in (*((v, beside / "a.yaml") for v in ("run", "build", "train", "heal")), ("merge", copied)):
        options = [p for p in verbs.commands[verb].params if p.param_type_name == "option" and p.name != "help"]
        assert len(options) >= 4
        words = []
        for option in options:
            words += [max(option.opts, key=len), *([] if option.is_flag else [values.get(option.name, str(copied))])]
        assert end(verb, subject, *words)[0] == 130, verb
        again = " ".join(map(str, ("solidify", verb, subject, *words)))
        assert capsys.readouterr().err.splitlines()[-1].endswith(f" with: {again}")


def test_a_training_that_was_stopped_before_its_adapter_was_saved_is_finished_by_resume(
    beside: Path, copied: Path
) -> None:
    """Nothing is left to be trained: the last checkpoint is of the last step."""
    load(beside, "a.yaml", document())
    before = manifest.read(copied / "adapter").tensors
    shutil.rmtree(copied / "adapter")
    shutil.rmtree(copied / "merged")
    assert end("train", beside / "a.yaml", "--output", copied, "--resume") == (0, "")
    assert manifest.read(copied / "adapter").tensors == before


def test_a_finished_training_is_finished(beside: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(beside, "a.yaml", document())
    before = (copied / "adapter").stat().st_ino
    for _ in range(2):
        code, words = end("train", beside / "a.yaml", "--output", copied, "--resume")
        assert (code, words) == (0, "")
        out, err = capsys.readouterr()
        assert "trained before" in out
        assert "The training is finished: " in err and "nothing is repeated" in err
    assert (copied / "adapter").stat().st_ino == before


SUMMED = """
def summed(logits, labels):
    kept = labels[:, 1:] != -100
    return (logits[:, :-1].logsumexp(-1) * kept).sum()
"""


@pytest.mark.parametrize("honest", [False, True])
def test_what_failed_in_training_is_not_forgotten(beside: Path, tmp_path: Path, honest: bool) -> None:
    """A sum that passes as a mean: its gradient depends on the split, and no later command says otherwise."""
    (beside / "losses.py").write_text(SUMMED.replace(".sum()", ".sum() / kept.sum()") if honest else SUMMED)
    objective = [{"loss": "model"}, {"loss": "losses.py:summed", "weight": 0.1}]
    made = load(beside, "summed.yaml", {**document(gradient_accumulation_steps=2), "objective": objective})
    output = tmp_path / "out"

    def failed(again: Any) -> list[str]:
        try:
            return [finding.name for finding in again().failed]
        except CheckFailed as error:
            return [fault.partition(": ")[0] for fault in error.faults]

    wrong = [] if honest else ["gradient does not depend on accumulation"]
    assert failed(lambda: stages.run(made, output)) == wrong
    assert failed(lambda: stages.run(made, output, resume=True)) == wrong
    assert failed(lambda: stages.train(made, output, resume=True)) == wrong
    said = check.check(output)
    assert {finding.name for finding in said.failed} == (set() if honest else {check.MADE})
    assert all("accumulation" in finding.evidence for finding in said.failed)
    again = export.merge(output / "adapter", tmp_path / "merged")
    assert [finding.name for finding in again.findings if finding.passed is False] == wrong
    assert manifest.read(tmp_path / "merged").failed == manifest.read(output / "adapter").failed
    code, _ = end("merge", output / "adapter", "-o", tmp_path / "once more")
    assert code == (0 if honest else 2)


@pytest.mark.slow
@pytest.mark.parametrize("honest", [False, True])
def test_what_failed_in_surgery_is_not_forgotten(
    beside: Path, tmp_path: Path, honest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, output = load(beside, "a.yaml", document()), tmp_path / "out"
    wrong = Finding("start identical", honest, "logits differ from the base by up to 1")
    with monkeypatch.context() as patch:
        patch.setattr(build_stage.structure, "start", lambda *_, **__: wrong)
        report = stages.build(made, output)
    expected = [] if honest else [wrong]
    assert report.failed == expected
    assert stages.build(made, output, resume=True).failed == expected
    assert stages.train(made, output).failed == expected, "also where the training itself is right"
    assert check.check(output).passed is honest


@pytest.mark.parametrize("honest", [False, True])
def test_what_a_fresh_process_finds_later_is_not_forgotten(
    beside: Path, tmp_path: Path, honest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, output = load(beside, "a.yaml", document()), tmp_path / "out"
    assert not stages.build(made, output).failed
    found = Finding("outputs identical", honest, "short differs by up to 1")
    with monkeypatch.context() as patch:
        patch.setattr(certificate, "witness", lambda *_: [found])
        assert stages.build(made, output, resume=True).failed == ([] if honest else [found])
    assert stages.train(made, output).failed == ([] if honest else [found])
    assert manifest.read(output / "artifact").failed == ([] if honest else [found.document()])


def test_two_recipes_are_not_mixed(beside: Path, copied: Path) -> None:
    other = document()
    other["surgery"][0]["replace"] = "model.layers.0.mlp"
    other["adapter"]["train"] = ["model.layers.0.mlp.scale"]
    load(beside, "b.yaml", other)
    before = {name: manifest.read(copied / name) for name in ("artifact", "adapter", "merged")}
    for verb in ("build", "train"):
        code, words = end(verb, beside / "b.yaml", "--output", copied)
        assert code == 2
        assert "holds results of another recipe" in words
    with pytest.raises(ArtifactError, match="holds results of another recipe"):
        solidify.build(beside / "b.yaml", directory=copied)
    assert {name: manifest.read(copied / name) for name in before} == before
    assert results.together(copied).passed


def test_a_run_over_another_recipes_results_says_so_and_leaves_its_own(
    beside: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = document()
    other["surgery"][0]["replace"] = "model.layers.0.mlp"
    for section in ("adapter", "objective", "data", "training"):
        del other[section]
    stages.run(load(beside, "b.yaml", other), copied)
    assert "holds results of another recipe" in capsys.readouterr().err.replace("\n", " ")
    assert {path.name for path in copied.iterdir()} == {"artifact", "checkpoints", "report.json", "report.html"}


@pytest.mark.slow
@pytest.mark.parametrize("part", ["artifact", "adapter", "merged"])
def test_check_finds_results_of_two_recipes(
    beside: Path, copied: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The honest twin: the same directory before."""
    monkeypatch.setattr(check, "_check_one", lambda *_: [Finding("each for itself", True, "is well")])
    assert check.check(copied).passed
    stages.run(load(beside, "b.yaml", document(learning_rate=0.02, seed=7)), tmp_path / "other")
    if part == "artifact":
        other = document()
        other["surgery"][0]["replace"] = "model.layers.0.mlp"
        stages.build(load(beside, "c.yaml", other), tmp_path / "other")
    shutil.rmtree(copied / part)
    shutil.copytree(tmp_path / "other" / part, copied / part)
    found = check.check(copied)
    assert [finding.name for finding in found.failed] == [results.TOGETHER]


def test_a_failed_run_keeps_its_words(beside: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops a run is in its report, which appears whole."""

    def broken(*_: Any, **__: Any) -> None:
        raise ArtifactError("no")

    monkeypatch.setattr(stages, "merge", broken)
    with pytest.raises(ArtifactError):
        stages.run(load(beside, "a.yaml", document(seed=3)), copied)
    assert Report.read(copied / "report.json")["finished"] is False
    stages.writing.refuse_foreign_run(copied)


def test_only_a_checkpoint_that_reached_the_disk_is_gone_on_from(copied: Path) -> None:
    """A power cut leaves names without their content; a kill leaves no list of what was written."""
    where = copied / "checkpoints"
    newest, before = where / "checkpoint-2", where / "checkpoint-1"
    fingerprint = checkpoints.read(newest)["fingerprint"]
    assert checkpoints.last(where, fingerprint, 1) == newest
    weights = newest / "adapter_model.safetensors"
    content = weights.read_bytes()
    for spoilt in (content[:10], bytes([*content[:-1], content[-1] ^ 1])):
        weights.write_bytes(spoilt)
        assert checkpoints.last(where, fingerprint, 1) == before
    weights.write_bytes(content)
    assert checkpoints.last(where, fingerprint, 1) == newest
    (newest / checkpoints.NAME).write_bytes(pickle.dumps(print))
    checkpoints.seal(newest)
    assert checkpoints.last(where, fingerprint, 1) == before
    with pytest.raises(ObjectiveError, match=r"objective.pt is not what a trainer of solidify writes"):
        checkpoints.read(newest)
    (before / ours.LISTING).unlink()
    assert checkpoints.last(where, fingerprint, 1) is None


def test_an_older_checkpoint_goes_when_the_newer_is_on_the_disk(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed: list[list[str]] = []
    seal = checkpoints.seal

    def watched(directory: Path) -> None:
        sealed.append(sorted(path.name for path in directory.parent.iterdir()))
        seal(directory)

    monkeypatch.setattr(checkpoints, "seal", watched)
    stages.run(load(beside, "d.yaml", document(save_total_limit=1)), tmp_path / "out")
    assert sealed == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_checkpoints_of_others_are_not_removed(beside: Path, tmp_path: Path) -> None:
    """A training removes old checkpoints where its output_dir says: not those of another program."""
    theirs = tmp_path / "theirs" / "checkpoint-7"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("weeks of training")
    made = load(beside, "e.yaml", document(save_total_limit=1, output_dir=str(theirs.parent)))
    with pytest.raises(ArtifactError, match=r"did not make .it holds checkpoint-7"):
        stages.run(made, tmp_path / "out")
    assert (theirs / "model.safetensors").read_text() == "weeks of training"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["out", "out/steps", "out/artifact", "out/a/b", ".", "x/../out/steps", "elsewhere"])
def test_checkpoints_and_a_run_do_not_lie_in_each_other(beside: Path, tmp_path: Path, where: str) -> None:
    """Before anything is written: a run whose directory holds more than its parts could not be checked."""
    made = load(beside, "f.yaml", document(output_dir=str(tmp_path / where)))
    if where == "elsewhere":
        stages._refuse_foreign(made, tmp_path / "out")
        return
    with pytest.raises(ArtifactError, match=r"neither may lie in the other; leave out training.output_dir"):
        stages.run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_the_training_names_runs_no_code(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL reads it without a word about what is permitted; transformers would ask at the terminal."""
    evil, canary = tmp_path / "evil", tmp_path / "canary"
    shutil.copytree(beside / "base", evil)
    leading = {"AutoTokenizer": ["payload.Evil", "payload.Evil"]}
    (evil / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": leading}))
    (evil / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "payload.Evil"}}))
    (evil / "payload.py").write_text(f"open({str(canary)!r}, 'w')\n")
    asked_of: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked_of.append(prompt) or "y")
    made = load(beside, "g.yaml", document(chat_template_path=str(evil)))
    with pytest.raises(RecipeError, match="chat_template_path"):
        stages.run(made, tmp_path / "out")
    assert not canary.exists() and not asked_of


STRANGE = {
    "a word for a list": {"label_names": "labels"},
    "a number for words": {"optim_args": 2.5},
    "a list for a mapping": {"lr_scheduler_kwargs": []},
    "a fraction of a row": {"per_device_train_batch_size": 1e5},
    "an object": {"parallelism_config": "x"},
    "nobody to report to": {"report_to": "x"},
    "an unknown argument": {"lr_scheduler_kwargs": {"a": 1}},
    "an unknown loss": {"loss_type": "x"},
    "an unknown level": {"log_level": "x"},
    "an unknown token": {"eos_token": "x"},
    "no pair": {"optim_args": "x"},
}


@pytest.mark.parametrize("strange", STRANGE)
def test_a_training_section_that_no_trainer_takes_ends_in_a_sentence(
    beside: Path, tmp_path: Path, strange: str
) -> None:
    made = load(beside, "h.yaml", document(**STRANGE[strange]))
    with pytest.raises(
        (RecipeError, ObjectiveError), match=r"does not fit: training\.|does not take the training section|stopped"
    ):
        stages.run(made, tmp_path / "out")


def test_no_card_of_a_run_names_where_it_ran(beside: Path, trained: Path) -> None:
    found = sorted(trained.rglob("README.md"))
    assert {path.parent.name for path in found} >= {"artifact", "adapter", "merged", "checkpoint-2"}
    for path in found:
        assert str(beside) not in path.read_text() and str(trained) not in path.read_text(), path


def test_what_failed_follows_a_model_wherever_it_goes(trash_artifact: Path, tmp_path: Path) -> None:
    """Loaded and saved again, as the base of another artifact, merged into a plain model and changed: it is kept."""
    wrong = Finding("a check", False, "it does not hold")
    tuned = solidify.attach(solidify.load(trash_artifact), lora={"r": 2, "target_modules": ["**.q_proj"]})
    first = solidify.save_adapter(tuned, tmp_path / "first", found=[wrong])
    again = solidify.load_adapter(solidify.load(trash_artifact), first, trainable=True)
    second = solidify.save_adapter(again, tmp_path / "second")
    assert manifest.read(second).failed == [wrong.document()]
    base = Path(shutil.copytree(trash_artifact, tmp_path / "base"))
    results.keep_failures(base, [wrong])
    beside = solidify.attach(solidify.load(base), lora={"r": 2, "target_modules": ["**.q_proj"]})
    with torch.no_grad():
        for name, parameter in beside.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    third = solidify.save_adapter(beside, tmp_path / "third")
    assert manifest.read(third).failed == [wrong.document()]
    assert check.MADE in {finding.name for finding in check.check(third).failed}
    merged = export.merge(third, tmp_path / "merged")
    assert merged.manifest.failed == [wrong.document()], "once, though base and adapter keep it"


def test_what_failed_of_a_plain_model_is_kept_by_what_is_built_on_it(beside: Path, tmp_path: Path) -> None:
    plain = {**document(), "surgery": [], "adapter": {"train": ["model.norm"]}}
    del plain["objective"]
    made = load(beside, "plain.yaml", plain)
    build_stage.build_alone(made, tmp_path / "run")
    wrong = Finding("a check", False, "it does not hold")
    results.keep_failures(tmp_path / "run" / "artifact", [wrong])
    for name, surgery in (("changed", document()["surgery"]), ("copied", [])):
        other = {**document(), "base": {"model": str(tmp_path / "run" / "artifact")}, "surgery": surgery}
        other["adapter"] = {"train": ["model.norm"]}
        report = stages.build(load(beside, f"{name}.yaml", other), tmp_path / name)
        assert manifest.read(tmp_path / name / "artifact").failed == [wrong.document()], name
        assert wrong in report.failed, name


def test_an_adapter_that_was_not_loaded_again_is_not_finished(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends a training after its adapter got its name: --resume looks again, and nothing calls it finished."""
    made, output = load(beside, "a.yaml", document()), tmp_path / "out"
    stages.build(made, output)
    with monkeypatch.context() as patch:
        patch.setattr(training.storage, "load", lambda *_, **__: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            stages.train(made, output)
    assert check.check(output).failed[0].name == check.MADE
    again = stages.train(made, output, resume=True)
    assert again.passed and "trained before" not in {finding.name for finding in again.findings}
    assert manifest.read(output / "adapter").failed == [] and check.check(output).passed
    assert stages.train(made, output, resume=True).findings[-1].name == "trained before"


def test_resume_builds_anew_with_other_initial_weights(beside: Path, tmp_path: Path) -> None:
    content = {key: value for key, value in document().items() if key in ("base", "surgery")}
    content["surgery"] = [{**content["surgery"][0], "weights": "scale.safetensors"}]
    weights = {"scale": torch.ones(1)}
    save_file(weights, beside / "scale.safetensors")
    recipe = load(beside, "weights.yaml", content)
    stages.run(recipe, tmp_path / "out")
    assert models_of_recipes.is_built(recipe, tmp_path / "out" / "artifact")
    save_file(weights, beside / "scale.safetensors", metadata={"edited": "yes"})
    assert not models_of_recipes.is_built(recipe, tmp_path / "out" / "artifact")
    stages.run(recipe, tmp_path / "out", resume=True)
    assert models_of_recipes.is_built(recipe, tmp_path / "out" / "artifact")


def test_held_out_rows_tell_what_surgery_alone_does(beside: Path, tmp_path: Path) -> None:
    content = {
        "base": {"model": "base"},
        "surgery": [{"remove": "model.layers.1", "expect": "LlamaDecoderLayer"}],
        "data": {"train": "train.txt", "eval": "train.txt", "max_length": 16},
    }
    report = stages.run(load(beside, "alone.yaml", content), tmp_path / "out")
    before, after = (report.measured[f"heldout_loss_{which}"] for which in ("base", "artifact"))
    assert before > 0 and after > 0 and before != after
    kept = json.loads((tmp_path / "out" / "report.json").read_text())["measured"]
    assert (kept["heldout_loss_base"], kept["heldout_loss_artifact"]) == (before, after)
    assert f"before surgery: {before:.4g}" in (tmp_path / "out" / "report.html").read_text()


def test_what_cannot_be_measured_is_said_in_the_plan(beside: Path) -> None:
    (beside / "pairs.jsonl").write_text('{"prompt": "w5", "chosen": "w6", "rejected": "w7"}\n')
    content = {
        "base": {"model": "base"},
        "surgery": [{"remove": "model.layers.1", "expect": "LlamaDecoderLayer"}],
        "data": {"train": "pairs.jsonl", "eval": "pairs.jsonl", "max_length": 16},
    }
    (note,) = dry_run.plan(load(beside, "pairs.yaml", content)).notes
    assert note.startswith("data.eval is not measured: data.eval: measuring reads the rows")
