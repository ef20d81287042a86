"""Which results stand in a run's directory: whether each is whole, whose it is, whether they belong together."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from solidify.directory import manifest, ours, writing
from solidify.directory.manifest import Manifest
from solidify.errors import ArtifactError
from solidify.findings import Finding, Report
from solidify.system import console, files
from solidify.weights import hashing

TOGETHER = "the results belong together"
_BUILT = ("base", "surgery")  # the sections of a recipe that decide what is built
_FACTS = ("labels", "chat_template")  # of its data, what the model keeps
# Formats that the model's configuration keeps, as its `problem_type`: no head is taken for these else.
PROBLEMS = {"multi_label": "multi_label_classification", "regression": "regression"}


def built_by(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a recipe that decides what is built."""
    base = {key: value for key, value in recipe["base"].items() if key != "quantization"}  # of how it is trained
    data = recipe.get("data") or {}
    facts = {key: data[key] for key in _FACTS if data.get(key)}
    facts |= {"format": data["format"]} if data.get("format") in PROBLEMS else {}
    held = {"digests": recipe["digests"]} if recipe.get("digests") else {}  # of files of weights and tokens
    return {**{key: recipe[key] for key in _BUILT}, "base": base, **({"data": facts} if facts else {}), **held}


def find_whole(part: Path, kind: str | tuple[str, ...] | None = None) -> Manifest | None:
    """Returns the manifest of a part (an artifact, an adapter) that is complete and unchanged, else None.

    `kind` is `artifact` or `adapter`, where it must be one of the two.
    """
    try:
        record = manifest.read(part, kind)
    except ArtifactError:
        return None
    return None if manifest.faults(part, record) else record


def is_made_by(part: Path, recipe: Mapping[str, Any], kind: str | tuple[str, ...]) -> bool:
    """Returns whether a part is whole and was made by this recipe."""
    record = find_whole(part, kind)
    return record is not None and record.recipe == recipe


def is_merged(directory: Path) -> bool:
    """Returns whether the merged model of a run is whole, and made of the run's adapter."""
    return find_whole(directory / "merged") is not None and "merged" not in misfits(directory)


def failures(part: Path) -> list[Finding]:
    """Returns what was found wrong when a part was made, and when what it was made of was.

    Raises:
        ArtifactError: as `manifest.read`.
    """
    return [Finding.of(found) for found in manifest.read(part, closed=False).failed]


def keep_failures(part: Path, findings: Iterable[Finding], *, instead_of: Finding | None = None) -> None:
    """Writes into the manifest of a part which of some findings failed, so that no later command forgets it.

    `instead_of` is a finding that was kept until these were there.
    """
    record = manifest.read(part, closed=False)
    left = [each for each in record.failed if instead_of is None or each != instead_of.document()]
    failed = join_failed(left, failed_of(findings))
    if failed != record.failed:
        replace(record, failed=failed).write(part)


