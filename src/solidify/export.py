"""Merge: an artifact and an adapter become a new artifact, which needs neither PEFT nor solidify to load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from solidify import places
from solidify.artifact import certificate, manifest, tensors, trust
from solidify.artifact.manifest import Manifest
from solidify.artifact.solidify import Artifact, copy_code, verify, write
from solidify.checks import roundtrip
from solidify.errors import ArtifactError, refuse
from solidify.model import probing
from solidify.tuning import adapters, storage

_NEVER_COPIED = ("certificate/", manifest.CARD, manifest.NAME)


@dataclass(frozen=True)
class _Sources:
    base_directory: Path
    base: Manifest
    adapter: Manifest


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Artifact:
    """Folds an adapter into the artifact it was trained on and writes a new artifact; both inputs are unchanged.

    The base is where the adapter's manifest says (or `base`), and its digests must be the recorded ones. The result is
    verified in a fresh process without solidify and peft, and its outputs are compared with those of base + adapter.

    Raises:
        AdapterError: the base is not found or is another, or a merged tensor is not finite.
        ArtifactError: `output` exists and is not ours, the base was changed, or the merged model does not hold.
    """
    adapter, output = Path(adapter).resolve(), Path(output)
    places.refuse_foreign(output)
    record = manifest.read(adapter, "adapter")
    where = Path(base).resolve() if base is not None else storage.find_base(record, adapter)
    if output.resolve() in (adapter, where):
        raise ArtifactError(f"the output {output} is an input of the merge; name another")
    sources = _Sources(where, manifest.read(where, "artifact"), record)
    model = storage.load(where, adapter, trust_remote_code=trust_remote_code)
    inputs = {case: probing.probe_inputs(model, **settings) for case, settings in certificate.CASES.items()}
    attached, expected = roundtrip.outputs(model, inputs), roundtrip.expected_weights(model)
    merged = adapters.merge_in_memory(model)
    with places.staged(output) as staging:
        written = _write(merged, staging, sources)
        findings = [
            *verify(merged, staging),
            roundtrip.merged_equals_attached(attached, roundtrip.outputs(merged, inputs)),
            roundtrip.merged_weights(expected, merged.state_dict()),
            roundtrip.merge_ledger(sources.base, written.tensors, record),
        ]
        failed = [f"{finding.name}: {finding.evidence}" for finding in findings if finding.passed is False]
        refuse(ArtifactError, "the merged model is not the attached one", failed)
    trust.remember(written)
    return Artifact(output, written, findings)


def _write(merged: PreTrainedModel, staging: Path, sources: _Sources) -> Manifest:
    base = sources.base
    kept = [name for name in base.files if not name.startswith(_NEVER_COPIED)]
    copy_code(sources.base_directory, staging, [*base.code, *kept])
    _untie(merged, staging / "config.json")
    step = {
        "step": "merge",
        "adapter": tensors.digest_values(sources.adapter.tensors),
        "trained": sources.adapter.trained,
    }
    draft = Manifest(
        kind="artifact",
        base=base.base,
        lineage=[*base.lineage, step],
        edits=base.edits,
        code=base.code,
        requirements=base.requirements,
        recipe=base.recipe,
    )
    return write(merged, staging, draft)


def _untie(merged: PreTrainedModel, path: Path) -> None:
    """PEFT unties embeddings that were trained apart; the configuration on disk must then say so."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tie_word_embeddings") != merged.config.tie_word_embeddings:
        config["tie_word_embeddings"] = merged.config.tie_word_embeddings
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
