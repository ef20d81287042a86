"""The first stage: a recipe's surgery, and the artifact. It imports nothing of training, unless the recipe trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.artifact import certificate, fresh, stock, tensors, vocabulary
from solidify.artifact.data_facts import DataFacts
from solidify.artifact.loading import BaseModel
from solidify.artifact.solidify import build as build_artifact
from solidify.behaviour.calling import seed_everything
from solidify.checks import structure
from solidify.directory import manifest, results, writing
from solidify.errors import RecipeError
from solidify.findings import Finding, Report
from solidify.model import anatomy, probing
from solidify.model.cost import cost
from solidify.model.extent import Extent
from solidify.recipe import models
from solidify.recipe.dry_run import plan
from solidify.recipe.schema import Recipe
from solidify.surgery import ledger
from solidify.system import console, processes

SEED = 42  # transformers' own default


def output_of(recipe: Recipe, output: str | Path | None) -> Path:
    """Returns where results go: `output`, else the recipe's own, relative to the current directory.

    Where neither says it: `build/` and the name of the recipe's file.

    Raises:
        RecipeError: neither says where, and the recipe is from no file.
    """
    if output is not None or recipe.output is not None:
        return Path(output if output is not None else recipe.output or "")
    if not recipe.name:
        raise RecipeError("nothing says where results go: give --output DIR, or `output` in the recipe")
    chosen = Path("build") / recipe.name
    if processes.is_first():
        console.words.print(f"Results go to {chosen}: neither --output nor the recipe's `output` says where")
    return chosen


def build_alone(recipe: Recipe, directory: Path, *, link: bool = True) -> Report:
    """Plans a recipe and builds its artifact, where no other stage follows.

    Raises:
        SolidifyError: the recipe would fail later, or the directory holds what another recipe trained or merged.
    """
    plan(recipe)
    results.refuse_others(directory, recipe.document(), "adapter", "merged")
    return build(recipe, directory, link=link)


def build(
    recipe: Recipe, directory: Path, *, report: Report | None = None, resume: bool = False, link: bool = True
) -> Report:
    """Surgery and solidification: writes `directory/artifact`.

    Weight files of the base that stay as they are become hard links where the file system allows it; without `link`
    they are copied.

    Raises:
        SolidifyError: as the stages do; nothing is then left at `directory/artifact`.
    """
    report = report or Report(str(directory))
    if recipe.heal is not None:
        from solidify.recipe import placement  # which takes the time to import

        recipe = placement.place(recipe, directory, report, again=not resume)
    target = directory / "artifact"
    document = results.built_by(recipe.document())
    if resume and models.is_built(recipe, target):
        found = _look_again(target)
        report.add("build", found)
        results.keep_failures(target, found)
        report.carry("build", results.failures(target))
        return report
    if not recipe.surgery:
        return _build_plain(recipe, target, report, link)
    seed_everything(int(recipe.training.get("seed", SEED)))
    writing.refuse_unwritable(directory)
    with writing.scratch(target, recipe.inputs()) as scratch, fresh.started() as process:
        with console.stage("Loading the base"):
            base = models.load_base(recipe, scratch=scratch)
            _read_facts(recipe, base).put(base.model, base.processor or base.tokenizer)
            extent = Extent.of(base.model, scratch)
            before = _outputs_aligned(base.model, base.processor or base.tokenizer) if extent.whole else {}
            stood = tensors.standing(base.model.state_dict())
        with console.stage("Changing the model"):
            edits = models.operate(recipe, base.model, extent, preparing=base.processor or base.tokenizer)
            records = [edit.document() for edit in edits]
            promised = all(edit.identical for edit in edits)
            after = {case: anatomy.run(base.model, batch) for case, (batch, _) in before.items()}
            report.add(
                "surgery",
                [
                    structure.structure(base.model, records),
                    structure.in_use(base.model, records, extent),
                    structure.start(
                        {case: out for case, (_, out) in before.items()},
                        after,
                        promised=promised,
                        limit=structure.exact_up_to(base.model, records),
                        added=set(vocabulary.added_tokens(records).values()),
                    ),
                    structure.untouched(base.model, stood, records),
                ],
            )
        report.measured |= {
            "tensors": ledger.counts(base.model.state_dict(), records),
            "cost": cost(base.model).document(),
            "extent": str(extent),
        }
        with console.stage("Writing the artifact"):
            artifact = build_artifact(
                base.model,
                edits,
                target,
                tokenizer=base.processor or base.tokenizer,
                base=base.origin,
                recipe=document,
                link=link,
                process=process,
                extent=extent,
                found=report.stages["surgery"],
            )
    report.add("build", artifact.findings)
    report.carry("build", results.failures(target))
    return report


def _look_again(target: Path) -> list[Finding]:
    """Says of an artifact that is whole what a fresh process finds; a plain model has no code of ours to run."""
    if manifest.kind(target) == "artifact":
        return certificate.witness(target)
    return [Finding("the base as it stands", True, f"{target} is whole, and of this recipe")]


def _build_plain(recipe: Recipe, target: Path, report: Report, link: bool) -> Report:
    """Writes the base as it stands, for a recipe that changes nothing of it and trains an adapter."""
    writing.refuse_unwritable(target.parent)
    writing.refuse_foreign(target, recipe.inputs())
    with console.stage("Loading the base"):
        base = models.load_base(recipe)
        facts = _read_facts(recipe, base)
    with console.stage("Writing it as it stands"):
        made = stock.build(base, target, recipe=results.built_by(recipe.document()), link=link, facts=facts)
    report.measured |= {"cost": cost(base.model).document(), "extent": str(Extent.of(base.model))}
    report.add("build", made.findings)
    report.carry("build", results.failures(target))
    return report


def _outputs_aligned(model: PreTrainedModel, preparing: Any) -> dict[str, tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Aligns a model's matrices and runs it, on tokens that what prepares its inputs knows, if it tells; returns inputs
    and output of every case."""
    tensors.align(model)
    cases = certificate.make_inputs(model)
    if (tokenizer := vocabulary.tokenizer_of(preparing)) is not None:
        cases = {case: probing.only_known(batch, tokenizer.get_vocab().values()) for case, batch in cases.items()}
    return {case: (batch, anatomy.run(model, batch)) for case, batch in cases.items()}


def _read_facts(recipe: Recipe, base: BaseModel) -> DataFacts:
    """Returns what the model keeps of the recipe's data; without data, what reads them is not imported."""
    if recipe.data is None:
        return DataFacts()
    from solidify.recipe import data_facts

    return data_facts.of_base(recipe, base)
