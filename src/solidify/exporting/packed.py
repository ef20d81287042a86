"""An artifact, or a plain model, with weights that are packed on disk: loaded in four or eight bits as it stands.

Packed is what the same word packs when the artifact is loaded; new modules, the head and norms keep their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from solidify.artifact import autos, cards, certificate, loading, quantizing
from solidify.artifact.solidify import copy_code
from solidify.directory import private
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, ModelError, raised_as
from solidify.exporting import stock
from solidify.findings import Finding
from solidify.merging import agreement
from solidify.model import probing
from solidify.model.extent import Extent
from solidify.system import disk, foreign
from solidify.upstream.bitsandbytes import REPACKS
from solidify.weights import checkpoint

_SCRIPT = Path(__file__).with_name("compared.py")
_HELD = "packed weights are the artifact's, quantised on loading"
_ERROR = "packed against full weights"


def write(
    model: PreTrainedModel, directory: Path, record: Manifest, staging: Path, word: str
) -> tuple[dict[str, str], list[Finding]]:
    """Writes the model as `word` (`nf4`, `int8`) packs it, with its code, and measures what packing does to it.

    Raises:
        ArtifactError: bitsandbytes is missing, or nothing of the model is of a kind that it packs.
    """
    with raised_as(ArtifactError, of=ModelError):
        packed = loading.load_artifact(directory, trust_remote_code=True, quantization=word, device_map={"": "cpu"})
    with foreign.calling(f"transformers cannot write the model as {word}", ArtifactError):
        packed.save_pretrained(staging)
    digests: dict[str, str] = {}
    for path in checkpoint.weight_files(staging):
        digests |= stock.align(path)
    inputs = {case: dict(probing.probe_inputs(model, **settings)) for case, settings in certificate.CASES.items()}
    with private.copy(directory, record) as own:
        copy_code(own, staging, list(record.code))
        answer = _ask_alone(packed, own, record, staging, inputs if Extent.of(model).whole else {})
    (staging / "README.md").write_text(_write_card(packed, record, staging, word), encoding="utf-8")
    return digests, [_state(answer), _measure(model, packed, word, inputs)]


def _ask_alone(
    packed: PreTrainedModel, own: Path, record: Manifest, staging: Path, inputs: Mapping[str, probing.Inputs]
) -> dict[str, Any]:
    """Has a process without solidify quantise the artifact, load what was written, and compare both."""
    auto = autos.own_class(own) if record.code else type(packed).__name__
    request = {
        "artifact": str(own),
        "auto": auto,
        "quantization": quantizing.record(packed.config.quantization_config),
        "stock": str(staging),
        "head": auto,
        "code": bool(record.code),
        "repacks": REPACKS,
        "inputs": None,
    }
    with disk.temporary() as scratch, certificate.Alone(_SCRIPT, certificate.FORBIDDEN) as process:
        if inputs:
            held = {f"{case}/{key}": tensor for case, batch in inputs.items() for key, tensor in batch.items()}
            save_file(held, scratch / "inputs.safetensors")
            request["inputs"] = str(scratch / "inputs.safetensors")
        return process.ask(request)


def _state(answer: Mapping[str, Any]) -> Finding:
    far = {case: distance for case, distance in answer["outputs"].items() if distance}
    faults = [*answer["faults"], *(f"case {case} differs by {distance:.1e}" for case, distance in far.items())]
    words = f"{answer['tensors']} tensors and scales, {len(answer['outputs'])} cases bit-identical in a fresh process"
    return Finding(_HELD, not faults, "; ".join(faults[:4]) or words)


def _measure(
    model: PreTrainedModel, packed: PreTrainedModel, word: str, inputs: Mapping[str, probing.Inputs]
) -> Finding:
    """Says by how much packing moves what the model returns."""
    if not Extent.of(model).whole:
        return Finding.unseen(_ERROR, "a model of this size is not run as a whole")
    full, found = (agreement.answers(each, inputs).tensors for each in (model, packed))
    off = {key: agreement.distance(tensor, found[key]) for key, tensor in full.items() if key in found}
    worst = max(off, key=lambda key: off[key])
    evidence = f"as {word}: of {len(off)} outputs {worst} differs most, by {off[worst]:.1e} of its size"
    return Finding(_ERROR, None, evidence)


def _write_card(packed: PreTrainedModel, record: Manifest, staging: Path, word: str) -> str:
    """Says what the model is made of, how it is packed, and how it is loaded."""
    auto = autos.auto_class(staging)
    told = cards.metadata("transformers", ["solidify", "bitsandbytes"], record.base, auto, record)
    base = Path(str(record.base.get("model", ""))).name or "a base"
    code = ", trust_remote_code=True" if record.code else ""
    return (
        f"---\n{told}\n---\n\n# {base}, changed, as {word}\n\n{type(packed).__name__}, made of {base}, its linear "
        f"layers packed by bitsandbytes ({word}):\n\n```sh\npip install bitsandbytes\n```\n\n```python\n"
        f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("."{code})\n```\n'
    )
