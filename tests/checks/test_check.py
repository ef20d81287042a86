from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import solidify
from solidify.artifact import manifest
from solidify.errors import AdapterError, ArtifactError
from solidify.export import merge
from solidify.tuning.storage import find_base
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
    assert list(report.stages) == ["artifact", "adapter", "merged"]
    names = {finding.name for finding in report.stages["adapter"]}
    assert {"plain PEFT loads the same", "adapter off is the base", "the base is the recorded one"} <= names


def test_the_merged_model_is_an_artifact_with_one_more_line_in_its_lineage(whole: Path) -> None:
    record = manifest.read(whole / "merged", "artifact")
    assert [step["step"] for step in record.lineage] == ["base", "surgery", "merge"]
    assert record.code == manifest.read(whole / "artifact").code
    assert record.digest()["weights"] != manifest.read(whole / "artifact").digest()["weights"]


@pytest.mark.parametrize("part", ["artifact", "adapter", "merged"])
def test_one_changed_byte_is_found(whole: Path, copy_of: Callable[[Path], Path], part: str) -> None:
    directory = copy_of(whole)
    path = next((directory / part).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    report = solidify.check(directory / part)
    assert not report.passed
    assert "its digest differs" in report.failed[0].evidence


def test_an_adapter_whose_base_was_rebuilt_is_found(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(whole)
    adapter = json.loads((directory / "adapter" / manifest.NAME).read_text())
    adapter["base"]["path"] = str(directory / "merged")
    (directory / "adapter" / manifest.NAME).write_text(json.dumps(adapter))
    failed = {finding.name for finding in solidify.check(directory / "adapter").failed}
    assert failed == {"the base is the recorded one"}


def test_a_moved_run_still_finds_its_base(whole: Path, copy_of: Callable[[Path], Path]) -> None:
    directory = copy_of(whole)
    adapter = json.loads((directory / "adapter" / manifest.NAME).read_text())
    adapter["base"]["path"] = "/nowhere"
    assert find_base(manifest.Manifest(**adapter), directory / "adapter") == directory / "artifact"
    adapter["base"]["relative"] = "../gone"
    with pytest.raises(AdapterError, match=r"is not at /nowhere nor at .*gone; say where it is"):
        find_base(manifest.Manifest(**adapter), directory / "adapter")


def test_a_merge_never_writes_over_its_inputs(whole: Path) -> None:
    for name in ("adapter", "artifact"):
        with pytest.raises(ArtifactError, match="is an input of the merge"):
            merge(whole / "adapter", whole / name)


def test_what_is_none_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="was not made by solidify"):
        solidify.check(tmp_path)
