"""Does what was saved come back, does an adapter do what it should, is a merged model the attached one?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from solidify.adapter import readback, standing, storage
from solidify.adapter.merging import NAME
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
    """Computes in float32, before a merge, what some merged weights must become, evenly sampled."""
    layers = [
        (standing.canonical(model, path), module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    ]
    adapter = model.active_adapters[0]
    layers = [(name, module) for name, module in layers if adapter in module.lora_A]
    found = {f"{n}.weight": expected_weight(m, adapter) for n, m in layers[:: max(1, len(layers) // limit)]}
    return {name: weight for name, weight in found.items() if weight is not None}


def expected_weight(layer: LoraLayer, adapter: str) -> torch.Tensor | None:
    """Computes in float32, before a merge, what a layer's weight must become: `W + s·B A`, by expert where they stack.

    With DoRA it is `m · (W + s·B A) / ‖W + s·B A‖`, by rows of the output. None for layers of other kinds.
    """
    base, scale = layer.get_base_layer(), float(layer.scaling[adapter])
    if isinstance(layer, ParamWrapper):
        weight = _float(getattr(base, layer.parameter_name))
        a, b = _float(layer.lora_A[adapter].weight), _float(layer.lora_B[adapter].weight)
        if weight.ndim == 2:
            return weight + scale * (b @ a)
        a, b = a.reshape(len(weight), -1, a.shape[-1]), b.reshape(b.shape[0], -1, len(weight))
        delta = torch.stack([b[:, :, expert] @ a[expert] for expert in range(len(weight))])
        return weight + scale * (delta.mT if _turned(base) else delta)
    if adapter in layer.lora_embedding_A and not layer.use_dora[adapter]:
        a, b = _float(layer.lora_embedding_A[adapter]), _float(layer.lora_embedding_B[adapter])
        return _float(base.weight) + scale * (b @ a).T
    if adapter not in layer.lora_A or not isinstance(base, (nn.Linear, Conv1D)):
        return None
    turned = isinstance(base, Conv1D)
    weight = _float(base.weight.T if turned else base.weight)
    sums = weight + scale * (_float(layer.lora_B[adapter].weight) @ _float(layer.lora_A[adapter].weight))
    if layer.use_dora[adapter]:
        magnitude = _float(layer.lora_magnitude_vector[adapter].weight)
        sums = magnitude[:, None] * sums / sums.norm(dim=1, keepdim=True)
    return sums.T if turned else sums


def _float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float()


def _turned(experts: nn.Module) -> bool:
    """Returns whether a stack of experts keeps (experts, inputs, outputs), as its own attribute says to PEFT."""
    return bool(getattr(experts, "is_transposed", False))


def off_by(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Returns how far a merged weight is from the float32 one, in units in the last place of the larger summand."""
    unit = torch.finfo(found.dtype).eps * torch.maximum(wanted.abs(), wanted.abs().mean())
    return float(((found.float() - wanted).abs() / unit.clamp(min=torch.finfo(torch.float32).tiny)).max())


def merged_weights(expected: Mapping[str, torch.Tensor], merged: Mapping[str, torch.Tensor]) -> Finding:
    """Compares sampled merged weights with the float32 sum."""
    return sums_hold({name: off_by(wanted, merged[name]) for name, wanted in expected.items()})


def sums_hold(found: Mapping[str, float]) -> Finding:
    """Judges how far sampled merged weights are off: they may be rounded to their dtype, not more.

    One unit in the last place for the result and one for what PEFT rounds on the way.
    """
    faults = [f"{name} is off by {far:.1f} units in the last place" for name, far in found.items() if not far <= 2]
    evidence = f"{len(found)} sampled weights are W + s·B·A, computed in float32 and rounded"
    return Finding("merged weights are the sum", not faults if found else None, "; ".join(faults[:4]) or evidence)


class Sums:
    """Watches a merge: of some layers, evenly sampled, what comes out is compared with the float32 sum."""

    def __init__(self, names: Sequence[str], *, limit: int = 16) -> None:
        self._wanted = {name for name in names[:: max(1, len(names) // limit)]}
        self.found: dict[str, float] = {}

    def __call__(self, name: str, layer: LoraLayer) -> Callable[[torch.Tensor], None] | None:
        """Computes what the weight of a layer must become, and returns what compares it; each is sampled once."""
        if name not in self._wanted or name in self.found or name.endswith(".bias"):
            return None
        expected = expected_weight(layer, NAME)
        if expected is None:
            return None

        def judge(merged: torch.Tensor) -> None:
            self.found[name] = off_by(expected, merged)

        return judge


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
    evidence = f"{len(changed)} tensors changed, {len(merged) - len(changed)} byte-identical to the base"
    return Finding("only what was trained changed", not faults and bool(changed), "; ".join(faults[:4]) or evidence)
