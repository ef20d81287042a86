"""From a recipe to healing: which layers to change, what each new module learns, what the whole model learns.

The result of a recipe with `heal` lies in `heal/`, a run of its own within the run: `artifact` is aligned, `adapter`
and `merged` come of distillation, `alignment` holds what each module has learned while that goes on.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.artifact.solidify import write_again
from solidify.directory import manifest, ours, results
from solidify.errors import HealingError, ObjectiveError, RecipeError, raised_as
from solidify.findings import Finding, Report
from solidify.healing import align as aligning
from solidify.healing import measuring, outcome
from solidify.healing.learning import Alignment
from solidify.healing.ledger import Aligned
from solidify.model import anatomy
from solidify.recipe import datasets, models
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import Align
from solidify.system import console, disk, processes
from solidify.training import groups
from solidify.weights import hashing

MEASURED = 8  # batches at most on which divergences are measured
_NOTHING = 1e-6  # nats; a divergence of float32 logits from the same ones in another order of sums is less
_ROWS = 12  # units that the terminal shows one by one
_DRAWN = 50  # points of a curve that a report keeps


def read_share(text: str | None) -> tuple[int, int] | None:
    """Reads a share of the modules, `1/4` for the first of four, as this one's number from 0, and how many there are.

    Raises:
        RecipeError: it is written otherwise.
    """
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise RecipeError(f"a share is written as 1/4, the first of four, but {text!r} was given")
    return int(number) - 1, int(count)


def directory_of(directory: Path) -> Path:
    """Returns where healing writes within a run's directory."""
    return directory / ours.HEAL


def healed(recipe: Recipe, directory: Path) -> Path:
    """Returns the artifact that a recipe's adapter is trained on: what the last stage of healing made, or surgery."""
    if recipe.heal is None or (recipe.heal.align is None and recipe.heal.distill is None):
        return directory / "artifact"
    return directory_of(directory) / ("merged" if recipe.heal.distill is not None else "artifact")


def settings_of(align: Align) -> Alignment:
    """Returns how units learn."""
    fields = align.model_dump(exclude={"batch_size", "train", "parameter_groups"})
    train = (align.train,) if isinstance(align.train, str) else tuple(align.train)
    with raised_as(RecipeError, of=ObjectiveError):
        own = tuple(groups.declared([group.model_dump() for group in align.parameter_groups]))
    return Alignment(**fields, train=train, parameter_groups=own)


