"""The one file that knows the order of the stages: a recipe becomes artifact, adapter, merged model and report."""

from __future__ import annotations

import gc
from pathlib import Path

from solidify.adapter import adapters, base_state
from solidify.adapter import plan as planning
from solidify.artifact import certificate
from solidify.behaviour.calling import seed_everything
from solidify.checks import roundtrip, trainable
from solidify.directory import manifest, ours, results, writing
from solidify.errors import CheckFailed, RecipeError, SolidifyError
from solidify.findings import Finding, Report
from solidify.merging import export
from solidify.recipe import (
    distilling,
    evidence,
    healing,
    models,
    page,
    placement,
    reporting,
    trainers,
    training,
)
from solidify.recipe.build_stage import SEED, build, output_of
from solidify.recipe.dry_run import plan
from solidify.recipe.schema import Recipe, given
from solidify.system import console, foreign, processes


def run(
    recipe: Recipe | str | Path, output: str | Path | None = None, *, resume: bool = False, link: bool = True
) -> Report:
    """Does every stage that a recipe names and writes `report.json` and `report.html` beside the results.

    `recipe` may be the path of one. With `resume`, stages whose result is there, and was made by the same recipe, are
    not repeated, and training goes on from its last checkpoint. Without `link`, unchanged weight files are copied and
    not linked. Of several processes (torchrun, `accelerate launch`) all train, and the first does everything
    else.

    Raises:
        SolidifyError: the recipe or the data is wrong, or a result does not hold.
        CheckFailed: a check failed; the report is written first.
    """
    whole = given(recipe)
    directory = output_of(whole, output)
    trainers.join(whole, directory)
    asked = processes.on_first(lambda: placement.placed_before(whole, directory)) if resume else whole
    report, finished = processes.on_first(lambda: _begin_report(whole, asked, directory, resume))
    if finished:
        console.words.print(f"{directory} is finished and whole; nothing is repeated")
        return report
    chosen = asked
    try:
        chosen = processes.on_first(lambda: placement.place(whole, directory, report, again=not resume))
        report = processes.on_first(lambda: build(chosen, directory, report=report, resume=resume, link=link))
        processes.on_first(lambda: _measure_surgery(chosen, directory, report))
        processes.on_first(lambda: results.drop_misfits(directory, chosen.document()))
        if chosen.heal is not None:
            with reporting.of_healing(whole, healing.directory_of(directory), report):
                _heal(chosen, directory, report, resume=resume, link=link)
        if chosen.adapter is not None:
            train(chosen, directory, report=report, resume=resume)
            allowed = chosen.base.trust_remote_code
            processes.on_first(lambda: merge(directory, report=report, link=link, trust_remote_code=allowed))
    except SolidifyError as error:
        if report.failed and not isinstance(error, CheckFailed):  # what failed before is why
            faults = [*(f"{each.name}: {each.evidence}" for each in report.failed), *error.faults]
            raise CheckFailed(f"{report.failure()}\nand then: {error}", faults) from error
        raise
    finally:  # whatever stopped the run, what was found before it is kept
        if processes.is_first():
            reporting.write(whole, directory, report, chosen, finished=False)
    processes.on_first(lambda: _end_run(whole, chosen, directory, report))
    return report


def _begin_report(whole: Recipe, placed: Recipe, directory: Path, resume: bool) -> tuple[Report, bool]:
    """Opens the report of a run, or finds that there is nothing left to do; `placed` is the recipe `whole` with the
    layers that an earlier run chose."""
    _refuse_foreign(placed, directory)
    if resume and (earlier := _find_finished(whole, placed, directory)) is not None:
        return earlier, True
    planned = plan(placed)  # what is wrong is found before anything is computed or written
    for note in planned.notes:
        console.words.print(note)
    results.announce(directory, placed.document(), resume=resume)
    report = Report(str(directory))
    if placed.heal is None or placed.heal.place is None:  # else what is changed is chosen later
        report.measured["model"] = page.describe(planned)
    reporting.begin(directory)
    reporting.write(whole, directory, report, placed, finished=False)
    return report, False


def _refuse_foreign(recipe: Recipe, directory: Path) -> None:
    """Refuses an output that is not wholly ours, or that the recipe reads; also where the checkpoints go."""
    writing.refuse_foreign_run(directory, recipe.inputs())
    if recipe.adapter is not None:
        _refuse_foreign_checkpoints(recipe, directory)


