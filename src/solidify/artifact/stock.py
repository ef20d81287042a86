"""A plain model in the place of an artifact: a base as it stands, with a manifest, to train and to merge on.

No code of ours goes into it, and it loads as any model of its family does. Its files keep the layout of the base, and a
card that the base brings stays: it is that model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.artifact import cards, certificate, companions, descent, loading, tensors, vocabulary
from solidify.artifact.companions import Carried
from solidify.artifact.data_facts import DataFacts
from solidify.artifact.loading import BaseModel
from solidify.artifact.solidify import Artifact, Saveable, verify
from solidify.directory import manifest, packages, results, trust, writing
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, refuse
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.system import files, foreign
from solidify.weights import checkpoint, digest_cache, format, hashing, layout, transfer

_NOTHING = DataFacts()
_known: dict[tuple[str, str, str], dict[str, str]] = {}  # by weights, configuration and class


def build(
    base: BaseModel,
    directory: Path,
    *,
    recipe: dict[str, Any] | None = None,
    link: bool = True,
    facts: DataFacts = _NOTHING,
) -> Artifact:
    """Writes a loaded base as it stands, verifies that it loads as it is in memory; the model is unchanged.

    The `facts` of its data go into the configuration, and beside the tokenizer.

    Files that stay as they are become hard links where that is possible. A base that was loaded in another dtype than
    its files have is saved anew, by transformers. A base that is an artifact itself stays that artifact, beside these
    facts.

    Raises:
        ArtifactError: `directory` exists and is not ours, or what was written does not load as it is in memory.
    """
    source = companions.directory_of(base.model.config)
    with writing.staged(directory, [source] if source is not None else []) as staging:
        if descent.is_solid(base.model):
            return Artifact(directory, *_copy_artifact(base, staging, recipe, link, facts))
        carried = _fill_staging(base, source, staging, link)
        facts.write(staging, base.processor or base.tokenizer)
        _describe(staging, base, recipe).write(staging)
        findings = [*_reload(base.model, staging), *_say_vocabulary(base), *carried.findings()]
        results.keep_failures(staging, findings)
        record = manifest.read(staging, closed=False)
    return Artifact(directory, record, findings)


def _copy_artifact(
    base: BaseModel, staging: Path, recipe: dict[str, Any] | None, link: bool, facts: DataFacts
) -> tuple[Manifest, list[Finding]]:
    """Puts an artifact into another directory, file by file, and has a fresh process load it there.

    Raises:
        ArtifactError: the source changed meanwhile, or the fresh process found a difference.
    """
    source = Path(base.model.config.name_or_path)
    record = manifest.read(source, "artifact")
    for name in record.listed():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        transfer.link_or_copy(source / name, staging / name, link=link and name in record.headers)
    replace(record, recipe=recipe).write(staging)
    record = manifest.read(staging, "artifact")
    refuse(ArtifactError, f"{source} changed while it was read", manifest.faults(staging, record))
    if facts != _NOTHING:
        record = _list_again(record, staging, base, facts)
    return record, verify(base.model, staging)


def _list_again(record: Manifest, staging: Path, base: BaseModel, facts: DataFacts) -> Manifest:
    """Puts the facts into the copy of an artifact, which may run if the artifact may; returns its new manifest."""
    facts.write(staging, base.processor or base.tokenizer)
    found = [path for path in staging.rglob("*") if path.is_file()]
    names = {path.relative_to(staging).as_posix(): path for path in sorted(found)}
    others = {name: path for name, path in names.items() if name not in {*record.code, *record.headers, manifest.NAME}}
    made = replace(record, files={name: hashing.digest_file(path) for name, path in others.items()})
    made.write(staging)
    if trust.known(record):
        trust.remember(made)
    return manifest.read(staging, "artifact")


def _fill_staging(base: BaseModel, source: Path | None, staging: Path, link: bool) -> Carried:
    """Writes all files but the manifest."""
    if source is not None and _stands_in(source, base.model):
        carried = companions.copy_all(source, staging)
        for path in _list_weights(source):
            transfer.link_or_copy(path, staging / path.name, link=link and path.suffix == ".safetensors")
        return carried
    with foreign.calling("transformers cannot save the base", ArtifactError):
        base.model.save_pretrained(staging)
        for each in (base.processor, base.tokenizer):
            if each is not None:
                each.save_pretrained(staging)
    preparing: Saveable | None = base.processor or base.tokenizer
    return companions.carry(source, staging, preparing) if source is not None else Carried()


def _stands_in(source: Path, model: PreTrainedModel) -> bool:
    """Returns whether the files of a base are what the model in memory is, its dtype included."""
    try:
        entries = checkpoint.read(source).entries
    except ArtifactError:
        return False
    config = files.document(source / "config.json")
    floating = (e.shape.dtype for e in entries.values() if e.shape.dtype.is_floating_point)
    stored = config.get("dtype") or config.get("torch_dtype") or next(floating, torch.float32)
    return str(stored).removeprefix("torch.") == str(model.dtype).removeprefix("torch.")


def _list_weights(source: Path) -> list[Path]:
    """Returns the weight files and their index."""
    index = checkpoint.index_of(source)
    return [*checkpoint.weight_files(source), *([index] if index is not None else [])]


def _describe(staging: Path, base: BaseModel, recipe: dict[str, Any] | None) -> Manifest:
    """Lists what was written, after the card where the base has none."""
    origin, weights = base.origin, checkpoint.weight_files(staging)
    draft = Manifest(
        kind="stock",
        base=origin,
        lineage=[{"step": "base", **origin}],
        tensors=digest_cache.digests(weights),
        headers={path.name: format.header_digest(path) for path in weights},
        versions=packages.current_versions(),
        recipe=recipe,
        failed=results.failed_of_base(companions.directory_of(base.model.config)),
    )
    if not (staging / manifest.CARD).is_file():
        write_card(staging, draft, anatomy.count(base.model.parameters()))
    return list_files(staging, draft)


def write_card(staging: Path, draft: Manifest, parameters: int) -> None:
    """Writes the card of a plain model beside its files, in the place of what stands there."""
    (staging / manifest.CARD).write_text(cards.stock_card(staging, draft, parameters), encoding="utf-8")


def list_files(staging: Path, draft: Manifest) -> Manifest:
    """Returns a manifest that knows its weight files, with all others."""
    found = {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if path.is_file()}
    others = {n: hashing.digest_file(path) for n, path in found.items() if n not in {*draft.headers, manifest.NAME}}
    return replace(
        draft,
        code={name: digest for name, digest in others.items() if name.endswith(".py")},
        files={name: digest for name, digest in others.items() if not name.endswith(".py")},
    )


def _reload(model: PreTrainedModel, staging: Path) -> list[Finding]:
    """Loads what was written and compares it with the model in memory.

    Raises:
        ArtifactError: it differs.
    """
    code = any(staging.glob("*.py"))  # it ran when the base was loaded
    again = loading.load_base(str(staging), trust_remote_code=code).model
    expected, found = (tensors.digests_where_they_stand(each.state_dict()) for each in (model, again))
    faults = [f"{name} differs" for name in {**expected, **found} if expected.get(name) != found.get(name)]
    state = Finding("state identical", not faults, "; ".join(faults[:4]) or f"{len(found)} tensors bit-identical")
    outputs = _compare_outputs(model, again)
    failed = [f"{each.name}: {each.evidence}" for each in (state, outputs) if each.passed is False]
    refuse(ArtifactError, "the base does not load again as it is in memory", failed)
    return [state, outputs]


def _compare_outputs(model: PreTrainedModel, again: PreTrainedModel) -> Finding:
    name = "outputs identical"
    if not Extent.of(model).whole:
        return Finding.unseen(name, "a model of this size is not run as a whole")
    made = foreign.attempt(certificate.make_inputs, model)
    if made.value is None:
        return Finding.unseen(name, foreign.said(made.error) if made.error else "no inputs could be made up")
    for each in (model, again):
        tensors.align(each)
    ran = {case: (anatomy.run(model, batch), anatomy.run(again, batch)) for case, batch in made.value.items()}
    differing = [case for case, (before, after) in ran.items() if not torch.equal(before, after)]
    return Finding(name, not differing, f"{', '.join(differing)} differ" if differing else f"{len(made.value)} cases")


def _say_vocabulary(base: BaseModel) -> list[Finding]:
    return vocabulary.findings(base.model, base.processor or base.tokenizer)


def described(directory: Path) -> Manifest:
    """Returns what a manifest would say of a plain model that has none: its files' digests, now.

    Raises:
        ArtifactError: it holds no whole safetensors.
    """
    weights = checkpoint.read(directory).files
    code = {path.name: hashing.digest_file(path) for path in sorted(directory.glob("*.py"))}
    return Manifest(
        kind="stock",
        base=(origin := companions.origin(directory)),
        lineage=[{"step": "base", **origin}],
        code=code,
        files={"config.json": hashing.digest_file(directory / "config.json")},
        tensors=digest_cache.digests(weights),
        headers={path.name: format.header_digest(path) for path in weights},
    )


def is_plain(directory: str | Path) -> bool:
    """Returns whether a directory holds a plain model, whole safetensors and a configuration, without a manifest."""
    where = Path(directory)
    if files.is_file(where / manifest.NAME) or not files.is_file(where / "config.json"):
        return False
    return not foreign.attempt(checkpoint.weight_files, where).failed


def read(directory: Path, *, closed: bool = True) -> Manifest:
    """Returns the manifest of an artifact or a plain model; of one that has none, what it would say.

    Raises:
        ArtifactError: as `manifest.read`.
    """
    return described(directory) if is_plain(directory) else manifest.read(directory, manifest.MODELS, closed=closed)


def load(directory: str | Path, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """Loads an artifact or a plain model, with a manifest (all digests are compared first) or without.

    Raises:
        ArtifactError: as `loading.load_artifact`.
        ModelError: a plain model cannot be loaded.
    """
    if not is_plain(directory):
        return loading.load_artifact(directory, trust_remote_code=trust_remote_code, **options)
    return loading.load_plain(Path(directory).resolve(), trust_remote_code=trust_remote_code, **options)


def digests_in_memory(directory: Path, record: Manifest, skeleton: Callable[[], PreTrainedModel]) -> dict[str, str]:
    """Returns the digest of every tensor of a plain model by its name in memory.

    Files of a hub's layout have other names, and other tensors, than the model: these are made once, one after the
    other. `skeleton` builds the model on the meta device.
    """
    model = skeleton()
    key = (record.digest()["weights"], record.digest()["configuration"], type(model).__qualname__)
    if key not in _known:
        stored = checkpoint.read(directory)
        found = layout.read(model, stored)
        digests = {name: record.tensors[file] for name, file in found.stored.items()}
        for conversion in found.conversions:
            made = conversion.make(model, {key: stored.entries[key].read() for key in conversion.keys})
            digests |= {name: tensors.digest(tensor) for name, tensor in made.items() if name in conversion.targets}
        _known[key] = digests
    return _known[key]
