"""Model and edits become a self-contained directory that loads anywhere without us, verified before it appears."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel

from solidify.artifact import (
    cards,
    certificate,
    companions,
    descent,
    fresh,
    loading,
    sources,
    tensors,
    unchanged,
    vocabulary,
)
from solidify.directory import manifest, packages, private, results, trust, writing
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError, refuse
from solidify.findings import Finding, Report, tell
from solidify.model import anatomy, operations
from solidify.model.cost import cost
from solidify.model.extent import Extent
from solidify.surgery import describing, ledger
from solidify.surgery.edit_record import Edit
from solidify.system import console, foreign, markup
from solidify.system.alone import Alone
from solidify.upstream.transformers import REFERENCE
from solidify.weights import checkpoint, format, hashing, store
from solidify.weights.format import Entry


class Saveable(Protocol):
    """A tokenizer, processor or the like."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Writes its files."""


# Of an artifact: what another has of its own. Its weight files may be others, so their index is.
NEVER_COPIED = ("certificate/", manifest.CARD, manifest.NAME, checkpoint.INDEX)


@dataclass(frozen=True, repr=False)
class Artifact:
    """A finished directory, its manifest, and what the fresh process found."""

    directory: Path
    manifest: Manifest
    findings: list[Finding]

    def __repr__(self) -> str:
        return f"Artifact({self.directory}: {tell(Report('', {'build': self.findings}).verdicts)})"

    def _repr_html_(self) -> str:
        rows = [(finding.name, finding.verdict, finding.evidence) for finding in self.findings]
        return markup.table(repr(self), ("promise", "verdict", "evidence"), rows)


def build(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    directory: str | Path,
    *,
    tokenizer: Saveable | None = None,
    base: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    link: bool = True,
    process: Alone | None = None,
    extent: Extent | None = None,
    found: Sequence[Finding] = (),
) -> Artifact:
    """Writes the edited model as an artifact and verifies it in a fresh process; the model is unchanged.

    The directory appears by rename once every tensor, buffer and output has been found bit-identical by a process in
    which solidify and peft cannot be imported. Of a bounded model (`extent`; left out, its size decides), samples of
    every tensor and the outputs of the first new module of each kind are. `base` says where the model came from (its
    `name_or_path` when left out); `recipe` is kept in the manifest. `tokenizer` may be a processor, which holds one;
    without it, the base's travels, as every file of the base does that is not written anew (`companions.carry`).

    Weight files of the base that stay as they are become hard links where the file system allows it; without `link`
    they are copied. Tensors that are mapped from files and unchanged never pass through memory. `process` is the fresh
    process, where it was started before (`certificate.started`). What was `found` before is kept where it failed.

    Raises:
        ArtifactError: an edit does not stand in the model, the tokenizer has ids without an embedding, a source cannot
            travel, `directory` exists and is not ours, or the fresh process found a difference. Nothing is left behind.
    """
    directory = Path(directory)
    extent = extent or Extent.of(model)
    with writing.staged(directory, _list_inputs(model, edits)) as staging:
        written, findings = _fill_staging(model, edits, staging, tokenizer, base, recipe, link, extent, found)
        with console.stage("Loading it in a fresh process"):
            findings = [*verify(model, staging, process), *findings]
        _remember_built(model, tokenizer, written)  # before it appears: who is killed in between finds nothing, or all
    return Artifact(directory, written, findings)