def make_batches(recipe: Recipe, processor: Any) -> tuple[datasets.Batches, datasets.Batches]:
    """Returns training batches, and those on which is measured: of the evaluation text, or else the last ones."""
    assert recipe.heal is not None
    size = recipe.heal.align.batch_size if recipe.heal.align is not None else Align().batch_size
    prepared = datasets.prepare(datasets.unpacked(recipe), processor)
    examples, held_out, collate = prepared.train, prepared.held_out, prepared.collate
    made = [datasets.collate_rows(collate, rows, size) for rows in (examples, held_out) if rows is not None]
    if len(made) == 1:
        kept = min(MEASURED, max(1, len(made[0]) // 10))
        made = [made[0][:-kept] or made[0], made[0][-kept:]]
    return made[0], made[1][:MEASURED]


def align(
    recipe: Recipe,
    directory: Path,
    report: Report,
    *,
    resume: bool,
    link: bool,
    share: tuple[int, int] | None = None,
) -> None:
    """Aligns `directory/artifact` and writes `directory/heal/artifact`; without `heal.align` that is a copy of it.

    Several processes take a share of the modules each. With a `share`, this one trains so many of them, leaves what
    they learned in `directory/heal/alignment`, and writes no artifact.

    Raises:
        HealingError: as `solidify.align`.
    """
    source, target = directory / "artifact", directory_of(directory) / "artifact"
    wanted = _wanted_step(recipe, source)
    if resume and share is None and processes.on_first(lambda: _is_made(target, wanted)):
        report.add("heal", [Finding("aligned before", True, f"{target} is whole, of this recipe and on this artifact")])
        report.carry("heal", results.failures(target))
        report.measured["heal"] = manifest.read(target).lineage[-1]["measured"]
        return
    asked = recipe.heal.align if recipe.heal is not None else None
    spread = processes.count() > 1 and asked is not None and asked.inputs == "base"
    if share is not None or spread:
        _align_model(recipe, directory, share or (processes.rank(), processes.count()))
        processes.meet()
    if share is None:
        processes.on_first(lambda: _write_aligned(recipe, directory, report, wanted, link))


def _wanted_step(recipe: Recipe, source: Path) -> dict[str, Any]:
    """Returns what the aligned artifact's last step in its lineage says of how it was made."""
    document = recipe.document()
    settings = {"align": document["heal"].get("align"), "data": {**document["data"], "files": digest_data(recipe)}}
    return {"step": "heal", "stage": "align", "settings": settings, "artifact": manifest.read(source).digest()}


def digest_data(recipe: Recipe) -> dict[str, str]:
    """Returns the digests of the data files that stand beside the recipe."""
    assert recipe.data is not None
    found = dict[str, str]()
    for name in recipe.data.paths():
        path = recipe.directory / name
        inside = {f"{name}/{each.relative_to(path)}": each for each in sorted(path.rglob("*"))} if path.is_dir() else {}
        found |= {key: hashing.digest_file(each) for key, each in (inside or {name: path}).items() if each.is_file()}
    return found


def _is_made(target: Path, wanted: Mapping[str, Any]) -> bool:
    record = results.find_whole(target, "artifact")
    last = record.lineage[-1] if record is not None and record.lineage else {}
    return record is not None and all(last.get(key) == value for key, value in wanted.items())


def _align_model(
    recipe: Recipe, directory: Path, share: tuple[int, int]
) -> tuple[PreTrainedModel, list[Aligned], dict[str, Any]]:
    """Aligns the artifact in memory; returns it, what became of each unit, and what was measured."""
    assert recipe.heal is not None
    source, nested = directory / "artifact", directory_of(directory)
    allowed = recipe.base.trust_remote_code
    model = loading.load_artifact(source, trust_remote_code=allowed)
    processor = loading.load_processor(source, trust_remote_code=allowed)
    batches, held_out = make_batches(recipe, processor)
    with disk.temporary() as scratch:  # of each process its own: several align at once
        base = models.load_base(recipe, scratch=scratch).model
        joining = share[1] == 1
        stages = {"surgery": measuring.distance(model, base, held_out)} if joining else {}
        aligned: list[Aligned] = []
        streamed = False
        if recipe.heal.align is not None:
            settings = settings_of(recipe.heal.align)
            streamed = settings.streams(base)  # asked once: the free memory changes while models are run
            aligned = aligning.align(
                model,
                base,
                batches,
                edits=manifest.read(source).edits,
                settings=dataclasses.replace(settings, share=share, stream=streamed),
                held_out=held_out[:2],
                directory=nested / ours.ALIGNMENT,
            )
            if joining:
                stages["align"] = measuring.distance(model, base, held_out)
        more = outcome.measure_more(model, base, held_out) if joining else {}
    return model, aligned, {"stages": outcome.describe_stages(stages), "streamed": streamed, **more}


def _write_aligned(recipe: Recipe, directory: Path, report: Report, wanted: dict[str, Any], link: bool) -> None:
    """Aligns (or finds what all shares have learned), writes the artifact, and removes what it was made of."""
    target = directory_of(directory) / "artifact"
    started = time.perf_counter()
    model, aligned, measured = _align_model(recipe, directory, (0, 1))
    measured |= {"layers": [_describe_unit(each) for each in aligned], "seconds": time.perf_counter() - started}
    with console.stage("Writing the aligned artifact"):
        judged = outcome.judge(measured) if len(measured["stages"]) > 1 else []
        step = {**wanted, "measured": measured}
        artifact = write_again(model, directory / "artifact", target, step, link=link, found=judged)
    report.add("heal", [*artifact.findings, *judged])
    report.carry("build", results.failures(directory / "artifact"))
    report.measured["heal"] = measured
    console.words.print(layers_table(aligned))
    _remove_alignment(directory_of(directory) / ours.ALIGNMENT)


def _remove_alignment(directory: Path) -> None:
    """Removes what units have learned, which the artifact holds now; where anything else stands, nothing is."""
    if not directory.exists():
        return
    if faults := ours.in_alignment(directory):
        console.words.print(f"{directory} stays: {'; '.join(faults[:3])}")
    else:
        shutil.rmtree(directory)


def _describe_unit(unit: Aligned) -> dict[str, Any]:
    errors = list(unit.errors)
    step = max(1, len(errors) // _DRAWN)
    return {
        "name": unit.name,
        "before": unit.before,
        "after": unit.after,
        "steps": unit.steps,
        "tokens": unit.tokens,
        "seconds": unit.seconds,
        "errors": errors[::step],
    }


def layers_table(aligned: Sequence[Aligned]) -> Any:
    """Shows the relative error of every unit before and after; of many, alike ones in one row."""
    groups: dict[str, list[Aligned]] = {}
    for unit in aligned:
        groups.setdefault(anatomy.fold([unit.name])[0] if len(aligned) > _ROWS else unit.name, []).append(unit)
    rows = [
        (
            name if len(units) == 1 else f"{name} ({len(units)})",
            _write_range([unit.before for unit in units], ".4g"),
            _write_range([unit.after for unit in units], ".4g"),
            _write_range([unit.steps for unit in units], "d"),
            _write_range([unit.tokens for unit in units], ",d"),
        )
        for name, units in groups.items()
    ]
    columns = ("module", "error before", "after", "steps", "tokens")
    return console.table("Alignment", columns, rows, numbers=(1, 2, 3, 4))


def _write_range(values: Sequence[float], form: str) -> str:
    least, most = (format(value, form) for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def refuse_nothing_to_distil(measured: Mapping[str, Any]) -> None:
    """Raises HealingError where a model answers as its base does: rounding is no gradient, and all else leads away."""
    found = measured["stages"][-1]
    if found["kl"] < _NOTHING:
        raise HealingError(
            f"heal.distill: after {found['stage']} the model's divergence from its base is {found['kl']:.1e}, which is "
            "rounding, so there is nothing to bring back; leave heal.distill out, and train it with an `adapter`"
        )


def measure_distilled(recipe: Recipe, directory: Path, report: Report) -> None:
    """Measures what distillation made against the base, and adds it to what healing measured."""
    target, measured = directory_of(directory) / "merged", report.measured["heal"]
    allowed = recipe.base.trust_remote_code
    with console.stage("Measuring what healing brought back"):
        model = loading.load_artifact(target, trust_remote_code=allowed)
        _, held_out = make_batches(recipe, loading.load_processor(target, trust_remote_code=allowed))
        with disk.temporary() as scratch:
            base = models.load_base(recipe, scratch=scratch).model
            found = measuring.distance(model, base, held_out)
            measured |= outcome.measure_more(model, base, held_out)
    measured["stages"] = outcome.add_stage(measured, "distill", found)
    judged = outcome.judge(measured)
    report.add("distill", judged)
    results.keep_failures(target, judged)
