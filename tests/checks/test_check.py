from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import solidify
from solidify.adapter.storage import find_base
from solidify.artifact import manifest
from solidify.errors import AdapterError, ArtifactError
from solidify.export import merge
from training import awake


@pytest.fixture(scope="module")
def whole(trash_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output directory: artifact, adapter, merged model."""
    import shutil

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
