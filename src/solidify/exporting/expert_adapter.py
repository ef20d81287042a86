"""An adapter whose experts are laid out for another program, read back before it appears."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import safetensors.torch
from transformers import PreTrainedModel

from solidify.adapter import adapter_tensors, configured, expert_files, expert_layouts, expert_writing, patterns
from solidify.artifact import loading
from solidify.directory import manifest, writing
from solidify.errors import AdapterError, refuse
from solidify.findings import Finding
from solidify.merging import inputs
from solidify.system import files, foreign
from solidify.upstream.peft import put_on


def export(adapter: Path, output: Path, layout: str, base: str | Path | None, trust_remote_code: bool) -> list[Finding]:
    """Writes an adapter for plain PEFT and other programs, with its experts in another layout.

    Raises:
        AdapterError: the layout is unknown, the adapter's base is not found or is not fitted by its file, it holds no
            experts or more than the layout has a place for, or what was written is not read back as it was.
    """
    if layout not in expert_layouts.NAMES:
        known = ", ".join(expert_layouts.NAMES)
        raise AdapterError(f"{adapter} is an adapter, which cannot be exported as {layout!r}; there are {known}")
    _refuse_adapter(output)
    writing.refuse_foreign(output, [adapter], work="export")
    ours = files.is_file(adapter / manifest.NAME)
    sources = inputs.read(adapter, base, trust_remote_code) if ours else inputs.read_plain(adapter, base)
    if sources.record is not None and (more := _list_others(sources.record)):
        raise AdapterError(f"{adapter} trains {', '.join(more)} in full, which other programs do not read; merge it")
    skeleton = loading.load_base(str(sources.base), device="meta", trust_remote_code=trust_remote_code).model
    with writing.staged(output, [adapter, sources.base], work="export") as staging:
        with expert_files.in_own_layout(adapter, skeleton) as own:
            refuse(AdapterError, f"{adapter} cannot be exported", _find_faults(own.directory, skeleton))
            expert_writing.write(own.directory, staging, layout, skeleton)
            wrong = expert_writing.find_differences(own.directory, staging, layout, skeleton)
        if wrong:
            raise AdapterError(f"{adapter} was not read back as it was from {layout}: {', '.join(wrong[:4])}")
    evidence = f"{layout}: {expert_layouts.NAMES[layout]}; read back, every update is the same bits and scale"
    return [Finding(expert_files.FINDING, True, evidence)]


def _refuse_adapter(output: Path) -> None:
    """Refuses to write over an adapter without a manifest: an earlier export looks as another program's adapter.

    Raises:
        AdapterError: there is one.
    """
    if files.is_file(output / manifest.ADAPTER_CONFIG) and not files.is_file(output / manifest.NAME):
        raise AdapterError(
            f"the output {output} holds an adapter for other programs, which carries no {manifest.NAME}: whether it is "
            "an earlier export or somebody's own cannot be told, so it is not replaced; remove it first, or name "
            "another"
        )


def _find_faults(directory: Path, skeleton: PreTrainedModel) -> list[str]:
    """Compares the file of an adapter with what PEFT makes of its configuration, and names numbers that are none."""
    configuration = configured.read(directory, skeleton)
    configuration.base_model_name_or_path = None
    with (
        foreign.calling(f"PEFT refuses the adapter {directory}", AdapterError),
        patterns.without_false_alarms(configuration),
    ):
        model = put_on(deepcopy(skeleton), configuration)
    state = safetensors.torch.load_file(directory / configured.WEIGHTS)
    wild = [f"{key} holds numbers that are not finite" for key, tensor in state.items() if not tensor.isfinite().all()]
    return [*adapter_tensors.key_faults(adapter_tensors.held(model, "default"), state), *wild][:8]


def _list_others(record: manifest.Manifest) -> list[str]:
    """Names what an adapter trains in full."""
    return [name for kind in ("modules", "parameters", "buffers", "tokens") for name in record.trained.get(kind, [])]
