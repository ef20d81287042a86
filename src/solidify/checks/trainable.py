"""Is what is trained what was declared, and did nothing else move?"""

from __future__ import annotations

from peft import PeftModel

from solidify.adapter import base_state, lookup
from solidify.adapter import plan as planning
from solidify.adapter.plan import AdapterPlan
from solidify.artifact import tensors
from solidify.directory.manifest import Manifest
from solidify.findings import Finding
from solidify.system import processes


def trainable(model: PeftModel, wanted: AdapterPlan) -> Finding:
    """Compares the trainable parameters with the plan, by name."""
    faults = planning.compare(model, wanted)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    evidence = (
        f"{len(wanted.lora_modules) + len(wanted.lora_parameters)} LoRA targets, "
        f"{len(wanted.full)} parameters in full, {count:,} numbers"
    )
    return Finding("trainable set exact", not faults, "; ".join(faults[:4]) or evidence)


def frozen(model: PeftModel, base: Manifest) -> Finding:
    """Compares every tensor of the base inside the PeftModel with the artifact's digests, one after the other.

    What is spread over the processes is gathered for it, tensor by tensor: all processes must then call this.
    """
    found: dict[str, str] = {}
    packed = base_state.packed_faults(model)
    for kind, name, parameter in lookup.named_parameters(model):
        if kind == "base" and name not in packed:
            found[name] = tensors.digest(processes.whole(parameter))
    for kind, name, buffer in lookup.named_buffers(model):
        if kind == "base" and name in base.tensors:
            found[name] = tensors.digest(processes.whole(buffer))
    if not found and not packed:
        return Finding.unseen("frozen tensors unchanged", "the model holds no tensor of the base")
    changed = [name for name, digest in found.items() if base.tensors.get(name, digest) != digest]
    changed += [name for name, differs in packed.items() if differs]
    missing = [name for name in base.tensors if name not in found and name not in packed]
    faults = [f"{name} changed" for name in changed] + [f"{name} is not in the model" for name in missing]
    evidence = f"{len(found)} tensors have the digest they were built with"
    if packed:
        evidence += f", {len(packed)} quantised ones the digest they were loaded with"
    return Finding("frozen tensors unchanged", not faults, "; ".join(faults[:4]) or evidence)
