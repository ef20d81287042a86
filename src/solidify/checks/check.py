"""Every check that applies to a directory of ours: an artifact, an adapter, or the output of a whole run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from solidify.artifact import certificate, companions, fresh, loading, stock, vocabulary
from solidify.checks.served_run import served
from solidify.checks.serving import serving
from solidify.directory import manifest, ours, packages, private, results, signing, trust
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError
from solidify.findings import Finding, Report
from solidify.system import console, files
from solidify.system.alone import Alone

INTACT = "nothing was changed since it was written"
MADE = "no check failed when it was made"
PACKAGES = "packages that it requires are of the versions that it was made with"
CLOSED = "the run holds what was written"


def check(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    serve: str | Path | None = None,
    key: str | Path | None = None,
) -> Report:
    """Checks an artifact, an adapter or a run's output directory in fresh processes; nothing is changed.

    Of a stock model that solidify wrote, files and tensors are compared. `base` says where an adapter's artifact is
    now, if it moved.

    Files and tensors are compared with the manifest before any code of the directory runs; when something differs, none
    of it runs. A run's report and page are compared too, and it holds nothing else. With a public `key` the signature
    is verified; without one the finding says whom a signature names.

    Raises:
        ArtifactError: solidify did not write the directory, or its code was not built on this machine and
            `trust_remote_code` is not given; the key cannot be used, or `model-signing` is not installed.
    """
    key = None if key is None else Path(key)
    if key is not None:
        signing.require_usable(key)
    directory = Path(directory).resolve()
    report = Report(str(directory))
    listed = [*ours.PARTS, *(f"{ours.HEAL}/{part}" for part in ours.PARTS)]
    parts = [d for d in listed if files.is_file(directory / d / manifest.NAME)]
    if parts and not files.is_file(directory / manifest.NAME):
        closed = _check_closed(directory, parts)
        for part in parts:
            if closed.passed:
                below = _find_base(directory, part, parts) if base is None else base
                report.add(part, _check_one(directory / part, below, trust_remote_code, serve, key))
            else:
                report.add(part, _check_unrun(directory / part, key)[1])
        report.add("run", [closed])
        if len(parts) > 1 or (directory / ours.REPORT).exists():
            report.add("run", [results.together(directory)])
    else:
        record = manifest.read(directory, closed=False)
        report.add(record.kind, _check_one(directory, base, trust_remote_code, serve, key))
    return report


def _find_base(directory: Path, part: str, parts: list[str]) -> Path | None:
    """Returns the artifact of this very run that its adapter was trained on: surgery's, or one that healing made."""
    if not part.endswith("adapter"):
        return directory / "artifact" if "artifact" in parts else None
    wanted = manifest.read(directory / part, closed=False).base
    made = [directory / each for each in parts if not each.endswith("adapter")]
    for each in made:
        digest = manifest.read(each, closed=False).digest()
        if all(wanted.get(key) == value for key, value in digest.items()):
            return each
    return made[0] if made else None


def _check_closed(directory: Path, parts: list[str]) -> Finding:
    """Looks at what stands in a run's directory beside its parts, which are each looked at for themselves."""
    faults = ours.unlike_a_run(directory)
    extras = [name for name in (ours.CHECKPOINTS, ours.REPORT, ours.PAGE) if (directory / name).exists()]
    held = f"{', '.join([*parts, *extras])}, and nothing else (a report by a digest of its own)"
    return Finding(CLOSED, not faults, "; ".join(faults[:6]) or held)


def _check_one(
    directory: Path, base: str | Path | None, trust_remote_code: bool, serve: str | Path | None, key: Path | None
) -> list[Finding]:
    kind = manifest.read(directory, closed=False).kind
    with _start_process(kind) as process:  # it imports while files are compared
        record, first = _check_unrun(directory, key)
        if record.kind != kind:
            raise ArtifactError(f"{directory} was replaced while it was checked: it was of kind {kind}; check it again")
        if not first[0].passed or any(finding.passed is False for finding in first):
            return first
        if process is None:  # a plain model: any tool may load it, and none of its code is ours to run
            return first
        if record.kind == "adapter":
            return first + _check_adapter(directory, record, base, trust_remote_code, process)
        return first + _check_artifact(directory, record, trust_remote_code, serve, process)


