"""Is a form what the artifact is: a fresh process, without solidify and PEFT, loads both and compares all they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solidify.artifact import fresh
from solidify.findings import Finding
from solidify.system.alone import Alone
from solidify.weights import checkpoint, format
from solidify.weights.format import TensorSource

_SCRIPT = Path(__file__).with_name("compared_alone.py")


@dataclass(frozen=True)
class Answer:
    """What the process found: how many tensors there are and which differ, and how far outputs are apart, by case.

    `outputs` is None where nothing was to be run; `error` says why the models do not run.
    """

    tensors: int
    faults: list[str]
    outputs: dict[str, float] | None
    error: str

    def tensors_finding(self, name: str, words: str) -> Finding:
        """Says whether the form holds the artifact's tensors; `words` follow their number where it does."""
        return Finding(name, not self.faults, "; ".join(self.faults[:4]) or f"{self.tensors} {words}")

    def outputs_finding(self, name: str) -> Finding:
        """Says whether the form computes what the artifact does, where it was run."""
        if self.outputs is None:
            return Finding.unseen(name, "a model of this size is not run as a whole")
        if self.error:
            return Finding(name, False, f"it does not run: {self.error}")
        far = [f"{case} differs by {distance:.1e}" for case, distance in self.outputs.items() if distance]
        words = f"{len(self.outputs)} cases bit-identical in a fresh process"
        return Finding(name, not far and bool(self.outputs), ", ".join(far) or words)


def ask(request: Mapping[str, Any]) -> Answer:
    """Has a fresh process load an artifact and a form of it, and compare them.

    The request (`compared_alone.py` reads it) names both directories and their classes, and the file of `inputs` that
    both are run on; None for models that are too large.

    Raises:
        ArtifactError: one of them does not load.
    """
    with Alone(_SCRIPT, fresh.FORBIDDEN) as process:
        answer = process.ask(dict(request))
    outputs = answer["outputs"] if request["inputs"] is not None else None
    return Answer(answer["tensors"], answer["faults"], outputs, answer["error"])


def align_weights(directory: Path) -> dict[str, str]:
    """Writes the weight files of a directory once more, aligned; returns the digests of all their tensors."""
    digests: dict[str, str] = {}
    for path in checkpoint.weight_files(directory):
        digests |= align(path)
    return digests


def align(path: Path) -> dict[str, str]:
    """Writes a file of weights once more, its tensors aligned as artifacts have them; returns their digests.

    Kernels give other last bits for other alignments, and files are mapped as they stand.
    """
    entries = format.read_header(path)
    aligned = path.with_suffix(".aligned")
    digests = format.write_file(aligned, [TensorSource.stored(name, entry) for name, entry in entries.items()])
    aligned.replace(path)
    return digests
