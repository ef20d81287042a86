"""Does what was saved come back, does an adapter do what it should, is a merged model the attached one?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from solidify.artifact.manifest import Manifest
from solidify.errors import AdapterError
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.tuning import standing, storage


def outputs(model: nn.Module, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns the model's output for every case."""
    return {case: anatomy.run(model, batch) for case, batch in inputs.items()}


def adapter_effect(
    model: PeftModel, base: Mapping[str, torch.Tensor], inputs: Mapping[str, Mapping[str, torch.Tensor]]
) -> list[Finding]:
    """Runs with the adapter and with it disabled: it must change the outputs, and disabled must be the base exactly."""
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


def merged_equals_attached(attached: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> Finding:
    """Compares the outputs of base + adapter with those of the merged model, by the root mean square of the difference.

    Tolerance: `W x + B A x` and `(W + B A) x` round differently, by about a unit in the last place per layer: 1e-5 in
    float32 leaves room for a hundred layers. In half precision `W + B A` itself is rounded to 8 or 11 bits, and a
    router's near tie may send a token elsewhere, so 3e-2; there `merged_weights` is the sharp check.
    """
    errors = [(attached[k].double() - merged[k].double()) for k in attached]
    scale = torch.cat([attached[k].double().flatten() for k in attached]).square().mean().sqrt()
    worst = float(torch.cat([e.flatten() for e in errors]).square().mean().sqrt() / scale.clamp(min=1e-30))
    largest = max(float(e.abs().max()) for e in errors) / max(float(attached[k].abs().max()) for k in attached)
    dtype = next(iter(merged.values())).dtype
    allowed = 1e-5 if dtype in (torch.float32, torch.float64) else 3e-2
    evidence = f"outputs differ by {worst:.1e} (rms; allowed {allowed:.0e}), at most by {largest:.1e} of the largest"
    return Finding("merged equals attached", worst <= allowed, evidence)


def expected_weights(model: PeftModel, *, limit: int = 16) -> dict[str, torch.Tensor]:
    """Computes in float32, before a merge, what some merged weights must become: `W + s·B A`, evenly sampled.

    DoRA is left out: its merged weight is no such sum.
    """
    layers = [
        (standing.canonical(model, path), module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    ]
    adapter = model.active_adapters[0]
    layers = [(n, m) for n, m in layers if adapter in m.lora_A and not m.use_dora.get(adapter, False)]
    expected = {}
    for name, layer in layers[:: max(1, len(layers) // limit)]:
        weight = layer.get_base_layer().weight.detach().float()
        factors = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
        delta = (factors * layer.scaling[adapter]).detach()
        expected[f"{name}.weight"] = weight + (delta.T if isinstance(layer.get_base_layer(), Conv1D) else delta)
    return expected


def merged_weights(expected: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> Finding:
    """Compares sampled merged weights with the float32 sum: they may be rounded to their dtype, not more.

    One unit in the last place for the result and one for what PEFT rounds on the way, of the larger summand.
    """
    faults = []
    for name, wanted in expected.items():
        found = merged[name]
        unit = torch.finfo(found.dtype).eps * torch.maximum(wanted.abs(), wanted.abs().mean())
        off = ((found.float() - wanted).abs() / unit).max()
        if not off <= 2:
            faults.append(f"{name} is off by {float(off):.1f} units in the last place")
    evidence = f"{len(expected)} sampled weights are W + s·B·A, computed in float32 and rounded"
    return Finding("merged weights are the sum", not faults if expected else None, "; ".join(faults[:4]) or evidence)


def merge_ledger(base: Manifest, merged: Mapping[str, str], adapter: Manifest) -> Finding:
    """Compares digests: the tensors that the adapter trains may have changed, every other must be byte-identical."""
    declared = {name for name in adapter.trained["full"]}
    declared |= {
        tensor
        for target in adapter.trained["lora"]
        for tensor in base.tensors
        if tensor == target or tensor.rpartition(".")[0] == target
    }
    owners = {name.rpartition(".")[0] for name in adapter.trained["full"]}
    allowed = declared | {name for name in base.tensors if name.rpartition(".")[0] in owners}
    changed = {name for name, digest in merged.items() if base.tensors.get(name) != digest}
    faults = [f"{name} changed though the adapter does not train it" for name in sorted(changed - allowed)]
    faults += [f"{name} is gone" for name in base.tensors if name not in merged]
    evidence = f"{len(changed)} tensors changed, {len(merged) - len(changed)} byte-identical to the base"
    return Finding("only what was trained changed", not faults and bool(changed), "; ".join(faults[:4]) or evidence)