def _refuse_foreign_checkpoints(recipe: Recipe, directory: Path) -> None:
    """Refuses a directory for checkpoints that holds others: a training removes old ones."""
    where = Path(str(recipe.training.get("output_dir") or directory / ours.CHECKPOINTS))
    writing.refuse_foreign_checkpoints(where, directory, recipe.inputs())


def _find_finished(whole: Recipe, placed: Recipe, directory: Path) -> Report | None:
    """Returns the report of an earlier run of this recipe that passed, if all its results are whole."""
    try:
        found = Report.read(directory / ours.REPORT)
    except (OSError, ValueError):
        return None
    if not (found.get("finished") and found.get("passed") and found.get("recipe") == whole.document()):
        return None
    heal = placed.heal
    parts = ["artifact", "adapter", "merged"] if placed.adapter is not None else ["artifact"]
    parts += [f"{ours.HEAL}/artifact"] if heal is not None else []
    parts += [f"{ours.HEAL}/{part}" for part in ("adapter", "merged") if heal is not None and heal.distill is not None]
    if any(results.find_whole(directory / name) is None for name in parts) or results.misfits(directory):
        return None
    if foreign.attempt(models.carries_other_code, placed, directory / "artifact").value:  # if it can be compared
        return None
    stages = {stage: [Finding.of(finding) for finding in findings] for stage, findings in found["stages"].items()}
    return Report(found["subject"], stages, found["measured"])


def _measure_surgery(recipe: Recipe, directory: Path, report: Report) -> None:
    """Measures held-out rows before and after surgery, where nothing else of the run does."""
    if not evidence.measures_surgery(recipe):
        return
    with console.stage("Measuring the held-out rows before and after surgery"):
        measured = foreign.attempt(evidence.measure_surgery, recipe, directory / "artifact")
    if measured.value is None:
        console.words.print(f"data.eval is not measured: {measured.error}")
        return
    report.measured |= measured.value
    before, after = (measured.value[f"heldout_loss_{which}"] for which in ("base", "artifact"))
    console.words.print(f"Held-out loss: {before:.4g} of the base, {after:.4g} after surgery")


def _end_run(whole: Recipe, placed: Recipe, directory: Path, report: Report) -> None:
    reporting.finish(whole, directory, report, placed)
    stages = report.measured.get("heal", {}).get("stages", [])
    if stages:
        console.words.print(
            f"Healed: KL from the base {stages[0]['kl']:.4g} after surgery, {stages[-1]['kl']:.4g} now "
            f"({stages[-1]['recovered']:.1%} recovered); the model is {healing.healed(placed, directory)}"
        )
    report.require()


def train(recipe: Recipe, directory: Path, *, report: Report | None = None, resume: bool = False) -> Report:
    """Trains the recipe's adapter on `directory/artifact` and writes `directory/adapter`.

    Of several processes all train, and the first saves and writes.

    Raises:
        RecipeError: the recipe has no adapter, or cannot be spread over the processes.
        SolidifyError: as the stages do.
    """
    report = report or Report(str(directory))
    if recipe.adapter is None:
        raise RecipeError("the recipe has no `adapter`, so there is nothing to train")
    recipe = placement.require_placed(recipe, directory)
    assert recipe.adapter is not None
    trainers.join(recipe, directory)
    if (kept := processes.on_first(lambda: _trained_before(recipe, directory, resume))) is not None:
        report.add("train", [kept])
        report.carry("train", results.failures(directory / "adapter"))
        console.words.print(f"The training is finished: {kept.evidence}; nothing is repeated")
        return report
    report.carry("build", results.failures(healing.healed(recipe, directory)))
    seed_everything(int(recipe.training.get("seed", SEED)))
    with console.stage("Loading the artifact and attaching the adapter"):
        model, processor = processes.in_turn(lambda: training.load_artifact(recipe, directory))
        wanted = planning.plan(model, recipe.adapter.lora, recipe.adapter.train)
        inputs = certificate.make_inputs(model)
        before = roundtrip.outputs(model, inputs)
        rows = training.read_start(recipe, processor, model)
        peft_model = adapters.attach(model, lora=recipe.adapter.lora, train=recipe.adapter.train, batches=rows)
    training.factor_experts(peft_model)
    report.add("train", [trainable.trainable(peft_model, wanted)])
    trainer, examples = trainers.make_trainer(recipe, directory, peft_model, processor)
    witness = training.train_adapter(recipe, directory, trainer, resume)
    console.words.print(training.history_table(trainer.history))
    with console.stage("Checking what training did"):
        healed = healing.healed(recipe, directory)
        base = base_state.with_digests(trainer.model, healed, manifest.read(healed))
        report.add("train", training.check_training(trainer, witness, examples, base))
    report.measured["history"] = trainer.history
    report.measured |= evidence.evaluate(recipe, trainer)
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # takes its autocast off
    if processes.is_first() or processes.is_spread(trainer.model):
        report.measured |= evidence.measure_losses(recipe, processor, trainer.model)
        report.measured["samples"] = page.take_samples(recipe, processor, trainer.model)
    trained = training.release_model(recipe, directory, trainer)
    del trainer, witness, model, peft_model  # with the optimizer's state
    gc.collect()
    processes.on_first(lambda: training.keep_adapter(recipe, directory, report, trained, before, inputs))
    return report