def write_again(
    model: PreTrainedModel,
    source: Path,
    directory: Path,
    step: dict[str, Any],
    *,
    link: bool = True,
    found: Sequence[Finding] = (),
) -> Artifact:
    """Writes an artifact that was loaded from `source`, and whose values have changed since, as one of its own.

    Code, configuration and tokenizer are those of the source, settings for generation those of the model. Files whose
    tensors did not change become links, and the lineage ends in `step`. It is verified in a fresh process. What was
    `found` before is kept where it failed, as is what the source keeps.

    Raises:
        ArtifactError: as `build`; nothing is left behind.
    """
    base = manifest.read(source, "artifact")
    with writing.staged(directory, [source]) as staging, fresh.started() as process:
        with private.copy(source, base) as own:
            copy_code(own, staging, [*base.code, *(n for n in base.files if not n.startswith(NEVER_COPIED))])
        if _generates_otherwise(model, staging):
            _write_generation(model, staging, "correct model.generation_config")
        failed = [*base.failed, *results.failed_of(found)]
        draft = replace(base, lineage=[*base.lineage, step], failed=failed, files={}, tensors={}, headers={})
        written = write(model, staging, draft, Extent.of(model), link=link)
        with console.stage("Loading it in a fresh process"):
            findings = verify(model, staging, process)
        _remember_built(model, None, written)
    return Artifact(directory, written, findings)


def _write_generation(model: PreTrainedModel, staging: Path, remedy: str) -> None:
    with foreign.calling("the model's settings for generation cannot be written", ArtifactError, remedy=remedy):
        model.generation_config.save_pretrained(staging)


def _generates_otherwise(model: PreTrainedModel, directory: Path) -> bool:
    """Returns whether a model's settings for generation are other than those that stand in a directory."""
    if not model.can_generate():
        return False
    read = foreign.attempt(GenerationConfig.from_pretrained, directory).value
    found = [config.to_dict() for config in (model.generation_config, read) if config is not None]
    for document in found:
        document.pop("transformers_version", None)
    return len(found) < 2 or found[0] != found[1]


def _remember_built(model: PreTrainedModel, tokenizer: Saveable | None, written: Manifest) -> None:
    """Notes that the artifact was built here, unless code of strangers is in it, which ran by permission."""
    if not (strange := trust.strange_classes(model, tokenizer)):
        trust.remember(written)
        return
    console.words.print(
        f"It carries code that came with its base ({', '.join(strange[:4])}) and ran because you permitted it, so "
        "loading it asks again; to let the code run from now on: solidify trust DIR"
    )


