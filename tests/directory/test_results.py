"""Whether a part of a run is whole is one question, with one answer for all stages that go on from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest

import solidify
from solidify.directory import results
from solidify.modules.low_rank import LowRank


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.0.mlp.up_proj", LowRank, arguments={"rank": 4})
    return pico.artifact(model, edits, tmp_path_factory.mktemp("run") / "artifact", recipe={"base": 1})


def test_a_whole_part_gives_its_manifest(made: Path) -> None:
    record = results.find_whole(made, "artifact")
    assert record is not None and record.kind == "artifact"
    assert results.is_made_by(made, {"base": 1}, "artifact")
    assert not results.is_made_by(made, {"base": 2}, "artifact")
    assert not results.is_made_by(made, {"base": 1}, "adapter")


def change_weight(directory: Path) -> None:
    path = next(directory.glob("*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FAULTS: dict[str, Callable[[Path], object]] = {
    "one bit of a weight": change_weight,
    "a file is missing": lambda d: (d / "config.json").unlink(),
    "a file is too much": lambda d: (d / "stranger.py").write_text(""),
    "the manifest is cut": lambda d: (d / "solidify.json").write_text("{"),
    "there is none": shutil.rmtree,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_whole_gives_none(made: Path, tmp_path: Path, fault: str) -> None:
    broken = shutil.copytree(made, tmp_path / "artifact")
    FAULTS[fault](broken)
    assert results.find_whole(broken) is None
    assert not results.is_made_by(broken, {"base": 1}, "artifact")


def test_a_merged_model_is_asked_for_in_its_run(made: Path, tmp_path: Path) -> None:
    assert not results.is_merged(tmp_path)
    shutil.copytree(made, tmp_path / "merged")
    assert results.is_merged(tmp_path)
