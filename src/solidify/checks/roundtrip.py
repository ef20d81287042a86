"""Does what was saved come back, and does an adapter do what it should?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from solidify.adapter import readback, storage
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError
from solidify.findings import Finding
from solidify.model import answers
from solidify.weights.format import same_bits


def outputs(model: nn.Module, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns every tensor that the model returns, by `case/where`, in the state in which models are compared."""
    with readback.alike(model):
        return answers.collect(model, inputs).tensors


def adapter_effect(
    model: PeftModel, base: Mapping[str, torch.Tensor], inputs: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[Finding]:
    """Runs with the adapter and with it disabled: it must change the outputs, and disabled must be the base exactly."""
    if not base:
        names = ("adapter has an effect", "adapter off is the base")
        return [Finding.unseen(name, "the base's outputs were not recorded") for name in names]
    on = outputs(model, inputs)
    with model.disable_adapter():
        off = outputs(model, inputs)
    moves = {key: _measure_move(base[key], on[key]) for key in base if key in on}
    most = max(moves, key=lambda key: moves[key], default="nothing")
    moved = moves.get(most, 0.0)
    different = _find_different(base, off)
    evidence = f"disabled, {_name_outputs(different)} {'is' if len(different) == 1 else 'are'} not the base's"
    return [
        Finding(
            "adapter has an effect", moved > 0, f"of {_count_outputs(base)}, {most} moves most, by up to {moved:.3g}"
        ),
        Finding(
            "adapter off is the base", not different, evidence if different else f"{_count_outputs(base)} bit-identical"
        ),
    ]


def adapter_reload(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Finding:
    """Compares outputs before saving with those after loading; they must be bit-identical."""
    if not expected:
        return Finding.unseen("adapter reload exact", "nothing was run before it was saved")
    different = _find_different(expected, found)
    evidence = f"differs: {_name_outputs(different)}" if different else f"{_count_outputs(expected)} bit-identical"
    return Finding("adapter reload exact", not different, evidence)


def _find_different(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """Names outputs that are not bit for bit the same, or that one of two models alone has."""
    both = [key for key in expected if key in found and same_bits(expected[key], found[key])]
    return [key for key in {**expected, **found} if key not in both]


def _measure_move(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns by how much the elements of an output move at most; what is of another shape or no number, by inf."""
    if before.shape != after.shape:
        return math.inf
    off = (after.double() - before.double()).abs()
    moved = float(off.max()) if off.numel() else 0.0
    return math.inf if math.isnan(moved) else moved


def _name_outputs(outputs: Sequence[str]) -> str:
    return ", ".join(outputs[:4]) + (f" and {len(outputs) - 4} more" if len(outputs) > 4 else "")


def _count_outputs(outputs: Mapping[str, torch.Tensor]) -> str:
    """Counts outputs and the cases that they are of."""
    cases = {key.partition("/")[0] for key in outputs}
    plural = "s" if len(outputs) != 1 else ""
    return f"{len(outputs)} output{plural} in {len(cases)} case{'s' if len(cases) != 1 else ''}"


def wrong_base_refused(model: nn.Module, record: Manifest, directory: Path) -> Finding:
    """Shows the adapter's record to the loader with each of its base digests changed in turn; each must be refused."""
    accepted = []
    for key in ("configuration", "code", "weights"):
        altered = replace(record, base={**record.base, key: "0" * 64})
        try:
            storage.refuse_wrong_base(model, altered, directory)
        except AdapterError:
            continue
        accepted.append(key)
    evidence = (
        f"accepted with another {', '.join(accepted)}" if accepted else "configuration, code and weights compared"
    )
    return Finding("wrong base refused", not accepted, evidence)