def assemble(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    directory: Path,
    *,
    tokenizer: Saveable | None = None,
    base: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Manifest:
    """Writes an artifact as `build` does, but leaves it to the caller to have a fresh process witness it."""
    with writing.staged(directory, _list_inputs(model, edits)) as staging:
        return _fill_staging(model, edits, staging, tokenizer, base, recipe, True, Extent.of(model))[0]


def _list_inputs(model: PreTrainedModel, edits: Sequence[Edit]) -> list[Path]:
    """Returns what an artifact is made from: the directory of its base, and the files of the new modules' classes."""
    base = str(getattr(model.config, "name_or_path", "") or "")
    modules = dict(model.named_modules(remove_duplicate=False))
    classes = {type(modules[edit.name]) for edit in edits if edit.name in modules}
    files = (vars(sys.modules[cls.__module__]).get("__file__") for cls in classes if cls.__module__ in sys.modules)
    return [Path(path) for path in (base, *files) if path]


def _fill_staging(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    staging: Path,
    tokenizer: Saveable | None,
    base: dict[str, Any] | None,
    recipe: dict[str, Any] | None,
    link: bool,
    extent: Extent,
    found: Sequence[Finding] = (),
) -> tuple[Manifest, list[Finding]]:
    edits = [*describing.made_by(model), *edits]
    refuse(ArtifactError, "the edits do not fit the model", _edit_faults(model, edits))
    source = companions.directory_of(model.config)
    travelling = tokenizer
    if tokenizer is None and source is not None and companions.has_tokenizer(source):
        travelling = loading.tokenizer_in(source, trust_remote_code=descent.is_solid(model))
        if travelling is None:
            companions.refuse_broken_tokenizer(source)
    records = [edit.document() for edit in edits]
    before = _trace_descent(model, base)
    vocabulary.refuse_unfit(model, travelling, edits=[*before.edits, *records])
    code = sources.compile_sources(model, edits)
    for name, text in code.files.items():
        (staging / name).write_text(text, encoding="utf-8")
    (staging / "config.json").write_text(_write_config(model, code), encoding="utf-8")
    if model.can_generate():
        _write_generation(model, staging, "correct generation_config.json of the base")
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    carried = companions.Carried() if source is None else companions.carry(source, staging, tokenizer)
    findings = [*vocabulary.findings(model, travelling, [*before.edits, *records]), *carried.findings()]
    draft = replace(
        before,
        lineage=[*before.lineage, {"step": "surgery", "edits": records, **_count_figures(model, records)}],
        edits=[*before.edits, *records],
        failed=[*before.failed, *results.failed_of([*found, *findings])],
        code={name: hashing.digest_bytes(text.encode()) for name, text in code.files.items()},
        requirements=code.requirements,
        recipe=recipe,
    )
    return write(model, staging, draft, extent, link=link), findings


def _count_figures(model: PreTrainedModel, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the numbers that plan, run, card and diff show: of tensors, and of FLOPs."""
    return {"tensors": ledger.counts(model.state_dict(), records), "cost": cost(model).document()}


def _trace_descent(model: PreTrainedModel, base: dict[str, Any] | None) -> Manifest:
    """Returns where the model comes from, what was done to it until now, the edits among that, and what failed.

    A model that was loaded from an artifact has the artifact's history.
    """
    if descent.is_solid(model):
        before = manifest.read(Path(model.config.name_or_path), "artifact")
        return Manifest("artifact", before.base, before.lineage, before.edits, failed=before.failed)
    earlier = results.failed_of_base(companions.directory_of(model.config))
    found = base or {
        "model": model.config.name_or_path,
        "class": type(model).__name__,
        **companions.rights(model.config),
    }
    return Manifest("artifact", found, [{"step": "base", **found}], failed=earlier)


def write(
    model: PreTrainedModel,
    staging: Path,
    draft: Manifest,
    extent: Extent,
    *,
    stored: dict[str, str] | None = None,
    link: bool = True,
) -> Manifest:
    """Adds weights, certificate, card and manifest to a staged directory that holds code and configuration.

    With `stored`, the digests of its tensors, the weights stand there already and are what `model` was loaded from.
    """
    if stored is None:
        state = model.state_dict(keep_vars=True)
        tied = _find_tied(model, state)
        origins = _find_origins(model, {n: t for n, t in state.items() if n not in tied}) if extent.whole else {}
        files = {entry.file for entry in (*origins.values(), *store.origins_in_memory(state).values())}
        with checkpoint.steady(files):
            stored = store.store(state, staging, tied=tied, origins=origins, link=link)
            certificate.write(model, staging, stored, draft.edits, extent)
    else:
        certificate.write(model, staging, stored, draft.edits, extent)
    draft = replace(draft, versions=packages.current_versions())
    (staging / manifest.CARD).write_text(cards.artifact_card(model, staging, draft), encoding="utf-8")
    others = _other_files(staging, set(draft.code))
    finished = replace(
        draft,
        tensors=stored,
        headers={path.name: format.header_digest(path) for path in checkpoint.weight_files(staging)},
        code={**draft.code, **{name: digest for name, digest in others.items() if name.endswith(".py")}},
        files={name: digest for name, digest in others.items() if not name.endswith(".py")},
    )
    trust.refuse_leading(staging, finished)
    finished.write(staging)
    return finished


def _find_origins(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """Finds the tensors of a state in the files that the model was loaded from, as far as those are on this machine."""
    where = Path(str(model.config.name_or_path or "nowhere"))
    try:
        base = checkpoint.read(where)
    except ArtifactError:
        return {}
    return store.origins_by_digest(state, base, tensors.digests(state.items()))


def _find_tied(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Returns the names whose tensors come back by being tied to another, as they are now."""
    ties = model.all_tied_weights_keys
    declared = {n: first for n, first in operations.shared_keys(model).items() if first not in ties or n in ties} | ties
    return {
        name
        for name, source in declared.items()
        if name in state and source in state and state[name].data_ptr() == state[source].data_ptr()
    }


def verify(model: PreTrainedModel, staging: Path, process: Alone | None = None) -> list[Finding]:
    """Has a fresh process load what was written.

    Raises:
        ArtifactError: it found something that is not as in memory.
    """
    findings = certificate.witness(staging, process)
    failed = [finding for finding in findings if finding.passed is False]
    refuse(
        ArtifactError,
        "the artifact does not reload as it was in memory",
        [f"{finding.name}: {finding.evidence}{_describe_remedy(finding, model)}" for finding in failed],
    )
    return findings


def copy_code(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies named files of one artifact into another's directory, byte for byte."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _edit_faults(model: PreTrainedModel, edits: Sequence[Edit]) -> list[str]:
    if not edits:
        return [unchanged.words(model)]
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    faults = []
    for name, record in ledger.new_modules([edit.document() for edit in edits]).items():
        if name not in names:
            faults.append(f"the model has no module {name}")
        elif (found := type(model.get_submodule(name)).__name__) != record["new_class"]:
            faults.append(f"{name} is {found}, but the edit put {record['new_class']} there")
    shaped = ledger.reshaped_modules([edit.document() for edit in edits])
    faults += [f"the model has no module {name}" for name in shaped if name not in names]
    wrapped = sorted({type(m).__name__ for m in model.modules() if type(m).__module__.startswith("peft.")})
    if wrapped:
        faults.append(f"the model carries an adapter ({', '.join(wrapped)}); build it before, or merge the adapter")
    faults += [
        f"{name} is a complex parameter, which transformers loads frozen; hold it as real numbers (torch.view_as_real)"
        for name, parameter in model.named_parameters()
        if parameter.is_complex() and parameter.requires_grad
    ]
    if anatomy.is_meta(model):
        faults.append("the model is on the meta device: it has no weights to write")
    return faults


def _write_config(model: PreTrainedModel, code: sources.Sources) -> str:
    values = json.loads(model.config.to_json_string(use_diff=True))
    values |= {
        "model_type": code.model_type,
        "architectures": code.architectures,
        "auto_map": code.auto_map,
        "surgery": code.surgery,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    values.pop(REFERENCE, None)
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _other_files(directory: Path, code: set[str]) -> dict[str, str]:
    listed_elsewhere = {*code, manifest.NAME, *(path.name for path in checkpoint.weight_files(directory))}
    return {
        name: hashing.digest_file(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (name := path.relative_to(directory).as_posix()) not in listed_elsewhere
    }


def _describe_remedy(finding: Finding, model: PreTrainedModel) -> str:
    """Says what to do about state that a reload does not bring back."""
    lost = [
        name
        for name, _ in model.named_non_persistent_buffers()
        if name in finding.evidence or name.removeprefix(model.base_model_prefix + ".") in finding.evidence
    ]
    if any("rotary" in name or "inv_freq" in name for name in lost):
        return (
            f". {lost[0]} is computed, not saved: was the model cast with .to(dtype)? Load it with dtype=... instead, "
            "which leaves such buffers as they are computed"
        )
    if "meta tensor" in finding.evidence or " values " in finding.evidence:
        return (
            ". A number that a constructor computes from a tensor, or that `adopt` sets, is not there after loading "
            "(a model is built on the meta device, and `adopt` runs once, at surgery): keep it in a persistent buffer, "
            "or pass it in `arguments`"
        )
    if any(word in finding.evidence for word in ("never filled", "different", "additional", "absent")):
        return (
            ". A model is built on the meta device when it is loaded: what a module computes in its constructor must "
            "be a parameter or a persistent buffer to be there again (register_buffer without persistent=False)"
        )
    return ""
