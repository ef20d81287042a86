"""Merge: an artifact (or a stock model) and an adapter become a new one, which needs neither PEFT nor solidify to load.

Tensor by tensor, in bounded memory. What no change touches is linked or copied; inputs are never written to.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from solidify.adapter import configured, expert_files, patterns, storage
from solidify.artifact import autos, certificate, companions, fresh, loading, quantizing, stock
from solidify.artifact.solidify import NEVER_COPIED, Artifact, copy_code, verify, write
from solidify.directory import manifest, packages, private, results, trust, writing
from solidify.directory.manifest import Manifest
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.findings import Finding
from solidify.merging import agreement, changes, inputs, mathematics, quantized, read_back, rewriting, sums
from solidify.merging.inputs import Sources
from solidify.merging.mathematics import Merger
from solidify.merging.rewriting import Rewritten
from solidify.model import anatomy, answers, probing
from solidify.model.extent import Extent
from solidify.system import files, foreign
from solidify.system.alone import Alone
from solidify.weights import checkpoint, format, hashing


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
    plain = not files.is_file(adapter / manifest.NAME) and files.is_file(adapter / manifest.ADAPTER_CONFIG)
    if not plain:
        expert_files.refuse_layout(adapter, layout)
    sources = inputs.read_plain(adapter, base) if plain else inputs.read(adapter, base, trust_remote_code)
    plain = plain or (sources.base_record is not None and sources.base_record.kind == "stock")
    with writing.staged(output, [adapter, sources.base], work="merge") as staging:
        if plain:
            written, findings = _merge_stock(sources, staging, link, trust_remote_code, layout)
        else:
            with fresh.started() as process:
                written, findings = _merge(_OfArtifact.begin(sources, staging, process), link)
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
    output: answers.Output | None
    why: str

    @classmethod
    def of(cls, load: Callable[[], PreTrainedModel], put: Callable[[PreTrainedModel], PeftModel]) -> _Attached:
        """Runs a model, with the adapter that `put` puts on it, on inputs that it accepts without."""
        plain = load()
        made = foreign.attempt(certificate.make_inputs, plain, run=anatomy.answer)
        model = put(load())
        if made.value is None:
            assert made.error is not None
            return cls(model, plain, {}, None, foreign.said(made.error))
        with foreign.calling("the base runs, but not with the adapter on", AdapterError):
            return cls(model, plain, made.value, answers.collect(model, made.value), "")

    def findings(self, merged: PreTrainedModel, merger: Merger) -> list[Finding]:
        """Compares the merged model with this one, by its changed tensors and by all that it returns."""
        weights, changed = sums.effective(self.model, mathematics.NAME), list(merger.changes)
        found = [sums.compare(weights, merged.state_dict(), changed)]
        if self.output is None:
            return [*found, agreement.not_looked_at(self.why)]
        expected = agreement.chosen(weights, changed)
        return [*found, agreement.merged_equals_attached(self.output, merged, self.base, self.inputs, expected)]


@dataclass(frozen=True)
class _Form(ABC):
    """What a merge does in its own way by the kind of its base; `skeleton` has the names and shapes of the base."""

    sources: Sources
    staging: Path
    skeleton: PreTrainedModel

    @abstractmethod
    def load_base(self, **options: Any) -> PreTrainedModel:
        """Loads the base; `options` are transformers' own."""

    @abstractmethod
    def load_merged(self, **options: Any) -> PreTrainedModel:
        """Loads what is staged, code and configuration and weights, on the meta device where that is enough."""

    @abstractmethod
    def write(self, merged: PreTrainedModel, made: Rewritten, merger: Merger) -> tuple[Manifest, list[Finding]]:
        """Writes all that is beside the tensors, the manifest last."""

    @abstractmethod
    def ledger(self, made: Rewritten) -> Finding:
        """Compares the digests of all tensors with the base's."""


