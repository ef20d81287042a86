"""An artifact, or a plain model, in another precision on disk: in another dtype, or packed in four or eight bits.

What is written is what transformers makes when it loads the artifact so. Packed are linear layers of the base; new
modules, the head and norms keep their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from solidify.artifact import autos, cards, certificate, loading, quantizing
from solidify.artifact.solidify import copy_code
from solidify.directory import private
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, ModelError, raised_as, refuse
from solidify.exporting import stock
from solidify.findings import Finding
from solidify.merging import agreement
from solidify.model import cost, probing, quantized
from solidify.model.extent import Extent
from solidify.system import console, disk, foreign
from solidify.system.alone import Alone
from solidify.upstream.bitsandbytes import REPACKS
from solidify.weights import checkpoint

_SCRIPT = Path(__file__).with_name("compared.py")
DTYPES = ("float32", "bfloat16", "float16")
_HELD = "weights are the artifact's, loaded so"
_ERROR = "against the artifact's own precision"


def write(
    model: PreTrainedModel, directory: Path, record: Manifest, staging: Path, word: str
) -> tuple[dict[str, str], list[Finding]]:
    """Writes the model with its code as `word` says (`nf4`, `int8`, or a dtype), and measures what that does to it.

    Raises:
        ArtifactError: bitsandbytes is missing, nothing of the model is of a kind that it packs, all of the model is of
            that dtype, or numbers of it are too large for it.
    """
    if quantized.is_quantized(model):
        raise ArtifactError(
            "its weights are packed, and what was rounded is lost; export the model that it was made from"
        )
    if word in DTYPES and {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {_dtype(word)}:
        raise ArtifactError(f"the model is in {word} already: use it as it is, or copy it")
    packs = word in quantizing.WORDS
    asked: dict[str, Any] = {"quantization": word, "device_map": {"": "cpu"}} if packs else {"dtype": _dtype(word)}
    with raised_as(ArtifactError, of=ModelError):
        made = loading.load_artifact(directory, trust_remote_code=True, **asked)
    title = f"the model cannot be written as {word}; export it as bfloat16, which has the range of float32"
    refuse(ArtifactError, title, _overflown(model, made))
    with foreign.calling(f"transformers cannot write the model as {word}", ArtifactError):
        made.save_pretrained(staging)
    digests: dict[str, str] = {}
    for path in checkpoint.weight_files(staging):
        digests |= stock.align(path)
    inputs = {case: dict(probing.probe_inputs(model, **settings)) for case, settings in certificate.CASES.items()}
    with private.copy(directory, record) as own:
        copy_code(own, staging, list(record.code))
        answer = _ask_alone(made, word, own, record, staging, inputs if Extent.of(model).whole else {})
    (staging / "README.md").write_text(_write_card(made, record, staging, word), encoding="utf-8")
    return digests, [_state(answer), _measure(model, made, word, inputs)]


def _overflown(model: PreTrainedModel, made: PreTrainedModel) -> list[str]:
    """Names the tensors with numbers that are too large for what was made of them (int8 is made by way of float16)."""
    there, packed = made.state_dict(), {name for name, _ in quantizing.packed_parameters(made)}
    by_half = getattr(made, "is_loaded_in_8bit", False)
    faults = []
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or name not in there:
            continue
        then = tensor.half() if name in packed and by_half else there[name]
        if not then.is_floating_point():
            continue
        count = int((tensor.isfinite() & ~then.isfinite()).sum())
        if count:
            faults.append(f"{count} number{'s' if count > 1 else ''} of {name} would become infinite or NaN")
    return faults


def _ask_alone(
    made: PreTrainedModel, word: str, own: Path, record: Manifest, staging: Path, inputs: Mapping[str, probing.Inputs]
) -> dict[str, Any]:
    """Has a process without solidify load the artifact so, load what was written, and compare both."""
    auto = autos.own_class(own) if record.code else type(made).__name__
    request = {
        "artifact": str(own),
        "auto": auto,
        **({"dtype": word} if word in DTYPES else {"quantization": quantizing.record(made.config.quantization_config)}),
        "stock": str(staging),
        "head": auto,
        "code": bool(record.code),
        "repacks": REPACKS,
        "inputs": None,
    }
    with disk.temporary() as scratch, Alone(_SCRIPT, certificate.FORBIDDEN) as process:
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


def _measure(model: PreTrainedModel, made: PreTrainedModel, word: str, inputs: Mapping[str, probing.Inputs]) -> Finding:
    """Says by how much the other precision moves what the model returns."""
    if not Extent.of(model).whole:
        return Finding.unseen(_ERROR, "a model of this size is not run as a whole")
    full, found = (
        agreement.answers(each, {case: _cast(batch, each.dtype) for case, batch in inputs.items()}).tensors
        for each in (model, made)
    )
    off = {key: agreement.distance(tensor, found[key]) for key, tensor in full.items() if key in found}
    worst = max(off, key=lambda key: off[key])
    size, before = (console.size(cost.cost(each).bytes) for each in (made, model))
    most = f"of {len(off)} outputs {worst} differs most, by {off[worst]:.1e} of its size"
    return Finding(_ERROR, None, f"as {word}, {before} became {size}: {most}")


def _cast(batch: probing.Inputs, dtype: torch.dtype) -> probing.Inputs:
    """Returns inputs whose real numbers have the dtype that a module of plain torch takes."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch.items()}


def _write_card(made: PreTrainedModel, record: Manifest, staging: Path, word: str) -> str:
    """Writes the card of a plain model, and says in which precision its weights are."""
    dtype = word if word in DTYPES else record.base.get("dtype")
    lineage = [*record.lineage, {"step": f"export as {word}"}]
    draft = replace(record, base={**record.base, "dtype": dtype}, lineage=lineage)
    card = cards.stock_card(staging, draft, sum(quantized.numel(p) for p in made.parameters()))
    if word in DTYPES:
        return card
    packed = len(quantizing.packed_parameters(made))
    return (
        f"{card.rstrip()}\n\n## Packed\n\n{packed} weights of linear layers are packed by bitsandbytes ({word}): "
        "`pip install bitsandbytes` first. All others keep their dtype.\n"
    )


def _dtype(word: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, word)
    return found
