"""The first pass of a process may differ where kernels settle as they are used; a model that differs is refused."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest

import solidify
from solidify.errors import ArtifactError

import passes  # isort: skip


def test_a_first_pass_that_is_off_is_told_and_not_held_against_the_model(tmp_path: Path) -> None:
    model = pico.llama()
    edits = solidify.replace(model, "**.mlp", passes.FirstOfProcess)
    artifact = solidify.build(model, edits, tmp_path / "out")
    found = {finding.name: finding for finding in artifact.findings if finding.name.startswith("outputs")}
    odd = found.pop("outputs identical (AutoModel)")
    assert odd.verdict == "measured"  # all passes but one are no proof
    assert all(finding.passed for finding in found.values())
    first = odd.evidence
    assert first.startswith("3 cases bit-identical in fresh loads; an earlier pass (long) differed by ")
    assert first.endswith(", later ones did not")
    assert {finding.evidence for finding in found.values()} == {"3 cases bit-identical"}


@pytest.mark.parametrize(
    "name", ["FirstOfEach", "Chance", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Twice", "Other"))]
)
def test_what_differs_by_itself_is_refused(name: str, tmp_path: Path) -> None:
    model = pico.llama()
    edits = solidify.replace(model, "**.mlp", getattr(passes, name))
    with pytest.raises(ArtifactError, match=r"outputs identical \(Auto.*\): .*(short|long|padded).* differ"):
        solidify.build(model, edits, tmp_path / "out")
    assert not (tmp_path / "out").exists()