def _merge(form: _Form, link: bool) -> tuple[Manifest, list[Finding]]:
    """Merges an adapter in our layout into its base, and compares the result with the two."""
    sources, record = form.sources, form.sources.record
    if record is not None:
        storage.refuse_wrong_base(form.skeleton, record, sources.adapter)
    bare = record.trained["parameters"] if record is not None else []
    prepared = rewriting.prepare(form.skeleton, sources.base, sources.adapter, bare)  # its words say more than PEFT's
    attached = None
    if Extent.of(form.skeleton).whole:
        attached = _Attached.of(form.load_base, lambda model: _put_on(model, sources))
    merger = prepared.merger
    expected = sources.base_record.tensors if sources.base_record is not None else {}
    made = rewriting.rewrite(prepared, form.staging, expected=expected, link=link)
    if made.untied:
        _untie_embeddings(form.staging)
    merged = form.load_merged()
    written, findings = form.write(merged, made, merger)
    findings += _read_back(form, prepared) if attached is None else attached.findings(merged, merger)
    findings += _against_quantized(form, attached, merged)
    return written, [*findings, _state_counts(form.ledger(made), made, merger)]


@dataclass(frozen=True)
class _OfArtifact(_Form):
    """An artifact becomes another one, with the same code; the `process` that will look at it has been started."""

    process: Alone

    @classmethod
    def begin(cls, sources: Sources, staging: Path, process: Alone) -> _OfArtifact:
        """Copies the code of an artifact, and builds its model of that, on the meta device."""
        base = sources.base_record
        assert base is not None
        with private.copy(sources.base, base) as own:
            kept = [name for name in base.files if not name.startswith(NEVER_COPIED)]
            copy_code(own, staging, [*base.code, *kept])
            return cls(sources, staging, _build_skeleton(own, sources.base), process)

    @property
    def records(self) -> tuple[Manifest, Manifest]:
        """The manifests of the base and of the adapter."""
        assert self.sources.base_record is not None and self.sources.record is not None
        return self.sources.base_record, self.sources.record

    def load_base(self, **options: Any) -> PreTrainedModel:
        """Loads the artifact that `inputs.read` has asked about, and no other that stands there by now."""
        with trust.permitting(trust.fingerprint(self.records[0])):
            return loading.load_artifact(self.sources.base, **options)

    def load_merged(self, **options: Any) -> PreTrainedModel:
        """Loads it with code that was verified where it was copied from; it has no manifest yet."""
        return _load_staged(self.staging, **options)

    def write(self, merged: PreTrainedModel, made: Rewritten, merger: Merger) -> tuple[Manifest, list[Finding]]:
        """Writes certificate, card and manifest; a fresh process looks at it."""
        base, record = self.records
        draft = Manifest(
            kind="artifact",
            base=base.base,
            lineage=[*base.lineage, _step(record, made, merger)],
            edits=base.edits,
            code=base.code,
            requirements=base.requirements,
            recipe=base.recipe,
            failed=results.join_failed(base.failed, record.failed),
        )
        written = write(merged, self.staging, draft, Extent.of(self.skeleton), stored=made.digests)
        return written, [*verify(merged, self.staging, self.process)]

    def ledger(self, made: Rewritten) -> Finding:
        """Compares them with what the adapter says that it trains."""
        base, record = self.records
        return changes.merge_ledger(_with_added(base, made, self.skeleton), made.digests, record)


def _against_quantized(form: _Form, attached: _Attached | None, merged: PreTrainedModel) -> list[Finding]:
    """Measures how far the merged model is from the one that was trained, where that was quantised."""
    record = form.sources.record
    if record is None or "quantization" not in record.base:
        return []
    if attached is None or attached.output is None:
        return quantized.not_looked_at(attached.why if attached is not None else "a model of this size is not run")
    return quantized.findings(
        record.base["quantization"],
        attached.inputs,
        merged,
        lambda config: storage.load_adapter(form.load_base(**quantizing.on_cpu(config)), form.sources.adapter),
        lambda config: form.load_merged(**quantizing.on_cpu(config)),
    )


def _read_back(form: _Form, prepared: rewriting.Prepared) -> list[Finding]:
    """Says what there is to say of a model that is too large to be run: of its changed tensors, read back."""
    found = read_back.compare(prepared, form.sources.adapter, form.staging)
    unseen = agreement.not_looked_at("a model of this size is not run as a whole")
    return [found.finding(list(prepared.merger.changes)), unseen]


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


