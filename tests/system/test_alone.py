"""Fresh processes: as users have them, and as forks, which tests have (`forks.py`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import forks
import pytest
from safetensors.torch import load_file, save_file

from solidify.artifact import certificate
from solidify.errors import ArtifactError
from solidify.system.alone import Alone

USUAL = {name: vars(Alone)[name] for name in forks.NAMES}  # read before any fixture replaces them


def findings(directory: Path) -> list[tuple[str, Any]]:
    return [(finding.name, finding.passed) for finding in certificate.witness(directory)]


def test_a_process_that_begins_anew_finds_what_a_fork_does(
    trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(trash_artifact, wrong)
    state = load_file(wrong / "model.safetensors")
    state[min(state)] += 1
    save_file(state, wrong / "model.safetensors", {"format": "pt"})
    in_forks = [findings(directory) for directory in (trash_artifact, wrong)]
    for name, method in USUAL.items():
        monkeypatch.setattr(Alone, name, method)
    assert [findings(directory) for directory in (trash_artifact, wrong)] == in_forks
    assert [all(passed is not False for _, passed in found) for found in in_forks] == [True, False]


@pytest.mark.parametrize("usual", [True, False], ids=["anew", "fork"])
def test_what_is_forbidden_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, usual: bool) -> None:
    if usual:
        for name, method in USUAL.items():
            monkeypatch.setattr(Alone, name, method)
    script = tmp_path / "script.py"
    script.write_text("import json, sys\nfor n in sys.argv[1:]:\n    sys.modules[n] = None\nimport peft\n")
    with Alone(script, certificate.FORBIDDEN) as process, pytest.raises(ArtifactError, match="import of peft halted"):
        process.ask({})
