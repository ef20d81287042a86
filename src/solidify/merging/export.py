"""Merge: an artifact (or a stock model) and an adapter become a new one, which needs neither PEFT nor solidify to load.

Tensor by tensor, in bounded memory. What no change touches is linked or copied; inputs are never written to.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from solidify.adapter import configured, expert_files, patterns, storage
from solidify.artifact import autos, certificate, companions, loading, quantizing, stock
from solidify.artifact.solidify import NEVER_COPIED, Artifact, copy_code, verify, write
from solidify.directory import manifest, private, results, trust, writing
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.findings import Finding
from solidify.merging import agreement, changes, in_full, mathematics, quantized, rewriting, sums
from solidify.merging.mathematics import Merger
from solidify.merging.rewriting import Rewritten
from solidify.model import anatomy, probing
from solidify.model.extent import Extent
from solidify.system import disk, files, foreign
from solidify.weights import checkpoint, format, hashing


@dataclass(frozen=True)
class _Sources:
    """What is merged. `record` and `base_record` are the manifests, None for what solidify did not make."""

    adapter: Path
    record: Manifest | None
    base: Path
    base_record: Manifest | None


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    link: bool = True,
    trust_remote_code: bool = False,
    layout: str | None = None,
) -> Artifact:
    """Folds an adapter into the model it was trained on and writes a new one; both inputs are unchanged.

    For an adapter that solidify saved, the base is the artifact that its manifest names (or `base`), with the recorded
    digests, and the result is an artifact, verified in a fresh process without solidify and peft. For a plain PEFT
    adapter, the base is a plain model directory (or one in the hub's cache), and the result has its layout and files.
    Small models are run: the outputs of base + adapter are compared with those of the result. Weight files that stay
    as they are become hard links to the base's, unless `link` is false. The experts of a plain adapter may have the
    layout of another trainer; `layout` says it where the files do not tell (docs/expert_lora.md).

    Raises:
        AdapterError: the base is not found or is another, a tensor of the adapter fits nowhere, a merged tensor is not
            finite, or the layout of its experts is not known.
        ArtifactError: `output` exists and is not ours, the base was changed, or the merged model does not hold.
    """
    adapter, output = Path(adapter).resolve(), Path(output)
    writing.refuse_foreign(output, [adapter], work="merge")
    plain = not files.is_file(adapter / manifest.NAME) and files.is_file(adapter / storage.CONFIG)
    if not plain:
        expert_files.refuse_layout(adapter, layout)
    sources = _stock_sources(adapter, base) if plain else _read_sources(adapter, base, trust_remote_code)
    plain = plain or (sources.base_record is not None and sources.base_record.kind == "stock")
    with writing.staged(output, [adapter, sources.base], work="merge") as staging:
        if plain:
            written, findings = _merge_stock(sources, staging, link, trust_remote_code, layout)
        else:
            written, findings = _merge_artifact(sources, staging, link)
        failed = [f"{finding.name}: {finding.evidence}" for finding in findings if finding.passed is False]
        refuse(ArtifactError, "the merged model is not the attached one", failed)
    findings = [*findings, *map(Finding.of, written.failed)]  # what went wrong before is no fault of the merge
    if sources.base_record is not None and not plain and trust.known(sources.base_record):
        trust.remember(written)  # a permission (`trust_remote_code`) holds for this command alone
    return Artifact(output, written, findings)


@dataclass(frozen=True)
class _Attached:
    """Base and adapter as one small model: what it returned, for which inputs, or why it could not be run.

    `base` is the base once more, without the adapter.
    """

    model: PeftModel
    base: PreTrainedModel
    inputs: dict[str, probing.Inputs]
    output: agreement.Output | None
    why: str

    @classmethod
    def of(cls, load: Callable[[], PreTrainedModel], put: Callable[[PreTrainedModel], PeftModel]) -> _Attached:
        """Runs a model, with the adapter that `put` puts on it, on inputs that it accepts without."""
        plain, run = load(), anatomy.answer
        made = foreign.attempt(
            lambda: {c: probing.probe_inputs(plain, **s, run=run) for c, s in certificate.CASES.items()}
        )
        model = put(load())
        if made.value is None:
            assert made.error is not None
            return cls(model, plain, {}, None, foreign.said(made.error))
        with foreign.calling("the base runs, but not with the adapter on", AdapterError):
            return cls(model, plain, made.value, agreement.answers(model, made.value), "")

    def findings(self, merged: PreTrainedModel, merger: Merger) -> list[Finding]:
        """Compares the merged model with this one, by its changed tensors and by all that it returns."""
        weights, changed = sums.effective(self.model, mathematics.NAME), list(merger.changes)
        found = [sums.compare(weights, merged.state_dict(), changed)]
        if self.output is None:
            return [*found, agreement.not_looked_at(self.why)]
        expected = agreement.chosen(weights, changed)
        return [*found, agreement.merged_equals_attached(self.output, merged, self.base, self.inputs, expected)]


def _read_sources(adapter: Path, base: str | Path | None, trust_remote_code: bool) -> _Sources:
    """Reads and verifies an adapter of ours, and all of its base but the tensors, before any code runs."""
    record = manifest.read(adapter, "adapter", closed=False)
    where = Path(base).resolve() if base is not None else storage.find_base(record, adapter)
    base_record = stock.read(where)
    refuse(AdapterError, f"{adapter} is not what was written", manifest.faults(adapter, record, card=False))
    if not stock.is_plain(where):
        faults = manifest.faults(where, base_record, card=False, weights=False)  # these are compared when they pass
        refuse(ArtifactError, f"{where} is not what was written", faults)
    trust.require(base_record, where, trust_remote_code)
    return _Sources(adapter, record, where, base_record)


def _merge_artifact(sources: _Sources, staging: Path, link: bool) -> tuple[Manifest, list[Finding]]:
    assert sources.record is not None and sources.base_record is not None
    record, base = sources.record, sources.base_record
    with private.copy(sources.base, base) as own:
        skeleton = _build_skeleton(own, sources.base)
        kept = [name for name in base.files if not name.startswith(NEVER_COPIED)]
        copy_code(own, staging, [*base.code, *kept])
    storage.refuse_wrong_base(skeleton, record, sources.adapter)
    extent = Extent.of(skeleton)
    prepared = rewriting.prepare(skeleton, sources.base, sources.adapter, record.trained["parameters"])
    attached = None
    if extent.whole:
        attached = _Attached.of(
            lambda: _load_permitted(sources.base, base),
            lambda model: storage.load_adapter(model, sources.adapter),
        )
    made, watched, merger = _rewrite_tensors(sources, prepared, staging, link)
    if made.untied:
        _untie_embeddings(staging)
    merged = _load_staged(staging)
    trained = {"trained": record.trained, **_told(record)}
    step = {"step": "merge", "adapter": hashing.digest_values(record.tensors), **trained}
    draft = Manifest(
        kind="artifact",
        base=base.base,
        lineage=[*base.lineage, {**step, "ledger": made.counts(merger)}],
        edits=base.edits,
        code=base.code,
        requirements=base.requirements,
        recipe=base.recipe,
        failed=results.join_failed(base.failed, record.failed),
    )
    written = write(merged, staging, draft, extent, stored=made.digests)
    findings = [*verify(merged, staging)]
    findings += watched if attached is None else attached.findings(merged, merger)
    findings += _against_quantized(
        sources,
        attached,
        merged,
        lambda options: _load_permitted(sources.base, base, **options),
        lambda options: _load_staged(staging, **options),
    )
    ledger = changes.merge_ledger(_with_added(base, made, skeleton), made.digests, record)
    return written, [*findings, _state_counts(ledger, made, merger)]


def _load_permitted(directory: Path, record: Manifest, **options: Any) -> PreTrainedModel:
    """Loads an artifact that `_read_sources` has asked about: that very one, and no other that stands there by now."""
    with trust.permitting(trust.fingerprint(record)):
        return loading.load_artifact(directory, **options)


def _against_quantized(
    sources: _Sources,
    attached: _Attached | None,
    merged: PreTrainedModel,
    load_base: Callable[[dict[str, Any]], PreTrainedModel],
    load_merged: Callable[[dict[str, Any]], PreTrainedModel],
) -> list[Finding]:
    """Measures how far the merged model is from the one that was trained, where that was quantised.

    Base and merged model are loaded with options of transformers.
    """
    record = sources.record
    if record is None or "quantization" not in record.base:
        return []
    if attached is None or attached.output is None:
        return quantized.not_looked_at(attached.why if attached is not None else "a model of this size is not run")
    return quantized.findings(
        record.base["quantization"],
        attached.inputs,
        merged,
        lambda config: storage.load_adapter(load_base(quantizing.on_cpu(config)), sources.adapter),
        lambda config: load_merged(quantizing.on_cpu(config)),
    )


def _rewrite_tensors(
    sources: _Sources, prepared: rewriting.Prepared, staging: Path, link: bool
) -> tuple[Rewritten, list[Finding], Merger]:
    """Merges every tensor that the adapter changes into the files of the staged directory.

    The findings are what there is to say of a model that is too large to be run: of a sample of its tensors.
    """
    merger = prepared.merger
    watch = sums.Sums([name for name, change in merger.changes.items() if change.layer is not None])
    merger.watch = watch
    expected = sources.base_record.tensors if sources.base_record is not None else {}
    made = rewriting.rewrite(prepared, staging, expected=expected, link=link)
    watch.found |= in_full.read_back(prepared, staging)
    unseen = agreement.not_looked_at("a model of this size is not run as a whole")
    return made, [watch.finding(list(merger.changes)), unseen], merger


def _state_counts(ledger: Finding, made: Rewritten, merger: Merger) -> Finding:
    counts = made.counts(merger)
    more = f"; {counts['adapter tensors used']} tensors of the adapter used once each"
    if counts["files kept"]:
        more += f", {counts['files kept']} of {len(made.files)} files kept"
    return replace(ledger, evidence=ledger.evidence + more) if ledger.passed else ledger


def _build_skeleton(own: Path, directory: Path) -> PreTrainedModel:
    """Builds the model of an artifact on the meta device, from a private copy of its verified code."""
    with foreign.calling(f"the model of {directory} cannot be made", ArtifactError):
        config = AutoConfig.from_pretrained(own, trust_remote_code=True)
        private.point_back(config, own, directory)
        return loading.on_meta(getattr(transformers, autos.own_class(own)), config, trust_remote_code=True).eval()


def _load_staged(directory: Path, **options: Any) -> PreTrainedModel:
    """Loads a directory that has no manifest yet, with code that was verified where it was copied from."""
    with foreign.calling("the merged model cannot be loaded", ArtifactError):
        model, info = getattr(transformers, autos.own_class(directory)).from_pretrained(
            directory, trust_remote_code=True, output_loading_info=True, **options
        )
    faults = [f"{kind}: {', '.join(sorted(map(str, names))[:6])}" for kind, names in info.items() if names]
    refuse(ArtifactError, "the merged model does not load completely", faults)
    found: PreTrainedModel = model.eval()
    return found


def _with_added(base: Manifest, made: Rewritten, skeleton: PreTrainedModel) -> Manifest:
    """Gives a tensor that is tied no longer the digest of the one that it was tied to in the base."""
    ties = [*skeleton.all_tied_weights_keys.items()]
    sources = {name: other for pair in ties for name, other in (pair, pair[::-1]) if other in base.tensors}
    return replace(base, tensors={**base.tensors, **{name: base.tensors[sources[name]] for name in made.added}})


def _untie_embeddings(directory: Path) -> None:
    """Says in the configuration that input and output embeddings, which were trained apart, are not one any more."""
    path = directory / "config.json"
    config = files.document(path)
    config["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _stock_sources(adapter: Path, base: str | Path | None) -> _Sources:
    """Finds a plain PEFT adapter and the plain model that it belongs to."""
    # First its kind: other kinds have other files, and need none of LoRA's.
    configuration = configured.read(adapter, marked=True)
    if not (adapter / storage.WEIGHTS).is_file():
        raise AdapterError(f"{adapter} holds no {storage.WEIGHTS}; pickled adapters are not read")
    format.read_header(adapter / storage.WEIGHTS)  # refuses what is not whole, as `checkpoint.read` does below
    where = _stock_base(base or configuration.base_model_name_or_path, configuration.revision, adapter)
    if disk.leads_out(where, "config.json"):
        raise ArtifactError(
            f"config.json of the base {where} is a link that leads out of the base; put the file itself there"
        )
    checkpoint.read(where)
    record = manifest.read(where) if (where / manifest.NAME).is_file() else None
    if record is not None:
        faults = manifest.faults(where, record, card=False, weights=False)
        refuse(ArtifactError, f"{where} is not what was written", faults)
    if record is not None and record.kind != "stock":
        raise AdapterError(
            f"{adapter} was not saved by solidify, so nothing tells that it was trained on the {record.kind} {where}; "
            "load both and save it with solidify.save_adapter, or name a plain model (--base)"
        )
    if (where / storage.CONFIG).is_file():
        raise ArtifactError(
            f"{where} holds an adapter too, which would be applied when it is loaded; remove that first"
        )
    config = files.document(where / "config.json")
    if config.get("quantization_config"):
        raise ArtifactError(f"{where} is quantized; merge into the model that it was made from")
    return _Sources(adapter, None, where, record)


def _stock_base(reference: str | Path | None, revision: str | None, adapter: Path) -> Path:
    if not reference:
        raise AdapterError(f"{adapter} does not name its base; say where it is (--base)")
    if files.is_file(Path(reference) / "config.json"):
        return Path(reference).resolve()
    try:
        return Path(snapshot_download(str(reference), revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AdapterError(
            f"the base of {adapter} is {str(reference)[:200]!r}, which is neither a model directory nor in the hub's "
            "cache; say where it is (--base)"
        ) from error


def _merge_stock(
    sources: _Sources, staging: Path, link: bool, trust_remote_code: bool, layout: str | None
) -> tuple[Manifest, list[Finding]]:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    skeleton = loading.load_base(str(sources.base), device="meta", **options).model
    if sources.record is not None:
        storage.refuse_wrong_base(skeleton, sources.record, sources.adapter)
        written, findings = _merge_onto(skeleton, sources, staging, link, options)
        return written, findings + _state_unread(sources.adapter)
    with expert_files.in_own_layout(sources.adapter, skeleton, layout) as own:
        configured.refuse_marked(own.directory / storage.WEIGHTS)
        written, findings = _merge_onto(skeleton, replace(sources, adapter=own.directory), staging, link, options)
    found = [Finding(expert_files.FINDING, True if own.sure else None, own.words)] if own.words else []
    return written, [*findings, *_state_unread(sources.adapter), *found]


def _merge_onto(
    skeleton: PreTrainedModel, sources: _Sources, staging: Path, link: bool, options: dict[str, Any]
) -> tuple[Manifest, list[Finding]]:
    """Merges an adapter in our layout into a plain model, of which `skeleton` has the names and shapes."""
    bare = sources.record.trained["parameters"] if sources.record is not None else []
    extent = Extent.of(skeleton)
    prepared = rewriting.prepare(skeleton, sources.base, sources.adapter, bare)  # its words say more than PEFT's
    attached = None
    if extent.whole:
        attached = _Attached.of(
            lambda: loading.load_base(str(sources.base), **options).model, lambda model: _by_peft(model, sources)
        )
    carried = companions.copy_all(sources.base, staging, card=False)
    made, watched, merger = _rewrite_tensors(sources, prepared, staging, link)
    if made.untied:
        _untie_embeddings(staging)
    findings = [_same_keys(sources.base, staging, made)]
    merged = loading.load_base(str(staging), device="cpu" if extent.whole else "meta", **options).model
    if attached is None:
        findings += watched
    else:
        findings += attached.findings(merged, merger)
    findings += _against_quantized(
        sources,
        attached,
        merged,
        lambda more: loading.load_plain(sources.base, **options, **more),
        lambda more: loading.load_plain(staging, **options, **more),
    )
    ledger = changes.only_these_changed(made.base, made.digests, {*made.given, *made.added})
    written = _stock_manifest(sources, staging, made, merger, anatomy.count(skeleton.parameters()))
    written.write(staging)
    return written, [*findings, *carried.findings(), _state_counts(ledger, made, merger)]


def _state_unread(adapter: Path) -> list[Finding]:
    """Says that what a regular expression of the adapter's file reaches was not asked."""
    why = "no regular expression of a file is run: what the adapter holds tensors for is merged, and all of that"
    return [Finding.unseen(f"{field} reaches what is merged", why) for field in configured.expressions(adapter)]


def _by_peft(model: PreTrainedModel, sources: _Sources) -> PeftModel:
    if sources.record is not None:
        return storage.load_adapter(model, sources.adapter)
    with foreign.calling(f"PEFT cannot put {sources.adapter} on {sources.base}", AdapterError):
        asked = configured.read(sources.adapter, model)  # without regular expressions of the file
        with patterns.without_false_alarms(asked):
            return PeftModel.from_pretrained(model, str(sources.adapter), config=asked).eval()


def _same_keys(base: Path, staging: Path, made: Rewritten) -> Finding:
    """Compares names, dtypes, shapes and files of the tensors with the base's."""
    before, after = checkpoint.read(base).entries, checkpoint.read(staging).entries
    faults = [f"{name} is gone" for name in before if name not in after]
    faults += [f"{name} is new" for name in after if name not in before and name not in made.added]
    faults += [
        f"{name} differs in shape, dtype or file"
        for name, entry in before.items()
        if name in after and (after[name].shape != entry.shape or after[name].file.name != entry.file.name)
    ]
    evidence = f"{len(before)} tensors under the base's names, in its {len(made.files)} files"
    if made.added:
        evidence += f"; new, because they were trained apart: {', '.join(made.added)}"
    return Finding("layout is the base's", not faults, "; ".join(faults[:4]) or evidence)


def _stock_manifest(sources: _Sources, staging: Path, made: Rewritten, merger: Merger, parameters: int) -> Manifest:
    """Lists what was merged, with a card: that of the base says what the base is."""
    before = sources.base_record
    origin = before.base if before is not None else companions.origin(sources.base)
    step = {
        "step": "merge",
        **(_told(sources.record) if sources.record is not None else {}),
        "adapter": hashing.digest_values({key: entry.digest() for key, entry in merger.entries.items()}),
        **({"trained": sources.record.trained} if sources.record is not None else {}),
        "ledger": made.counts(merger),
    }
    draft = Manifest(
        kind="stock",
        base=origin,
        lineage=[*(before.lineage if before is not None else [{"step": "base", **origin}]), step],
        tensors=made.digests,
        headers={path.name: format.header_digest(path) for path in made.files},
        versions=manifest.current_versions(),
        recipe=before.recipe if before is not None else None,
        failed=results.join_failed(*(made.failed for made in (before, sources.record) if made is not None)),
    )
    stock.write_card(staging, draft, parameters)
    return stock.list_files(staging, draft)


def _told(record: Manifest) -> dict[str, Any]:
    """Returns what the training of an adapter says of itself: its data on the hub, and its figures."""
    return {key: value for step in record.lineage[:1] for key, value in step.items() if key != "step"}
