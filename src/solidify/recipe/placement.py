"""`heal.place`: which of the modules that a step of surgery names are changed, chosen before a recipe is built."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from solidify.directory import ours, writing
from solidify.errors import ArtifactError, HealingError
from solidify.findings import Finding, Report
from solidify.healing import placing
from solidify.healing.learning import Alignment
from solidify.healing.placing import Budget, Placement
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.recipe import healing, models
from solidify.recipe.schema import Recipe
from solidify.recipe.sections import Align, Place
from solidify.surgery.edit_record import Edit
from solidify.system import console, disk, files
from solidify.weights import hashing

_MARKS = ("key", "code")  # of a placement that is kept: the recipe and the modules' code that it was chosen for


def placed_before(recipe: Recipe, directory: Path) -> Recipe:
    """Returns a recipe with the layers that an earlier run chose for it and for its modules' code; else as it is."""
    if recipe.heal is None or recipe.heal.place is None:
        return recipe
    found = _read_placement(directory, recipe)
    return narrowed(recipe, found["chosen"]) if _is_current(found, recipe) else recipe


def require_placed(recipe: Recipe, directory: Path) -> Recipe:
    """Returns a recipe with the layers that were chosen for it, when the artifact beside them was built.

    Raises:
        HealingError: it asks for a choice of layers, and none stands in the directory.
    """
    if recipe.heal is None or recipe.heal.place is None:
        return recipe
    found = _read_placement(directory, recipe)
    if found is None:
        raise HealingError(
            f"the layers of this recipe are not chosen yet: there is no {ours.HEAL}/{ours.PLACEMENT} of it in "
            f"{directory}; run `solidify build` or `solidify run` with it first"
        )
    return narrowed(recipe, found["chosen"])


def place(recipe: Recipe, directory: Path, report: Report, *, again: bool = True) -> Recipe:
    """Chooses the layers of a recipe that asks for it, and returns the recipe with these alone.

    Without `again`, an earlier choice of the same recipe, by the same code of its modules, is taken.

    Raises:
        HealingError: the budget cannot be met.
    """
    if recipe.heal is None or recipe.heal.place is None:
        return recipe
    found = None if again else _read_placement(directory, recipe)
    if found is None or not _is_current(found, recipe):
        marks = {"key": _key_of(recipe), "code": models.digest_code(recipe)}
        found = {**marks, **_describe_placement(_choose_layers(recipe, directory))}
        healing.directory_of(directory).mkdir(parents=True, exist_ok=True)
        disk.write(healing.directory_of(directory) / ours.PLACEMENT, json.dumps(found, indent=1) + "\n")
    report.measured["place"] = {name: value for name, value in found.items() if name not in _MARKS}
    report.add("place", [_judge_placement(found)])
    return narrowed(recipe, found["chosen"])


def narrowed(recipe: Recipe, chosen: Sequence[str]) -> Recipe:
    """Returns a recipe whose placed step replaces the chosen modules alone."""
    assert recipe.heal is not None and recipe.heal.place is not None
    step: Any = find_step(recipe, recipe.heal.place)
    narrow = step.model_copy(update={"replace": list(chosen), "count": len(chosen)})
    surgery = [narrow if other is step else other for other in recipe.surgery]
    heal = recipe.heal.model_copy(update={"place": None})
    left = heal if heal.align is not None or heal.distill is not None else None
    return recipe.model_copy(update={"surgery": surgery, "heal": left})


def find_step(recipe: Recipe, asked: Place) -> Any:
    """Returns the step of surgery whose modules are placed; None where there is none of that number."""
    return recipe.surgery[asked.step] if asked.step < len(recipe.surgery) else None


def _choose_layers(recipe: Recipe, directory: Path) -> Placement:
    assert recipe.heal is not None and recipe.heal.place is not None
    asked = recipe.heal.place
    with writing.scratch(healing.directory_of(directory) / "artifact", recipe.inputs()) as scratch:
        with console.stage("Replacing every candidate"):
            loaded, base = (models.load_base(recipe, scratch=scratch) for _ in range(2))
            extent, preparing = Extent.of(loaded.model, scratch), loaded.processor or loaded.tokenizer
            edits = models.operate(recipe, loaded.model, extent, preparing=preparing)
        batches, held_out = healing.make_batches(recipe, loaded.processor or loaded.tokenizer)
        candidates = list_candidates(recipe, asked, edits)
        settings = healing.settings_of(recipe.heal.align or Align())
        return placing.place(
            loaded.model,
            base.model,
            batches,
            Budget(asked.layers, asked.cache_bytes, asked.flops, asked.length, asked.method),
            edits=candidates,
            settings=_shortened(settings, asked.max_steps),
            held_out=held_out[:2],
        )


def list_candidates(recipe: Recipe, asked: Place, edits: Sequence[Edit]) -> list[Edit]:
    """Returns the edits of the step whose modules are placed."""
    hits = anatomy.match(find_step(recipe, asked).replace, [edit.name for edit in edits])
    return [edit for edit in edits if any(edit.name in found for found in hits.values())]


def _shortened(settings: Alignment, steps: int) -> Alignment:
    return dataclasses.replace(settings, max_steps=steps, inputs="base")


def _describe_placement(found: Placement) -> dict[str, Any]:
    return {
        "chosen": list(found.chosen),
        "method": found.method,
        "scores": dict(found.scores),
        "savings": dict(found.savings),
        "curve": list(found.curve),
        "predicted": found.predicted,
        "measured": found.measured,
        "off": found.off,
    }


def _key_of(recipe: Recipe) -> str:
    document = recipe.document()
    heal = {key: document["heal"].get(key) for key in ("place", "align")}
    own = {key: document.get(key) for key in ("base", "surgery", "data", "digests")}
    return hashing.digest_values({**own, **heal, "files": healing.digest_data(recipe)})


def _read_placement(directory: Path, recipe: Recipe) -> dict[str, Any] | None:
    try:
        found = files.document(healing.directory_of(directory) / ours.PLACEMENT)
    except (OSError, ValueError, ArtifactError):
        return None
    return found if found.get("key") == _key_of(recipe) else None


def _is_current(found: Mapping[str, Any] | None, recipe: Recipe) -> TypeGuard[Mapping[str, Any]]:
    """Returns whether a placement was chosen with the modules' code as it stands now."""
    return found is not None and found.get("code") == models.digest_code(recipe)


def _judge_placement(found: Mapping[str, Any]) -> Finding:
    words = (
        f"{', '.join(found['chosen'])}: {len(found['chosen'])} of {len(found['scores'])} modules by the "
        f"{found['method']} choice; divergence {found['measured']:.4g}, by the sum of single scores "
        f"{found['predicted']:.4g} (off by {found['off']:.0%})"
    )
    return Finding("layers chosen", None, words)
