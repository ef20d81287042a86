"""`solidify.export`: an artifact in another form, compared with the artifact before it appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from solidify.adapter import expert_layouts
from solidify.artifact import companions, loading, quantizing
from solidify.directory import manifest, packages, results, trust, writing
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, refuse
from solidify.exporting import graph, precision, stock
from solidify.findings import Finding, Report, tell
from solidify.system import console, files, markup
from solidify.weights import checkpoint, format, hashing

GGUF = (
    "no kept converter to GGUF can be installed (the package gguf only writes files); export --as stock, then run "
    "llama.cpp's convert_hf_to_gguf.py on that directory (docs/export.md says how)"
)

# What a form writes into a directory, of a loaded artifact; the digests of its tensors, and what was compared.
Write = Callable[[PreTrainedModel, Path, Manifest, Path], tuple[dict[str, str], list[Finding]]]
FORMS: Mapping[str, Write] = {
    "stock": stock.write,
    "onnx": graph.write,
    **{word: partial(precision.write, word=word) for word in (*precision.DTYPES, *quantizing.WORDS)},
}


@dataclass(frozen=True, repr=False)
class Exported:
    """A finished directory, its manifest, and what was found when it was compared with the artifact.

    An adapter for other programs has no manifest: it is theirs.
    """

    directory: Path
    manifest: Manifest | None
    findings: list[Finding]

    def __repr__(self) -> str:
        return f"Exported({self.directory}: {tell(Report('', {'export': self.findings}).verdicts)})"

    def _repr_html_(self) -> str:
        rows = [(finding.name, finding.verdict, finding.evidence) for finding in self.findings]
        return markup.table(repr(self), ("promise", "verdict", "evidence"), rows)


def export(
    directory: str | Path,
    output: str | Path,
    form: str = "stock",
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes an artifact, or an adapter, in another form; the original is unchanged.

    `stock` is the plain model of the family, which loads without any code of the artifact: for results that the
    family's own configuration and classes can express (layers removed or repeated, experts pruned or repeated, tokens
    added, adapters merged). A fresh process loads both; every tensor and output must be bit-identical. `onnx` is a
    graph for ONNX Runtime, of any artifact, whose outputs are compared with the artifact's. `float32`,
    `bfloat16`, `float16` write another dtype, `nf4` and `int8` linear layers packed by bitsandbytes, of a plain model
    too: a fresh process compares all with the artifact, loaded so, and what it does to the outputs is measured.

    An adapter (of the model `base`, where its own record of that is out of date) is written for plain PEFT and others
    with its experts in one of the layouts of docs/expert_lora.md (`peft`, `grouped`, `lists`, `stacked`), is read back,
    and every update must be the same, bit for bit.

    Raises:
        ArtifactError: the form is unknown; the family cannot build what the surgery has made (the modules are named);
            a package is missing; `output` exists and is not ours; or what was written is not what the artifact is.
            Nothing is then left at `output`.
    """
    directory, output = Path(directory).resolve(), Path(output)
    if files.is_file(directory / manifest.ADAPTER_CONFIG) and not files.is_file(directory / "config.json"):
        from solidify.exporting import expert_adapter  # which imports PEFT

        return Exported(output, None, expert_adapter.export(directory, output, form, base, trust_remote_code))
    if form in expert_layouts.NAMES:
        raise ArtifactError(f"{form} is a layout of an adapter's experts, and {directory} is no adapter")
    if form not in FORMS:
        why = GGUF if form == "gguf" else f"there are {', '.join(FORMS)}"
        raise ArtifactError(f"an artifact cannot be exported as {form!r}: {why}")
    record = manifest.read(directory, manifest.MODELS)
    if packed := files.document(directory / "config.json").get("quantization_config"):
        raise ArtifactError(
            f"the weights of {directory} are packed ({packed['quant_method']}), and what was rounded is lost; export "
            "the model that it was made from"
        )
    if record.kind == "stock" and form == "stock" and record.code:
        raise ArtifactError(f"{directory} is an artifact in another dtype; export the artifact that it was made from")
    if record.kind == "stock" and form == "stock":
        raise ArtifactError(f"{directory} is a plain model of its family already: use it as it is, or copy it")
    writing.refuse_foreign(output, [directory], work="export")
    model = loading.load_artifact(directory, trust_remote_code=trust_remote_code)
    with writing.staged(output, [directory], work="export") as staging:
        with console.stage(f"Exporting {directory.name} as {form}"), trust.permitting(trust.fingerprint(record)):
            digests, findings = FORMS[form](model, directory, record, staging)
        failed = [f"{finding.name}: {finding.evidence}" for finding in findings if finding.passed is False]
        refuse(ArtifactError, f"the {form} form is not what the artifact is", failed)
        findings = [*findings, *companions.carry(directory, staging).findings()]
        kept = replace(record, failed=results.join_failed(record.failed, results.failed_of(findings)))
        written = _write_manifest(kept, staging, form, digests)
        if written.code and trust.known(record) and not trust.leads(staging, written, every_kind=True):
            trust.remember(written)  # the code of what runs here already
    return Exported(output, written, [*findings, *map(Finding.of, record.failed)])


def _write_manifest(record: Manifest, staging: Path, form: str, digests: Mapping[str, str]) -> Manifest:
    """Lists all that was written, as the manifest of a plain model."""
    weights = {path.name for path in checkpoint.weight_files(staging)} if digests else set()
    files = {
        path.relative_to(staging).as_posix(): hashing.digest_file(path)
        for path in sorted(staging.rglob("*"))
        if path.is_file() and path.name not in weights and path.suffix != ".py"
    }
    carries = (staging / next(iter(record.code), ".")).is_file()
    written = Manifest(
        kind="stock",
        code=record.code if carries else {},
        requirements=record.requirements if carries else {},
        base=record.base,
        lineage=[*record.lineage, {"step": "export", "form": form, "artifact": record.digest()}],
        files=files,
        tensors=dict(digests),
        headers={name: format.header_digest(staging / name) for name in sorted(weights)},
        versions=packages.current_versions(),
        failed=record.failed,
    )
    written.write(staging)
    return written