def _merge_stock(
    sources: Sources, staging: Path, link: bool, trust_remote_code: bool, layout: str | None
) -> tuple[Manifest, list[Finding]]:
    skeleton = loading.load_base(str(sources.base), device="meta", trust_remote_code=trust_remote_code).model
    more = [*companions.copy_all(sources.base, staging, card=False).findings(), *_state_unread(sources.adapter)]
    if sources.record is not None:
        written, findings = _merge(_OfStock(sources, staging, skeleton, trust_remote_code), link)
        return written, [*findings, *more]
    with expert_files.in_own_layout(sources.adapter, skeleton, layout) as own:
        configured.refuse_marked(own.directory / storage.WEIGHTS)
        form = _OfStock(replace(sources, adapter=own.directory), staging, skeleton, trust_remote_code)
        written, findings = _merge(form, link)
    found = [Finding(expert_files.FINDING, True if own.sure else None, own.words)] if own.words else []
    return written, [*findings, *more, *found]


@dataclass(frozen=True)
class _OfStock(_Form):
    """A plain model becomes another one, with the base's layout and files."""

    trust_remote_code: bool

    def load_base(self, **options: Any) -> PreTrainedModel:
        """Loads the plain model as transformers does."""
        return loading.load_plain(self.sources.base, trust_remote_code=self.trust_remote_code, **options)

    def load_merged(self, **options: Any) -> PreTrainedModel:
        """Loads it as transformers does; a large one on the meta device."""
        if not Extent.of(self.skeleton).whole:
            return loading.load_base(str(self.staging), device="meta", trust_remote_code=self.trust_remote_code).model
        return loading.load_plain(self.staging, trust_remote_code=self.trust_remote_code, **options)

    def write(self, merged: PreTrainedModel, made: Rewritten, merger: Merger) -> tuple[Manifest, list[Finding]]:
        """Lists what was merged, with a card: that of the base says what the base is."""
        before, record = self.sources.base_record, self.sources.record
        origin = before.base if before is not None else companions.origin(self.sources.base)
        draft = Manifest(
            kind="stock",
            base=origin,
            lineage=[
                *(before.lineage if before is not None else [{"step": "base", **origin}]),
                _step(record, made, merger),
            ],
            tensors=made.digests,
            headers={path.name: format.header_digest(path) for path in made.files},
            versions=packages.current_versions(),
            recipe=before.recipe if before is not None else None,
            failed=results.join_failed(*(each.failed for each in (before, record) if each is not None)),
        )
        stock.write_card(self.staging, draft, anatomy.count(merged.parameters()))
        written = stock.list_files(self.staging, draft)
        written.write(self.staging)
        return written, [_same_keys(self.sources.base, self.staging, made)]

    def ledger(self, made: Rewritten) -> Finding:
        """Compares them with what the adapter holds tensors for."""
        return changes.only_these_changed(made.base, made.digests, {*made.given, *made.added})


def _state_unread(adapter: Path) -> list[Finding]:
    """Says that what a regular expression of the adapter's file reaches was not asked."""
    why = "no regular expression of a file is run: what the adapter holds tensors for is merged, and all of that"
    return [Finding.unseen(f"{field} reaches what is merged", why) for field in configured.expressions(adapter)]


def _put_on(model: PreTrainedModel, sources: Sources) -> PeftModel:
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


def _step(record: Manifest | None, made: Rewritten, merger: Merger) -> dict[str, Any]:
    """Returns what the lineage says of a merge; `record` is the adapter's manifest, if it has one."""
    return {
        **(_told(record) if record is not None else {}),
        "step": "merge",
        "adapter": hashing.digest_values({key: entry.digest() for key, entry in merger.entries.items()}),
        **({"trained": record.trained} if record is not None else {}),
        "ledger": made.counts(merger),
    }


def _told(record: Manifest) -> dict[str, Any]:
    """Returns what the training of an adapter says of itself: its data on the hub, and its figures."""
    return {key: value for step in record.lineage[:1] for key, value in step.items() if key != "step"}
