"""Did a merge change what was trained, and nothing else? Tensors of base and merged model, compared by digest."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from solidify.directory.manifest import Manifest
from solidify.findings import Finding


def merge_ledger(base: Manifest, merged: Mapping[str, str], adapter: Manifest) -> Finding:
    """Compares digests: the tensors that the adapter says it trains may have changed, every other may not."""
    declared = {name for name in adapter.trained["full"]}
    declared |= {
        tensor
        for target in adapter.trained["lora"]
        for tensor in base.tensors
        if tensor == target or tensor.rpartition(".")[0] == target
    }
    declared |= {f"{name}.weight" for name in adapter.trained.get("tokens", ())}
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