def heal(
    recipe: Recipe | str | Path,
    output: str | Path | None = None,
    *,
    report: Report | None = None,
    resume: bool = False,
    link: bool = True,
    share: tuple[int, int] | None = None,
) -> Report:
    """Brings `artifact` of a run back to its base: aligns it, then distils it; writes `heal/` in the run's directory.

    What it did stands in `heal/report.json` and `heal/report.html`.

    With a `share` (this one's number, and how many there are) so many of the modules are aligned, for a machine of
    their own, and nothing else is done; without, what all shares have left in `heal/alignment` is put together.

    Raises:
        RecipeError: the recipe has no `heal`.
        SolidifyError: as the stages do.
    """
    whole = given(recipe)
    directory = output_of(whole, output)
    processes.join()
    loaded = placement.require_placed(whole, directory)
    report = report if report is not None else Report(str(directory))
    if loaded.heal is None:
        raise RecipeError("the recipe has no `heal`, so there is nothing to heal")
    if share is not None:
        healing.align(loaded, directory, report, resume=resume, link=link, share=share)
    else:
        with reporting.of_healing(whole, healing.directory_of(directory), report):
            _heal(loaded, directory, report, resume=resume, link=link)
    return processes.on_first(lambda: report)  # the others have not looked at all that it says


def _heal(recipe: Recipe, directory: Path, report: Report, *, resume: bool, link: bool) -> None:
    """Aligns and distils, as the recipe (whose layers are chosen) says."""
    healing.align(recipe, directory, report, resume=resume, link=link)
    assert recipe.heal is not None
    if recipe.heal.distill is not None:
        _distill(recipe, directory, report, resume=resume, link=link)


def _distill(recipe: Recipe, directory: Path, report: Report, *, resume: bool, link: bool) -> None:
    """Distils the aligned artifact: a training of its own in `heal/`, whose adapter is merged."""
    nested = healing.directory_of(directory)
    healing.refuse_nothing_to_distil(report.measured["heal"])
    skeleton = models.skeleton(str(nested / "artifact"), trust_remote_code=recipe.base.trust_remote_code)
    inner = distilling.inner_recipe(recipe, skeleton, manifest.read(nested / "artifact").edits)
    assert inner is not None
    within = Report(str(nested))
    allowed = recipe.base.trust_remote_code
    with distilling.naming_keys():
        train(inner, nested, report=within, resume=resume)
        if not (resume and processes.on_first(lambda: results.is_merged(nested))):
            processes.on_first(lambda: merge(nested, report=within, link=link, trust_remote_code=allowed))
    report.add("distill", within.findings)
    report.measured["distill_history"] = within.measured.get("history", [])
    processes.on_first(lambda: healing.measure_distilled(recipe, directory, report))


def _trained_before(recipe: Recipe, directory: Path, resume: bool) -> Finding | None:
    """Returns that the adapter of an earlier training is whole, of this recipe and on this artifact, if it is."""
    target = directory / "adapter"
    writing.refuse_unwritable(directory)
    writing.refuse_foreign(target, recipe.inputs())
    _refuse_foreign_checkpoints(recipe, directory)
    results.refuse_others(directory, recipe.document(), "artifact")
    made = resume and results.is_made_by(target, recipe.document(), "adapter")
    if not made or "adapter" in results.misfits(directory) or training.UNFINISHED in results.failures(target):
        return None
    return Finding("trained before", True, f"{target} is whole, of this recipe and on this artifact")


def merge(directory: Path, *, report: Report, link: bool = True, trust_remote_code: bool = False) -> None:
    """Merges `directory/adapter` into `directory/merged`; weight files that stay are linked, or copied."""
    with console.stage("Merging the adapter and loading the result in a fresh process"):
        merged = export.merge(
            directory / "adapter", directory / "merged", link=link, trust_remote_code=trust_remote_code
        )
    before = results.failures(directory / "merged")
    report.add("merge", [finding for finding in merged.findings if finding not in before])
    report.carry("merge", before)
