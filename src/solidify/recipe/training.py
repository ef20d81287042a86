"""The parts of the training stage: load, train, check, bring back, keep. `stages.py` has their order."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.trainer_callback import PrinterCallback

from solidify.adapter import adapters, data_starts, expert_factors, start_kinds, storage
from solidify.artifact import loading
from solidify.checks import gradients, roundtrip, trainable
from solidify.directory import manifest, results
from solidify.errors import ObjectiveError
from solidify.findings import Finding, Report
from solidify.recipe import datasets, evidence, healing, models, trainers
from solidify.recipe.schema import Recipe
from solidify.system import console, foreign, processes
from solidify.training import checkpoints
from solidify.training.collating import Pictures
from solidify.training.progress import TrainingBar
from solidify.weights import hashing

_START_ROWS, _TOGETHER = 64, 4  # what a start that is made from data reads, and how many rows stand in a batch
UNFINISHED = Finding(
    "adapter reload exact", False, "the training ended before its adapter was loaded again; train with --resume"
)


def load_artifact(recipe: Recipe, directory: Path) -> tuple[PreTrainedModel, Any]:
    """Returns what the adapter is trained on, surgery's artifact or the healed one, and its processor."""
    source, allowed = healing.healed(recipe, directory), recipe.base.trust_remote_code
    return (
        loading.load_artifact(source, trust_remote_code=allowed, **models.quantization(recipe)),
        loading.load_processor(source, trust_remote_code=allowed),
    )


def read_start(recipe: Recipe, processor: Any, model: PreTrainedModel) -> list[dict[str, Any]] | None:
    """Reads what a start that is made from data reads: the first rows of `data.train`; None for every other start.

    Raises:
        RecipeError: the trainer makes tokens of the rows itself.
        DataError: the rows cannot be read, or are not what the head learns from.
    """
    assert recipe.adapter is not None
    if start_kinds.fed(recipe.adapter.lora) is None:
        return None
    trainers.refuse_unreadable_start(recipe)
    prepared = datasets.prepare(datasets.unpacked(recipe), processor, model, parts=("train",))
    rows = list(islice(prepared.train, _START_ROWS))
    return [dict(prepared.collate(rows[place : place + _TOGETHER])) for place in range(0, len(rows), _TOGETHER)]


def factor_experts(model: Any) -> None:
    """Has LoRA on fused experts run through its factors, where there is some, and says so."""
    if (count := expert_factors.factor_if_any(model)) and processes.is_first():
        console.words.print(f"{count} LoRA updates of fused experts are trained through their factors")


def train_adapter(recipe: Recipe, directory: Path, trainer: Any, resume: bool) -> gradients.GradientWitness:
    """Trains, from the last checkpoint of this very run if there is one, and returns who looked at the gradients."""
    witness = gradients.GradientWitness(trainer.model)
    trainer.add_callback(witness)
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        unit = "images" if isinstance(trainer.data_collator, Pictures) else "tokens"
        trainer.add_callback(TrainingBar(unit))
    base = manifest.read(healing.healed(recipe, directory))
    made_by = [recipe.document(), base.digest(), processes.count()]
    trainer.fingerprint = hashing.digest_values(made_by)
    where = Path(trainer.args.output_dir)
    checkpoint = processes.on_first(
        lambda: checkpoints.last(where, trainer.fingerprint, processes.count()) if resume else None
    )
    if checkpoint is not None:
        console.words.print(f"Going on from {checkpoint}")
    elif resume and any(where.glob("checkpoint-*")):
        console.words.print(f"No checkpoint in {where} is whole and of this recipe, base and number of processes")
    with foreign.calling("the training stopped", ObjectiveError):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    return witness


def check_training(
    trainer: Any, witness: gradients.GradientWitness, examples: Any, base: manifest.Manifest
) -> list[Finding]:
    """Says what training did; its gradients are looked at once more, which a short training needs."""
    frozen = trainable.frozen(trainer.model, base)
    if trainer.runner.writes_answers:
        split = Finding.unseen(gradients.ACCUMULATION, "what is trained on is written in training, step by step")
    else:
        probes = evidence.probes(trainer, examples)
        split = gradients.accumulation(trainer, probes, tolerance=_choose_tolerance(trainer), witness=witness)
    return [
        *trainer.kernel_findings,
        *trainer.prefix_findings,
        witness.finding(),
        frozen,
        gradients.parts_sum(trainer.history),
        gradients.terms(trainer.engine.sanity, steps=trainer.state.global_step),
        split,
    ]


def release_model(recipe: Recipe, directory: Path, trainer: Any) -> Any:
    """Returns the trained model on the CPU, in the first process.

    A model that is elsewhere, or spread over the processes, is not brought back whole: what was trained is put on the
    artifact once more, whose file is mapped.
    """
    assert recipe.adapter is not None
    model = trainer.model
    if model.device.type == "cpu" and not processes.is_spread(model):
        return model.eval()
    trained = adapters.trained_state(model)
    if not processes.is_first():
        return None
    fresh, _ = load_artifact(recipe, directory)
    with console.silence():
        alike = data_starts.declared_alike(model, recipe.adapter.lora)
        again = adapters.attach(fresh, lora=alike, train=recipe.adapter.train)
    here = dict([*again.named_parameters(), *again.named_buffers()])
    with torch.no_grad():
        for name, tensor in trained.items():
            here[name].copy_(tensor)
    return again.eval()


def keep_adapter(
    recipe: Recipe,
    directory: Path,
    report: Report,
    model: Any,
    before: dict[str, torch.Tensor],
    inputs: dict[str, Any],
) -> None:
    """Saves the adapter, and compares what it does now with what it does when it is loaded again."""
    target = directory / "adapter"
    with console.stage("Saving the adapter and loading it again"):
        report.add("train", roundtrip.adapter_effect(model, before, inputs))
        attached = roundtrip.outputs(model, inputs)
        figures = {key: value for key, value in report.measured.items() if key.startswith("heldout_")}
        found = [*report.stages["train"], UNFINISHED]  # until the rest is looked at, whatever ends this
        storage.save_adapter(model, target, recipe=recipe.document(), measured=figures, found=found)
        again = storage.load_with_adapter(
            healing.healed(recipe, directory),
            target,
            trust_remote_code=recipe.base.trust_remote_code,
            **models.quantization(recipe),
        )
        read_back = [
            roundtrip.adapter_reload(attached, roundtrip.outputs(again, inputs)),
            roundtrip.wrong_base_refused(again, manifest.read(target), target),
        ]
        report.add("train", read_back)
        results.keep_failures(target, read_back, instead_of=UNFINISHED)


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


def _choose_tolerance(trainer: Any) -> float:
    """Float32 sums in another order; half precision rounds every product."""
    half = trainer.args.bf16 or trainer.args.fp16 or trainer.model.dtype in (torch.bfloat16, torch.float16)
    half = half or getattr(trainer.model, "is_loaded_in_8bit", False)  # bitsandbytes multiplies in float16
    return 5e-2 if half else 1e-4
