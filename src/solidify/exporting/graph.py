"""An artifact as an ONNX graph, by transformers' own exporter, run by ONNX Runtime and compared with the artifact."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters import AutoHfExporter, ExportedModel, OnnxConfig

from solidify.artifact import certificate
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.system import foreign

NEEDED = ("onnx", "onnxscript", "onnxruntime")
_AGREES = "ONNX Runtime computes what the artifact does"
_LIMIT = {torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest output; in float32 sums in another order, 1e-4


def write(
    model: PreTrainedModel, directory: Path, record: Manifest, staging: Path
) -> tuple[dict[str, str], list[Finding]]:
    """Writes `model.onnx` for any number of rows and positions, loads it in ONNX Runtime, and compares outputs.

    Raises:
        ArtifactError: a package is missing, the model is too large to be run, or it cannot be traced.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ArtifactError(
            f"the form onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'solidify[onnx]'"
        )
    if not Extent.of(model).whole:
        raise ArtifactError("the form onnx traces a model by running it, which is not done for one of this size")
    cases = certificate.make_inputs(model)
    expected = {case: anatomy.run(model, batch) for case, batch in cases.items()}
    with foreign.calling("the model cannot be traced to an ONNX graph", ArtifactError), _quiet():
        config = OnnxConfig(dynamic=True)
        exported: Any = AutoHfExporter.from_config(config).export(model, cases["padded"], config=config)
        exported.config = None  # it is the artifact's own class, whose code would be copied: the graph needs none
        exported.save_pretrained(staging)
    with foreign.calling("ONNX Runtime does not run the graph", ArtifactError), _quiet():
        exported = ExportedModel.from_pretrained(staging)
        found = {case: _pick(exported(**batch)) for case, batch in cases.items()}
    return {}, [compare(expected, found, model.dtype)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' notes to their developers from the screen; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _pick(outputs: Any) -> torch.Tensor:
    """Returns what stands for a model's output, as `anatomy.run` does."""
    return torch.as_tensor(next(outputs[key] for key in anatomy.OUTPUTS if outputs.get(key) is not None))


def compare(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], dtype: torch.dtype) -> Finding:
    """Compares the outputs of every case: shapes, and by how much of the largest number they differ."""
    distances = []
    for case, output in expected.items():
        if found[case].shape != output.shape:
            return Finding(_AGREES, False, f"case {case}: shape {list(found[case].shape)}, not {list(output.shape)}")
        distance = (found[case].double().cpu() - output.double()).abs().max()
        distances.append(float(distance / output.double().abs().max().clamp(min=1e-30)))
    far = max((math.inf if math.isnan(each) else each for each in distances), default=math.inf)
    limit = _LIMIT.get(dtype, 1e-4)
    words = f"{len(expected)} cases of {', '.join(str(list(o.shape[:2])) for o in expected.values())}"
    return Finding(_AGREES, far <= limit, f"{words}: off by {far:.1e} of the largest output (allowed {limit:.0e})")
