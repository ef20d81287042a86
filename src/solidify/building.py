"""`solidify.build`: an edited model, or what a recipe says, becomes an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from solidify.artifact import solidify
from solidify.artifact.solidify import Artifact, Saveable
from solidify.directory import manifest
from solidify.errors import ArtifactError
from solidify.recipe import build_stage
from solidify.recipe.schema import Recipe, given
from solidify.surgery.edit_record import Edit


def build(
    model: PreTrainedModel | Recipe | str | Path,
    edits: Sequence[Edit] | None = None,
    directory: str | Path | None = None,
    *,
    tokenizer: Saveable | None = None,
    base: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    link: bool = True,
) -> Artifact:
    """Writes an edited model as an artifact and verifies it in a fresh process; the model is unchanged.

    `directory` appears by rename once every tensor, buffer and output has been found bit-identical by a process in
    which neither solidify nor peft can be imported. `base` says where the model came from, `recipe` is kept in the
    manifest. Unchanged weight files of the base become hard links where that is possible; without `link`, copies.

    A recipe, or the path of one, instead of a model says all but `directory` and `link`; the artifact is then
    `directory/artifact`, where `solidify.run` writes it, and `directory` may stand in the recipe as `output`.

    Raises:
        ArtifactError: the artifact cannot be written there, or is not what the model is; nothing is then left of it.
        CheckFailed: the fresh process found a difference.
        SolidifyError: the recipe is wrong, as `solidify.run` says it.
    """
    if isinstance(model, (Recipe, str, Path)):
        given_beside = (("edits", edits), ("tokenizer", tokenizer), ("base", base), ("recipe", recipe))
        more = [key for key, value in given_beside if value is not None]
        if more:
            raise ArtifactError(
                f"a recipe says everything itself; leave out {', '.join(more)} (say with directory= where the "
                "results go)"
            )
        loaded = given(model)
        output = build_stage.output_of(loaded, directory)
        report = build_stage.build_alone(loaded, output, link=link)
        report.require()
        return Artifact(output / "artifact", manifest.read(output / "artifact", manifest.MODELS), report.findings)
    if edits is None or directory is None:
        raise ArtifactError("an edited model is built from its edits into a directory: build(model, edits, directory)")
    return solidify.build(model, edits, directory, tokenizer=tokenizer, base=base, recipe=recipe, link=link)
