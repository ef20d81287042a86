"""What a module holds is there again after a reload, or the build refuses and says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pico
import pytest

import solidify
from solidify.artifact import certificate
from solidify.artifact import solidify as solidification
from solidify.errors import ArtifactError

import states  # isort: skip

PRESERVED = ("PersistentBuffer", "OwnInitialisation", "PlainNumbers")
REFUSED = {
    "LateBuffer": "must be a parameter or a persistent buffer",
    "TensorAttribute": "must be a parameter or a persistent buffer",
    "NumberFromTensor": "keep it in a persistent buffer, or pass it in `arguments`",
    "AdoptedNumber": "keep it in a persistent buffer, or pass it in `arguments`",
    "RandomNumber": "keep it in a persistent buffer, or pass it in `arguments`",
}


def test_state_that_can_be_kept_is_kept(tmp_path: Path) -> None:
    directories = []
    for name in PRESERVED:
        model = pico.llama()
        edits = solidify.replace(model, "**.mlp", getattr(states, name))
        solidification.assemble(model, edits, tmp_path / name)
        directories.append(tmp_path / name)
    for directory, findings in certificate.witness_all(directories).items():
        assert all(finding.passed for finding in findings), (directory, findings)
        assert sum(not finding.name.startswith("behaviour") for finding in findings) == 10


QUICK = ("TensorAttribute", "NumberFromTensor")  # of each remedy one; a fresh process each takes its time


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in REFUSED]
)
def test_state_that_cannot_be_kept_is_refused_with_the_remedy(tmp_path: Path, name: str) -> None:
    model = pico.llama()
    edits = solidify.replace(model, "**.mlp", getattr(states, name), declares={"half_precision": False})
    with pytest.raises(ArtifactError) as caught:
        solidify.build(model, edits, tmp_path / "out")
    assert REFUSED[name] in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert sys.modules["states"] is states
