from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import solidify
from solidify.adapter.storage import find_base
from solidify.directory import manifest, ours
from solidify.errors import AdapterError, ArtifactError
from solidify.findings import Finding, Report
from solidify.merging.export import merge
from solidify.system.alone import Alone
from solidify.training import checkpoints
from training import awake


@pytest.fixture(scope="module")
def whole(trash_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output directory: artifact, adapter, merged model."""
    directory = tmp_path_factory.mktemp("run") / "out"
    shutil.copytree(trash_artifact, directory / "artifact")
    solidify.save_adapter(awake(directory / "artifact"), directory / "adapter")
    merge(directory / "adapter", directory / "merged")
    return directory


def test_a_whole_run_holds(whole: Path) -> None:
    report = solidify.check(whole)
    assert report.passed
    assert list(report.stages) == ["artifact", "adapter", "merged", "run"]
    names = {finding.name for finding in report.stages["adapter"]}
    assert {"plain PEFT loads the same", "adapter off is the base", "the base is the recorded one"} <= names


CLOSED = "the run holds what was written"


@pytest.fixture(scope="module")
def finished(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a checkpoint, a report and its page, as a run leaves them."""
    directory = Path(shutil.copytree(whole, tmp_path_factory.mktemp("finished") / "out"))
    checkpoint = directory / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "objective.pt").write_text("x")
    checkpoints.seal(checkpoint)
    reported(directory, "the page")
    return directory


def reported(directory: Path, page: str, **more: object) -> None:
    (directory / "report.html").write_text(page)
    report = Report(str(directory))
    report.add("build", [Finding("a promise", True, page)])
    report.write(directory / "report.json", files=ours.page_digests(directory), finished=True, **more)


def other_report(directory: Path) -> None:
    """Puts the page and the report of another run there: each as it was written, and of another recipe."""
    reported(directory, "another", recipe={"base": {"model": "other"}, "surgery": []})
    record = manifest.read(directory / "artifact")
    replace(record, recipe={"base": {"model": "this"}, "surgery": []}).write(directory / "artifact")


def appended(path: Path, text: str = "x") -> None:
    with path.open("a") as file:
        file.write(text)


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a stray file": (lambda d: (d / "stray.py").write_text("x"), "stray.py is not part of a run"),
    "a stray directory": (lambda d: (d / "more").mkdir(), "more is not part of a run"),
    "a name in other letters": (lambda d: (d / "Artifact").mkdir(), "Artifact is not part of a run"),
    "a hidden directory of another": (lambda d: (d / ".mine.partial-1").mkdir(), "mine.partial-1 is not part"),
    "a cache that holds more": (lambda d: (d / ".cache" / "more").mkdir(parents=True), ".cache is not part of a run"),
    "a link": (lambda d: (d / "link").symlink_to("artifact"), "link is a link"),
    "a link for a part": (
        lambda d: ((d / "merged").rename(d.parent / "away"), (d / "merged").symlink_to(d.parent / "away")),
        "merged is a link",
    ),
    "a pipe": (lambda d: os.mkfifo(d / "pipe"), "pipe is not part of a run"),
    "a part that is a file": (
        lambda d: (shutil.rmtree(d / "merged"), (d / "merged").write_text("x")),
        "merged is not a directory",
    ),
    "a part without a manifest": (
        lambda d: (d / "merged" / "solidify.json").unlink(),
        "merged has no solidify.json, but README.md",
    ),
    "a part of another kind": (
        lambda d: (shutil.rmtree(d / "merged"), shutil.copytree(d / "adapter", d / "merged")),
        "merged holds an adapter",
    ),
    "a stray checkpoint": (lambda d: (d / "checkpoints" / "mine").mkdir(), "checkpoints mine is not a checkpoint"),
    "an edited report": (lambda d: edited(d / "report.json", "a promise", "more"), "report.json is not the report"),
    "a report with a line more": (lambda d: appended(d / "report.json", "x"), "report.json is not the report"),
    "no report": (lambda d: (d / "report.json").unlink(), "report.html is not the page that a run wrote"),
    "a pipe for the report": (
        lambda d: ((d / "report.json").unlink(), os.mkfifo(d / "report.json")),
        "report.json is not the report",
    ),
    "an edited page": (lambda d: appended(d / "report.html"), "report.html is not the page that a run wrote"),
    "a swapped page": (lambda d: (d / "report.html").write_text("of another run"), "report.html is not the page"),
    "a changed byte of a checkpoint": (
        lambda d: (d / "checkpoints" / "checkpoint-2" / "objective.pt").write_text("y"),
        "checkpoint-2 lacks objective.pt as the trainer wrote it",
    ),
    "no page": (lambda d: (d / "report.html").unlink(), "report.html is missing, which report.json lists"),
}


