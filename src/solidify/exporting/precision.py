"""An artifact, or a plain model, in another precision on disk: in another dtype, or packed in four or eight bits.

What is written is what transformers makes when it loads the artifact so. Packed are linear layers of the base; new
modules, the head and norms keep their dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import autos, cards, certificate, loading, quantizing
from solidify.artifact.solidify import copy_code
from solidify.directory import private
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, ModelError, raised_as, refuse
from solidify.exporting import comparison
from solidify.exporting.comparison import Answer
from solidify.findings import Finding
from solidify.model import anatomy, answers, cost, probing, quantized, weight_reads
from solidify.model.extent import Extent
from solidify.system import console, disk, foreign
from solidify.upstream.bitsandbytes import REPACKS

DTYPES = ("float32", "bfloat16", "float16")
_HELD = "weights are the artifact's, loaded so"
_COMPUTED = "outputs are the artifact's, loaded so"
_ERROR = "against the artifact's own precision"
_Cases = Mapping[str, probing.Inputs]


def write(
    model: PreTrainedModel, directory: Path, record: Manifest, staging: Path, word: str
) -> tuple[dict[str, str], list[Finding]]:
    """Writes the model with its code as `word` says (`nf4`, `int8`, or a dtype), and measures what that does to it.

    Raises:
        ArtifactError: bitsandbytes is missing, nothing of the model is of a kind that it packs, all of the model is of
            that dtype, or numbers of it are too large for it.
    """
    if word in DTYPES and {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {_dtype(word)}:
        raise ArtifactError(f"the model is in {word} already: use it as it is, or copy it")
    packs, whole = word in quantizing.WORDS, Extent.of(model).whole
    read = weight_reads.read_by_others(model) if packs and whole else []
    asked: dict[str, Any] = {"quantization": word, "keep": read, "device_map": {"": "cpu"}}
    asked = asked if packs else {"dtype": _dtype(word)}
    with raised_as(ArtifactError, of=ModelError):
        made = loading.load_artifact(directory, trust_remote_code=True, **asked)
    title = f"the model cannot be written as {word}; export it as bfloat16, which has the range of float32"
    refuse(ArtifactError, title, _overflown(model, made))
    with foreign.calling(f"transformers cannot write the model as {word}", ArtifactError):
        made.save_pretrained(staging)
    digests = comparison.align_weights(staging)
    inputs = certificate.make_inputs(model) if whole else None
    with private.copy(directory, record) as own:
        copy_code(own, staging, list(record.code))
        answer = _ask_alone(made, word, own, record, staging, inputs)
    (staging / "README.md").write_text(_write_card(made, record, staging, word, read), encoding="utf-8")
    words = "tensors and scales bit-identical in a fresh process"
    findings = [answer.tensors_finding(_HELD, words), answer.outputs_finding(_COMPUTED)]
    findings.append(_measure(model, made, word, inputs))
    return digests, [*findings, *([_say_unpacked(made, read)] if packs else [])]


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
    made: PreTrainedModel, word: str, own: Path, record: Manifest, staging: Path, inputs: _Cases | None
) -> Answer:
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
    if inputs is None:
        return comparison.ask(request)
    with disk.temporary() as scratch:
        held = {f"{case}/{key}": tensor for case, batch in inputs.items() for key, tensor in batch.items()}
        save_file(held, scratch / "inputs.safetensors")
        return comparison.ask({**request, "inputs": str(scratch / "inputs.safetensors")})


def _measure(model: PreTrainedModel, made: PreTrainedModel, word: str, inputs: _Cases | None) -> Finding:
    """Says by how much the other precision moves what the model returns."""
    if inputs is None:
        return Finding.unseen(_ERROR, "a model of this size is not run as a whole")
    full, found = (
        answers.collect(each, {case: _cast(batch, each.dtype) for case, batch in inputs.items()}).tensors
        for each in (model, made)
    )
    off = {key: answers.distance(tensor, found[key]) for key, tensor in full.items() if key in found}
    worst = max(off, key=lambda key: off[key])
    size, before = (console.size(cost.cost(each).bytes) for each in (made, model))
    most = f"of {len(off)} outputs {worst} differs most, by {off[worst]:.1e} of its size"
    return Finding(_ERROR, None, f"as {word}, {before} became {size}: {most}")


def _cast(batch: probing.Inputs, dtype: torch.dtype) -> probing.Inputs:
    """Returns inputs whose real numbers have the dtype that a module of plain torch takes."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch.items()}


def _list_unpacked(made: PreTrainedModel, read: Sequence[str]) -> dict[str, int]:
    """Says what is not packed, in words, with its bytes, the largest first; layers that repeat are one line."""
    packed = {name for name, _ in quantizing.packed_parameters(made)}
    held = {n: p for n, p in made.named_parameters() if n not in packed and p.ndim > 1}
    found: dict[str, int] = {}
    for name, parameter in held.items():
        owner = name.rpartition(".")[0]
        module = made.get_submodule(owner)
        why = ""
        if owner in read:
            why = f" ({quantizing.READ})"
        elif parameter.ndim > 2 and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            why = " (a stack of matrices, as of experts, is no linear layer)"
        line = f"`{anatomy.fold([name])[0]}`{why}"
        found[line] = found.get(line, 0) + parameter.nbytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _say_unpacked(made: PreTrainedModel, read: Sequence[str]) -> Finding:
    """Says how much is packed and how much is not, and the largest of what is not."""
    whole, left = _measure_bytes(made)
    most = ", ".join(f"{line} {console.size(size)}" for line, size in list(_list_unpacked(made, read).items())[:4])
    words = f"{console.size(whole - left)} are packed, {console.size(left)} are not" + (f": {most}" if most else "")
    return Finding("what is packed", None, words)


def _measure_bytes(made: PreTrainedModel) -> tuple[int, int]:
    """Returns the bytes of a model, and of these what is not packed."""
    whole, packed = cost.cost(made).bytes, {name for name, _ in quantizing.packed_parameters(made)}
    held = {id(p): p.nbytes for name, p in made.named_parameters() if name not in packed}
    saved = {name: buffer for name, buffer in made.named_buffers()}
    computed = {name for name, _ in made.named_non_persistent_buffers()}
    return whole, sum(held.values()) + sum(b.nbytes for name, b in saved.items() if name not in computed)


def _write_card(made: PreTrainedModel, record: Manifest, staging: Path, word: str, read: Sequence[str]) -> str:
    """Writes the card of a plain model, and says in which precision its weights are."""
    dtype = word if word in DTYPES else record.base.get("dtype")
    lineage = [*record.lineage, {"step": f"export as {word}"}]
    draft = replace(record, base={**record.base, "dtype": dtype}, lineage=lineage)
    card = cards.stock_card(staging, draft, sum(quantized.numel(p) for p in made.parameters()))
    if word in DTYPES:
        return card
    packed, (whole, left) = len(quantizing.packed_parameters(made)), _measure_bytes(made)
    lines = "".join(f"| {line} | {console.size(size)} |\n" for line, size in _list_unpacked(made, read).items())
    return (
        f"{card.rstrip()}\n\n## Packed\n\n{packed} weights of linear layers are packed by bitsandbytes ({word}), "
        f"{console.size(whole - left)} of {console.size(whole)}: `pip install bitsandbytes` first. "
        f"All others keep their dtype, {console.size(left)}"
        + (f"; of these:\n\n| not packed | bytes |\n|---|---|\n{lines}" if lines else ".\n")
    )


def _dtype(word: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, word)
    return found