def join_failed(*lists: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns what several lists of failed findings hold, each once."""
    every = [each for failed in lists for each in failed]
    return [each for place, each in enumerate(every) if each not in every[:place]]


def failed_of_base(base: Path | None) -> list[dict[str, Any]]:
    """Returns what the manifest of a base keeps of what failed; nothing where it has none."""
    if base is None or not files.is_file(base / manifest.NAME):
        return []
    return manifest.read(base, closed=False).failed


def failed_of(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Returns the findings that failed, as a manifest holds them."""
    return [finding.document() for finding in findings if finding.passed is False]


def others(directory: Path, recipe: Mapping[str, Any]) -> list[str]:
    """Names the results in a run's directory that another recipe made."""
    wanted = {"artifact": built_by(recipe), "adapter": recipe, "merged": built_by(recipe)}
    return [name for name, record in _read_records(directory).items() if record.recipe not in (None, wanted[name])]


def misfits(directory: Path) -> dict[str, str]:
    """Says, by the name of the part, what in a run's directory does not belong to the rest."""
    records = _read_records(directory)
    artifact, adapter, merged = (records.get(name) for name in ours.PARTS)
    found: dict[str, str] = {}
    if artifact is not None and adapter is not None:
        made = [artifact, *_read_records(directory / ours.HEAL).values()]  # surgery's, and what healing made of it
        wrong = [[key for key, digest in each.digest().items() if adapter.base.get(key) != digest] for each in made]
        if all(wrong):
            found["adapter"] = f"the adapter was trained on another artifact (it differs in {', '.join(wrong[0])})"
        elif adapter.recipe is not None and artifact.recipe not in (None, built_by(adapter.recipe)):
            found["adapter"] = "the adapter and the artifact were made by different recipes"
    if adapter is not None and merged is not None:
        last = merged.lineage[-1] if merged.lineage else {}
        if last.get("step") == "merge" and last.get("adapter") != hashing.digest_values(adapter.tensors):
            found["merged"] = "the merged model was made with another adapter"
    if artifact is not None and merged is not None and artifact.recipe != merged.recipe and "merged" not in found:
        found["merged"] = "the merged model and the artifact were made by different recipes"
    if (written := _read_recipe(directory)) is not None:
        unlike = [name for name in others(directory, written) if name not in found]
        found |= {name: f"the {name} was made by another recipe than the one of the report" for name in unlike}
    return found


def together(directory: Path) -> Finding:
    """Returns whether the parts of a run's directory were made by one recipe, one from the other."""
    found = misfits(directory)
    names = ", ".join(_read_records(directory))
    evidence = f"{names}: by one recipe, each from the one before"
    return Finding(TOGETHER, not found, "; ".join(found.values()) or evidence)


def _read_recipe(directory: Path) -> dict[str, Any] | None:
    """Returns the recipe that a run's results were made by: with the layers that were chosen, where any were.

    The report of healing names that of the whole run, which the training within healing is only a part of.
    """
    if directory.name == ours.HEAL:
        return None
    try:
        found = Report.read(directory / ours.REPORT)
    except (OSError, ValueError):
        return None
    written = found.get("placed", found.get("recipe"))
    return written if isinstance(written, dict) and set(_BUILT) <= set(written) else None


def _read_records(directory: Path) -> dict[str, Manifest]:
    return {name: manifest.read(directory / name, closed=False) for name in _find_standing(directory)}


def _find_standing(directory: Path) -> list[str]:
    return [name for name in ours.PARTS if (directory / name / manifest.NAME).is_file()]


def announce(directory: Path, recipe: Mapping[str, Any], *, resume: bool) -> None:
    """Says what stands in a run's directory and will be replaced."""
    foreign = others(directory, recipe)
    standing = _find_standing(directory)
    if not standing or (resume and not foreign):
        return
    whose = "another recipe" if foreign else "this recipe"
    console.words.print(
        f"{directory} holds results of {whose} ({', '.join(standing)}): each is replaced when its new one is "
        "complete, and what does not fit the new artifact is then removed",
    )


def refuse_others(directory: Path, recipe: Mapping[str, Any], *names: str) -> None:
    """Raises ArtifactError when one of some results was made by another recipe, so that two would be mixed."""
    if foreign := [name for name in others(directory, recipe) if name in names]:
        raise ArtifactError(
            f"{directory} holds results of another recipe ({', '.join(foreign)}), and the results of this recipe "
            "would mix with them; name another output, or replace all of them with `solidify run`"
        )


def drop_misfits(directory: Path, recipe: Mapping[str, Any]) -> None:
    """Removes results that belong to another artifact than the one that stands there now, if they are wholly ours."""
    for name in sorted({*misfits(directory), *others(directory, recipe)} - {"artifact"}):
        writing.refuse_foreign(directory / name)
        console.words.print(f"{directory / name} does not fit the new artifact and is removed")
        shutil.rmtree(directory / name)


def kept(directory: Path) -> str:
    """Says which results of a run that was stopped are there to go on from."""
    found = _find_standing(directory)
    saved = (directory / ours.CHECKPOINTS).glob(f"checkpoint-*/{ours.LISTING}")
    last = max((path.parent for path in saved), key=lambda path: path.stat().st_mtime, default=None)
    found += [f"{ours.CHECKPOINTS}/{last.name}"] if last is not None else []
    return f"{', '.join(found)} in {directory}" if found else "nothing"
