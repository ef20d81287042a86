"""The report of a run, and of the healing within it: `report.json`, and `report.html` once it is finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from solidify.directory import ours, packages, writing
from solidify.findings import Report
from solidify.recipe import page
from solidify.recipe.schema import Recipe
from solidify.system import disk, processes

HEALING = ("place", "heal", "distill")  # stages of a report that healing adds
_MEASURED = ("place", "heal", "distill_history")


def begin(directory: Path) -> None:
    """Removes what a stopped run left of its report.

    Raises:
        ArtifactError: another file stands where the report goes.
    """
    writing.refuse_foreign_report(directory)
    for name in (ours.REPORT, ours.PAGE):
        writing.sweep(directory / name)
    directory.mkdir(parents=True, exist_ok=True)


def write(recipe: Recipe, directory: Path, report: Report, placed: Recipe | None = None, **more: Any) -> None:
    """Writes a report as JSON, with the recipe as it was given; `placed` is that with the layers that were chosen."""
    if placed is not None and placed.document() != recipe.document():
        more["placed"] = placed.document()
    report.write(directory / ours.REPORT, recipe=recipe.document(), files=ours.page_digests(directory), **more)


def finish(recipe: Recipe, directory: Path, report: Report, placed: Recipe | None = None) -> None:
    """Writes a report that is whole, as JSON and as a page."""
    disk.write(directory / ours.PAGE, page.write(recipe, directory, report))
    write(recipe, directory, report, placed, finished=True, versions=packages.current_versions())


@contextmanager
def of_healing(recipe: Recipe, directory: Path, report: Report) -> Iterator[None]:
    """Writes what healing adds to a report while the block lasts as a report of its own, in its own `directory`."""
    processes.on_first(lambda: begin(directory))
    finished = False
    try:
        yield
        finished = True
    finally:  # whatever stopped it, what was found before is kept
        if processes.is_first():
            stages = {stage: report.stages[stage] for stage in HEALING if stage in report.stages}
            measured = {key: report.measured[key] for key in _MEASURED if key in report.measured}
            own = Report(str(directory), stages, measured)
            if finished:
                finish(recipe, directory, own)
            else:
                write(recipe, directory, own, finished=False)