def _start_process(kind: str) -> AbstractContextManager[Alone | None]:
    """Starts the fresh process that will run what is checked; none runs a plain model."""
    if kind == "stock":
        return nullcontext()
    return Alone(Path(__file__).with_name("adapter_alone.py")) if kind == "adapter" else fresh.started()


def _check_unrun(directory: Path, key: Path | None) -> tuple[Manifest, list[Finding]]:
    """Reads a manifest, and compares the directory and its signature with that, before any of its code runs.

    Whoever goes on with what was found goes on with this manifest, and reads none again.
    """
    record = manifest.read(directory, closed=False)
    intact = _check_intact(directory, record)
    signed = signing.findings(directory, record, key, intact=intact.passed is not False)
    made = [Finding(MADE, False, f"{found['name']}: {found['evidence']}") for found in record.failed]
    return record, [intact, *signed, *made]


def _check_intact(directory: Path, record: Manifest) -> Finding:
    with console.stage(f"Comparing {directory.name} with its manifest"):
        faults = manifest.faults(directory, record, fresh=True) or trust.leads(directory, record)
    files = len(record.code) + len(record.files)
    if not faults and not (files and record.tensors):
        return Finding.unseen(INTACT, f"the manifest lists {files} files and {len(record.tensors)} tensors")
    counted = f"{files} files and {len(record.tensors)} tensors have their digests"
    return Finding(INTACT, not faults, "; ".join(faults[:6]) or counted)


def _check_artifact(
    directory: Path, record: Manifest, trust_remote_code: bool, serve: str | Path | None, process: Alone
) -> list[Finding]:
    trust.require(record, directory, trust_remote_code)
    missing, other = packages.version_faults(record)
    faults = "; ".join([*missing, *other])
    found = [Finding(PACKAGES, False if missing else None, faults)] if faults else []
    if missing:
        return found
    with trust.permitting(trust.fingerprint(record)):  # this very one, and no other that stands there by now
        return [*found, *_run_artifact(directory, record, serve, process)]


def _run_artifact(directory: Path, record: Manifest, serve: str | Path | None, process: Alone) -> list[Finding]:
    """Runs an artifact, whose code may, in every way in which it is checked."""
    with console.stage(f"Loading {directory.name} in a fresh process"), private.copy(directory, record) as own:
        findings = certificate.witness(own, process)
    if any(finding.passed is False for finding in findings):
        return findings
    with console.stage(f"Reading what servers would say of {directory.name}"):
        findings += _look_within(directory, record)
    if serve is None:
        return findings
    with console.stage(f"Serving {directory.name}"):
        return [*findings, served(directory, serve)]


def _look_within(directory: Path, record: Manifest) -> list[Finding]:
    """Loads an artifact, whose code may run, once: compares its tokenizer with it, and says what may serve it."""
    if not companions.has_tokenizer(directory) and not vocabulary.added_tokens(record.edits):
        return serving(directory, record)
    held = loading.load_for_looking(directory)
    fitting = vocabulary.findings(held.model, held.processor or held.tokenizer, record.edits)
    return [*fitting, *serving(directory, record, held.model)]


def _check_adapter(
    directory: Path, record: Manifest, where: str | Path | None, trust_remote_code: bool, process: Alone
) -> list[Finding]:
    from solidify.adapter import storage  # which imports PEFT, and that takes as long as torch does

    base = Path(where).resolve() if where is not None else storage.find_base(record, directory)
    below_record = stock.read(base, closed=False)
    fits = below_record.digest()
    wrong = [key for key in fits if record.base.get(key) != fits[key]]
    fit = Finding(
        "the base is the recorded one",
        not wrong,
        f"differs in {', '.join(wrong)}" if wrong else f"digests of {base} match",
    )
    if stock.is_plain(base):
        below = Finding.unseen(INTACT, "a plain model without a manifest: its digests are compared with the adapter's")
    else:
        below = _check_intact(base, below_record)
    findings = [fit, replace(below, name="its base is intact")]
    if wrong or below.passed is False:
        return findings
    trust.require(below_record, base, trust_remote_code)
    request = {"base": str(base), "adapter": str(directory), "permitted": trust.fingerprint(below_record)}
    request["manifest"] = record.sha256
    try:
        with console.stage(f"Loading {directory.name} on its base in a fresh process"):
            answer = process.ask(request)
    except ArtifactError as error:
        return [*findings, Finding("loads in a fresh process", False, str(error))]
    return findings + [Finding.of(finding) for finding in answer["findings"]]
