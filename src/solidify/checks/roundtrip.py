"""Does what was saved come back, does an adapter do what it should, did a merge change what was trained alone?"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from solidify.adapter import readback, storage
from solidify.artifact.manifest import Manifest
from solidify.errors import AdapterError
from solidify.findings import Finding
from solidify.model import anatomy


def outputs(model: nn.Module, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the model's output for every case, in the state in which models are compared."""
    with readback.alike(model):
        return {case: anatomy.run(model, batch) for case, batch in inputs.items()}


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
    moved = max(float((on[k].double() - base[k].double()).abs().max()) for k in base)
    exact = all(torch.equal(off[k], base[k]) for k in base)
    return [
        Finding("adapter has an effect", moved > 0, f"logits move by up to {moved:.3g}"),
        Finding(
            "adapter off is the base",
            exact,
            f"{len(base)} cases bit-identical" if exact else "disabled, the outputs are not the base's",
        ),
    ]


def adapter_reload(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> Finding:
    """Compares outputs before saving with those after loading; they must be bit-identical."""
    if not expected:
        return Finding.unseen("adapter reload exact", "nothing was run before it was saved")
    different = [case for case in expected if not torch.equal(expected[case], found[case])]
    evidence = f"differs: {', '.join(different)}" if different else f"{len(expected)} cases bit-identical"
    return Finding("adapter reload exact", not different, evidence)


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


def merge_ledger(base: Manifest, merged: Mapping[str, str], adapter: Manifest) -> Finding:
    """Compares digests: the tensors that the adapter says it trains may have changed, every other may not."""
    declared = {name for name in adapter.trained["full"]}
    declared |= {
        tensor
        for target in adapter.trained["lora"]
        for tensor in base.tensors
        if tensor == target or tensor.rpartition(".")[0] == target
    }
    owners = {name.rpartition(".")[0] for name in adapter.trained["full"]}
    allowed = declared | {name for name in base.tensors if name.rpartition(".")[0] in owners}
    return only_these_changed(base.tensors, merged, allowed)


def only_these_changed(base: Mapping[str, str], merged: Mapping[str, str], allowed: Collection[str]) -> Finding:
    """Compares digests: some tensors may have changed, every other must be byte-identical, and none be gone."""
    changed = {name for name, digest in merged.items() if base.get(name) != digest}
    faults = [f"{name} changed though the adapter does not train it" for name in sorted(changed - set(allowed))]
    faults += [f"{name} is gone" for name in base if name not in merged]
    if not changed and not faults:
        faults.append("no tensor changed: the adapter's update is zero, as before its first training step")
    evidence = f"{len(changed)} tensors changed, {len(merged) - len(changed)} byte-identical to the base"
    return Finding("only what was trained changed", not faults, "; ".join(faults[:4]) or evidence)
