"""The one file that knows the order of the stages: a recipe becomes artifact, adapter, merged model and report."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from solidify import console, export, materials, places
from solidify.artifact import certificate, loading, manifest, sources, tensors
from solidify.artifact.solidify import build as build_artifact
from solidify.checks import gradients, roundtrip, structure, trainable
from solidify.errors import ArtifactError, RecipeError
from solidify.findings import Report
from solidify.model import ledger, probing
from solidify.model.cost import cost
from solidify.model.surgery import Edit
from solidify.recipe import Recipe
from solidify.tuning import adapters, data, standing, storage
from solidify.tuning import plan as planning
from solidify.tuning.plan import AdapterPlan
from solidify.tuning.progress import TrainingBar

SEED = 42  # transformers' own default


@dataclass(frozen=True)
class Plan:
    """What a recipe would do.

    `before` and `after` are costs. `adapter` and `trainer` are None without an adapter; `trainable` maps what would be
    trained (`lora` or `full`, and the name) to its number of parameters. `tensors` lists which of the base's are `kept`
    and `dropped`, and which are `new`. `files` is the artifact's code by file name, of which `generated` names what
    solidify writes, and `requirements` what it needs beside torch and transformers.
    """

    edits: list[Edit]
    adapter: AdapterPlan | None
    before: dict[str, int]
    after: dict[str, int]
    trainer: str | None
    trainable: dict[str, int]
    tensors: dict[str, list[str]]
    files: dict[str, str]
    generated: list[str]
    requirements: dict[str, str]

    def document(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        return {
            "edits": [edit.document() for edit in self.edits],
            "before": self.before,
            "after": self.after,
            "trainer": self.trainer,
            "trainable": self.trainable,
            "tensors": self.tensors,
            "requirements": self.requirements,
            "generated": self.generated,
            "files": self.files,
        }


def output_of(recipe: Recipe, output: str | Path | None) -> Path:
    """Returns where results go: `output`, else the recipe's own, relative to the current directory.

    Raises:
        RecipeError: neither says where.
    """
    if output is None and recipe.output is None:
        raise RecipeError("nothing says where results go: give --output DIR, or `output` in the recipe")
    return Path(output if output is not None else recipe.output or "")


def plan(recipe: Recipe) -> Plan:
    """Resolves a recipe on the meta device: every edit, what would be trained, costs. Nothing is written.

    Raises:
        SolidifyError: whatever a run would refuse before it computes anything.
    """
    base = materials.load_base(recipe, device="meta")
    before, names = cost(base.model).document(), list(base.model.state_dict())
    edits = materials.operate(recipe, base.model)
    code = sources.compile_sources(base.model, edits)
    after = cost(base.model).document()
    wanted, trainer, trainable = None, None, dict[str, int]()
    if recipe.adapter is not None:
        wanted = planning.plan(base.model, recipe.adapter.lora, recipe.adapter.train)
        materials.training_arguments(recipe, Path("nowhere"))
        materials.make_terms(recipe)
        materials.read_texts(recipe)
        trainer = materials.trainer_class(recipe).__name__
        trainable = _trainable(base.model, recipe.adapter.lora, recipe.adapter.train)
    return Plan(
        edits=edits,
        adapter=wanted,
        before=before,
        after=after,
        trainer=trainer,
        trainable=trainable,
        tensors=_tensors(names, edits),
        files=code.files,
        generated=sorted({f"{reference.rpartition('.')[0]}.py" for reference in code.auto_map.values()}),
        requirements=code.requirements,
    )


def _tensors(names: Sequence[str], edits: Sequence[Edit]) -> dict[str, list[str]]:
    """Follows the base's tensors through all edits."""
    origins, _ = ledger.origins(names, [edit.document() for edit in edits])
    used = set(origins.values())
    return {
        "kept": [name for name in names if name in used],
        "new": [name for name, origin in origins.items() if origin is None],
        "dropped": [name for name in names if name not in used],
    }