def edited(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("strange", STRANGE)
def test_what_a_run_did_not_write_fails_its_check_before_any_code_runs(
    finished: Path, copy_of: Callable[[Path], Path], strange: str
) -> None:
    directory = copy_of(finished)
    spoil, words = STRANGE[strange]
    spoil(directory)
    report = solidify.check(directory)
    (found,) = report.failed
    assert found.name == CLOSED and words in found.evidence
    looked = {"nothing was changed since it was written", "its signature holds", "the results belong together", CLOSED}
    assert {finding.name for finding in report.findings} <= looked


HONEST: dict[str, Callable[[Path], object]] = {
    "a whole run": lambda d: None,
    "no report yet": lambda d: ((d / "report.json").unlink(), (d / "report.html").unlink()),
    "parts only": lambda d: [
        (d / "report.json").unlink(),
        (d / "report.html").unlink(),
        shutil.rmtree(d / "checkpoints"),
    ],
    "a build alone": lambda d: [shutil.rmtree(d / name) for name in ("adapter", "merged", "checkpoints")],
    "a part that is empty still": lambda d: (shutil.rmtree(d / "merged"), (d / "merged").mkdir()),
    "a report that was begun": lambda d: (
        (d / "report.html").unlink(),
        Report(str(d)).write(d / "report.json", finished=False, files={}),
    ),
    "what version control leaves": lambda d: ((d / ".git").mkdir(), (d / ".gitignore").write_text("*")),
    "what the hub's client leaves": lambda d: (d / ".cache" / "huggingface").mkdir(parents=True),
    "what a stopped run left": lambda d: (d / ".merged.partial-999999").mkdir(),
    "what tools leave in a part": lambda d: (d / "adapter" / ".gitattributes").write_text("x"),
}


@pytest.mark.parametrize("honest", HONEST)
def test_what_a_run_or_a_tool_leaves_is_no_fault(finished: Path, copy_of: Callable[[Path], Path], honest: str) -> None:
    directory = copy_of(finished)
    HONEST[honest](directory)
    assert ours.unlike_a_run(directory) == []


def test_a_finished_run_holds(finished: Path, copy_of: Callable[[Path], Path]) -> None:
    """With all that it wrote, and moved elsewhere; the build alone, to be quick."""
    directory = copy_of(finished)
    for name in ("adapter", "merged"):
        shutil.rmtree(directory / name)
    report = solidify.check(directory)
    assert report.passed
    assert [finding.name for finding in report.stages["run"]] == [CLOSED, "the results belong together"]
    held = "artifact, checkpoints, report.json, report.html, and nothing else (a report by a digest of its own)"
    assert report.stages["run"][0].evidence == held


def test_the_report_of_another_run_does_not_belong_to_it(finished: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(finished)
    for name in ("adapter", "merged"):
        shutil.rmtree(directory / name)
    other_report(directory)
    (found,) = solidify.check(directory).failed
    assert found.name == "the results belong together"
    assert "another recipe than the one of the report" in found.evidence


def test_the_merged_model_is_an_artifact_with_one_more_line_in_its_lineage(whole: Path) -> None:
    record = manifest.read(whole / "merged", "artifact")
    assert [step["step"] for step in record.lineage] == ["base", "surgery", "merge"]
    assert record.code == manifest.read(whole / "artifact").code
    assert record.digest()["weights"] != manifest.read(whole / "artifact").digest()["weights"]


@pytest.mark.parametrize("part", ["artifact", "adapter", "merged"])
def test_one_changed_byte_in_any_file_is_found(whole: Path, copy_of: Callable[[Path], Path], part: str) -> None:
    """At the start, in the middle and at the end of every file; nothing of what was changed is run."""
    directory = copy_of(whole) / part
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > (2 if part == "adapter" else 8)
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            assert not found_intact(directory), f"{path.name}, byte {place}"
            path.write_bytes(content)
    assert found_intact(directory)


def found_intact(directory: Path) -> bool:
    try:
        return not manifest.faults(directory, manifest.read(directory))
    except ArtifactError:
        return False


def test_a_changed_directory_fails_its_check_before_any_code_runs(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(whole) / "artifact"
    (directory / "trashcan_moe.py").write_text("raise SystemExit('this must not run')\n")
    report = solidify.check(directory)
    assert not report.passed
    assert [finding.name for finding in report.findings] == ["nothing was changed since it was written"]
    assert "its digest differs" in report.failed[0].evidence


def test_a_model_card_may_be_edited(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    """`check` says so; the model still loads."""
    directory = copy_of(whole) / "artifact"
    (directory / "README.md").write_text("# Mine\n")
    assert "README.md is not the file that was written" in solidify.check(directory).failed[0].evidence
    assert solidify.load(directory) is not None


def test_an_adapter_whose_base_was_rebuilt_is_found(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(whole)
    record = manifest.read(directory / "adapter")
    replace(record, base={**record.base, "path": str(directory / "merged")}).write(directory / "adapter")
    failed = {finding.name for finding in solidify.check(directory / "adapter").failed}
    assert failed == {"the base is the recorded one"}


def test_a_moved_run_still_finds_its_base(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(whole)
    record = manifest.read(directory / "adapter")
    record = replace(record, base={**record.base, "path": "/nowhere"})
    assert find_base(record, directory / "adapter") == directory / "artifact"
    record = replace(record, base={**record.base, "relative": "../gone"})
    with pytest.raises(AdapterError, match=r"is not at /nowhere nor at .*gone; say where it is"):
        find_base(record, directory / "adapter")


def test_a_merge_never_writes_over_its_inputs(whole: Path) -> None:
    for name in ("adapter", "artifact"):
        with pytest.raises(ArtifactError, match="is an input of the merge"):
            merge(whole / "adapter", whole / name)


def test_what_is_none_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was not made by solidify"):
        solidify.check(tmp_path)


@pytest.mark.slow
def test_a_stray_file_in_a_part_fails_the_check_of_the_run(finished: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(finished)
    (directory / "adapter" / "stray.py").write_text("x")
    report = solidify.check(directory)
    assert any("stray.py" in finding.evidence for finding in report.failed)


@pytest.mark.slow
def test_the_adapter_of_a_copied_run_is_tried_on_the_copy(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    """The manifest says where the base stood, and there it still stands; the run that is checked is another."""
    directory = copy_of(whole)
    report = solidify.check(directory)
    assert report.passed
    (fit,) = [finding for finding in report.stages["adapter"] if finding.name == "the base is the recorded one"]
    assert fit.evidence == f"digests of {directory / 'artifact'} match"


def test_an_edited_report_does_not_make_its_page_wrong(finished: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(finished)
    edited(directory / "report.json", "a promise", "more")
    (found,) = solidify.check(directory).failed
    assert "report.json is not the report" in found.evidence and "report.html" not in found.evidence


@pytest.mark.slow
def test_an_adapter_that_is_exchanged_after_it_was_compared_is_noticed(
    whole: Path, copy_of: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one, whole by itself, stands in its place when the fresh process reads it."""
    directory, other = copy_of(whole / "adapter", "adapter"), copy_of(whole / "adapter", "other")  # type: ignore[call-arg]
    record = manifest.read(other)
    replace(record, lineage=[*record.lineage, {"step": "another"}]).write(other)
    ask = Alone.ask

    def ask_later(process: Alone, request: dict[str, Any]) -> dict[str, Any]:
        directory.rename(directory.with_name("away"))
        other.rename(directory)
        return ask(process, request)

    assert solidify.check(directory, base=whole / "artifact").passed
    monkeypatch.setattr(Alone, "ask", ask_later)
    report = solidify.check(directory, base=whole / "artifact")
    assert ["has been replaced by another since" in finding.evidence for finding in report.failed] == [True]


@pytest.mark.parametrize("other", ["artifact", "adapter"])
def test_a_directory_that_becomes_another_kind_while_it_is_checked_is_refused(
    whole: Path, copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """By its first manifest nothing of it would be run."""
    directory = copy_of(whole / other, other)
    read = manifest.read
    seen: list[Path] = []

    def read_otherwise(path: Path, *kinds: str, **options: Any) -> Any:
        seen.append(path)
        found = read(path, *kinds, **options)
        return replace(found, kind="stock") if len(seen) == 2 else found  # what starts the process

    monkeypatch.setattr(manifest, "read", read_otherwise)
    with pytest.raises(ArtifactError, match="was replaced while it was checked: it was of kind stock"):
        solidify.check(directory, base=whole / "artifact")