def _trainable(model: PreTrainedModel, lora: Mapping[str, Any] | None, train: Sequence[str]) -> dict[str, int]:
    """Attaches the adapter to a model on the meta device and counts what PEFT makes trainable."""
    # How low-rank factors start changes no shape, and some starts need the weights.
    shapes = {**lora, "init_lora_weights": True} if lora is not None else None
    with console.silence():
        peft_model = adapters.attach(model, lora=shapes, train=train)
    counts: dict[str, int] = {}
    for kind, name, parameter in standing.named_parameters(peft_model):
        if parameter.requires_grad:
            counts[f"{kind} {name}"] = counts.get(f"{kind} {name}", 0) + parameter.numel()
    return counts


def run(recipe: Recipe, output: str | Path | None = None, *, resume: bool = False) -> Report:
    """Does every stage that the recipe names and writes `report.json` and `report.html` beside the results.

    With `resume`, stages whose result is there, and was made by the same recipe, are not repeated, and training goes on
    from its last checkpoint.

    Raises:
        SolidifyError: the recipe or the data is wrong, or a result does not hold.
        CheckFailed: a check failed; the report is written first.
    """
    directory = output_of(recipe, output)
    places.refuse_foreign(directory)
    _refuse_early(recipe)
    report = Report(str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    report.write(directory / "report.json", recipe=recipe.document(), finished=False)
    try:
        build(recipe, directory, report=report, resume=resume)
        if recipe.adapter is not None:
            train(recipe, directory, report=report, resume=resume)
            merge(directory, report=report)
    finally:  # whatever stopped the run, what was found before it is kept
        report.write(directory / "report.json", recipe=recipe.document(), finished=False)
    finish(recipe, directory, report)
    report.require()
    return report


def finish(recipe: Recipe, directory: Path, report: Report) -> None:
    """Writes the report of a run, as JSON and as a page."""
    versions = manifest.current_versions()
    report.write(directory / "report.json", recipe=recipe.document(), finished=True, versions=versions)
    page = sources.render("report.html.jinja", report=report, recipe=recipe.document(), versions=versions)
    (directory / "report.html").write_text(page, encoding="utf-8")


def build(recipe: Recipe, directory: Path, *, report: Report | None = None, resume: bool = False) -> Report:
    """Surgery and solidification: writes `directory/artifact`.

    Raises:
        SolidifyError: as the stages do; nothing is then left at `directory/artifact`.
    """
    report = report or Report(str(directory))
    target = directory / "artifact"
    document = {key: recipe.document()[key] for key in ("base", "surgery")}
    if resume and _made_by(target, document, "artifact"):
        report.add("build", certificate.witness(target))
        return report
    set_seed(int(recipe.training.get("seed", SEED)))
    with console.stage("Loading the base"):
        base = materials.load_base(recipe)
        inputs = {case: probing.probe_inputs(base.model, **s) for case, s in certificate.CASES.items()}
        tensors.realign(base.model)
        before = roundtrip.outputs(base.model, inputs)
        digests = tensors.digests(base.model.state_dict().items())
    with console.stage("Replacing modules"):
        edits = materials.operate(recipe, base.model)
        records = [edit.document() for edit in edits]
        promised = all(edit.identical or edit.bypass for edit in edits)
        report.add(
            "surgery",
            [
                structure.structure(base.model, records),
                structure.in_use(base.model, records),
                structure.start(before, roundtrip.outputs(base.model, inputs), promised=promised),
                structure.untouched(base.model, digests, records),
            ],
        )
    with console.stage("Writing the artifact and loading it in a fresh process"):
        artifact = build_artifact(
            base.model, edits, target, tokenizer=base.tokenizer, base=base.origin, recipe=document
        )
    report.add("build", artifact.findings)
    return report


def train(recipe: Recipe, directory: Path, *, report: Report | None = None, resume: bool = False) -> Report:
    """Trains the recipe's adapter on `directory/artifact` and writes `directory/adapter`.

    Raises:
        RecipeError: the recipe has no adapter.
        SolidifyError: as the stages do.
    """
    report = report or Report(str(directory))
    if recipe.adapter is None:
        raise RecipeError("the recipe has no `adapter`, so there is nothing to train")
    target = directory / "adapter"
    places.refuse_foreign(target)
    document = recipe.document()
    if resume and _made_by(target, document, "adapter"):
        return report
    set_seed(int(recipe.training.get("seed", SEED)))
    with console.stage("Loading the artifact and attaching the adapter"):
        model = loading.load_artifact(directory / "artifact")
        tokenizer = loading.load_tokenizer(directory / "artifact")
        base = manifest.read(directory / "artifact")
        wanted = planning.plan(model, recipe.adapter.lora, recipe.adapter.train)
        inputs = {case: probing.probe_inputs(model, **s) for case, s in certificate.CASES.items()}
        before = roundtrip.outputs(model, inputs)
        peft_model = adapters.attach(model, lora=recipe.adapter.lora, train=recipe.adapter.train)
    report.add("train", [trainable.trainable(peft_model, wanted)])
    trainer, examples = materials.make_trainer(recipe, directory, peft_model, tokenizer)
    witness = gradients.GradientWitness(peft_model)
    trainer.add_callback(witness)
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(TrainingBar())
    checkpoint = (
        get_last_checkpoint(directory / "checkpoints") if resume and (directory / "checkpoints").is_dir() else None
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    console.words.print(history_table(trainer.history))
    with console.stage("Checking what training did"):
        report.add(
            "train",
            [
                witness.finding(),
                trainable.frozen(peft_model, base),
                gradients.parts_sum(trainer.history),
                gradients.accumulation(trainer, materials.ragged(examples), tolerance=_tolerance(trainer)),
            ],
        )
        report.measured["history"] = trainer.history
        _release(trainer, peft_model, before)
        report.add("train", roundtrip.adapter_effect(peft_model, before, inputs))
        storage.save_adapter(peft_model, target, recipe=document)
        again = storage.load(directory / "artifact", target)
        reloaded = roundtrip.outputs(again, inputs)
        report.add(
            "train",
            [
                roundtrip.adapter_reload(roundtrip.outputs(peft_model, inputs), reloaded),
                roundtrip.wrong_base_refused(again, manifest.read(target), target),
            ],
        )
        _measure_losses(recipe, tokenizer, again, report)
    return report


def _release(trainer: Any, model: Any, before: dict[str, torch.Tensor]) -> None:
    """Takes back what training left on the model: accelerate's autocast around its forward, another device."""
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model.to(next(iter(before.values())).device).eval()


def merge(directory: Path, *, report: Report) -> None:
    """Merges `directory/adapter` into `directory/merged`."""
    with console.stage("Merging the adapter and loading the result in a fresh process"):
        merged = export.merge(directory / "adapter", directory / "merged")
    report.add("merge", merged.findings)


def history_table(history: list[dict[str, float]]) -> Any:
    """Shows the first and the last logged value of the loss and of every term."""
    names = [key.removeprefix("term/") for key in history[0] if key.startswith("term/")] if history else []
    rows = [
        (
            name,
            *(f"{logs[f'{kind}/{name}']:.4g}" for logs in (history[0], history[-1]) for kind in ("term", "weighted")),
        )
        for name in names
    ]
    rows += [("total", "", f"{history[0]['loss']:.4g}", "", f"{history[-1]['loss']:.4g}")] if history else []
    columns = ("term", "first log", "weighted", "last log", "weighted")
    return console.table("The objective", columns, rows, numbers=(1, 2, 3, 4))


def _refuse_early(recipe: Recipe) -> None:
    """Finds what is wrong with a recipe before anything is computed or written: it is planned first."""
    plan(recipe)


def _tolerance(trainer: Any) -> float:
    """Float32 sums in another order; half precision rounds every product."""
    half = trainer.args.bf16 or trainer.args.fp16 or trainer.model.dtype in (torch.bfloat16, torch.float16)
    return 5e-2 if half else 1e-4


def _measure_losses(recipe: Recipe, tokenizer: Any, model: Any, report: Report) -> None:
    """Measures the held-out loss with and without the adapter."""
    _, held_out = materials.make_examples(recipe, tokenizer)
    if held_out is None:
        return
    collate = data.collator(tokenizer)
    with model.disable_adapter():
        report.measured["heldout_loss_artifact"] = data.mean_loss(model, held_out, collate)
    report.measured["heldout_loss_trained"] = data.mean_loss(model, held_out, collate)
    gc.collect()


def _made_by(target: Path, document: dict[str, Any], kind: str) -> bool:
    """Returns whether a directory is whole and was made by this recipe."""
    try:
        record = manifest.read(target, kind)
    except ArtifactError:
        return False
    return record.recipe == document and not manifest.faults(target, record)
