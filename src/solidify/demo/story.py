"""`solidify demo`: the main job on the embedded model, told with tables and ended by what was proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from solidify.adapter import adapters, storage
from solidify.artifact import loading
from solidify.builtin import corpus, tiny_olmoe
from solidify.demo import effect
from solidify.demo.effect import HeldOut, Row
from solidify.findings import Finding, Report, label_of
from solidify.losses import forward_kl
from solidify.objective.objective import Objective, Term
from solidify.recipe import reporting, schema, stages
from solidify.recipe.schema import Recipe
from solidify.system import console
from solidify.training import data
from solidify.training.progress import TrainingBar
from solidify.training.trainer import ObjectiveTrainer

RECIPE = Path(__file__).with_name("trash_can.yaml")
PROMPT = "The following"

# What the table at the end shows, and the finding of the run that proves it.
PROVED = {
    "start identical": "start identical",
    "reload identical": "outputs identical (AutoModelForCausalLM)",
    "loads without us": "loads without us",
    "unchanged tensors identical": "unchanged tensors identical",
    "trainable set exact": "trainable set exact",
    "gradients reach what is trained": "gradients reach what is trained",
    "frozen tensors unchanged": "frozen tensors unchanged",
    "gradient invariance": "gradient does not depend on accumulation",
    "loss parts sum": "loss parts sum to the total",
    "adapter reload exact": "adapter reload exact",
    "adapter off is the base": "adapter off is the base",
    "wrong base refused": "wrong base refused",
    "merged equals attached": "merged equals attached",
    "merge changes only what was trained": "only what was trained changed",
}


def tell(output: Path) -> Report:
    """Runs the recipe, measures what it bought, and prints both.

    Raises:
        CheckFailed: a promise does not hold.
    """
    show = console.results.print
    figures = tiny_olmoe.report()
    show(
        f"The base: {tiny_olmoe.NAME}, trained on {figures['train_tokens']:,} tokens of Python's own documentation. "
        f"Held-out loss {figures['heldout_loss']:.3f} nats per token; a unigram model: {figures['unigram_loss']:.3f}."
    )
    loaded = schema.load(RECIPE)
    show(f"The recipe: {RECIPE.name} (also under examples/)\n")
    report = stages.run(loaded, output)
    rows = _measure_losses(loaded, output)
    report.measured["effect"] = [vars(row) for row in rows]
    report.add("inference", _try_adapter(output))
    reporting.finish(loaded, output, report)
    show(_effect_table(rows))
    show(_proof_table(report))
    show(f"Everything is in {output}: artifact/, adapter/, merged/, report.json, report.html")
    report.require()
    return report


def _proof_table(report: Report) -> Any:
    by_name = {finding.name: finding for finding in report.findings}
    rows = [
        (promise, console.line(label_of(by_name[name].verdict)), by_name[name].evidence)
        for promise, name in PROVED.items()
    ]
    rows += [(f.name, console.line(label_of(f.verdict)), f.evidence) for f in report.stages["inference"]]
    return console.table("What was proved", ("promise", "verdict", "evidence"), rows)


def _effect_table(rows: list[Row]) -> Any:
    base = rows[0]
    shown = [
        (
            row.name,
            f"{row.kept:.1%}",
            f"{1 - row.kept:.1%}",
            f"{row.loss:.4f}",
            f"{row.loss - base.loss:+.4f}",
        )
        for row in rows
    ]
    columns = ("model", "slots computed", "expert FLOPs saved", "held-out loss", "against the base")
    return console.table("What it bought", columns, shown, numbers=(1, 2, 3, 4))


def _try_adapter(output: Path) -> list[Finding]:
    """Generates with the adapter, without it, and with the merged model; switches between two adapters."""
    tokenizer = loading.load_tokenizer(output / "artifact")
    model = storage.load_with_adapter(output / "artifact", output / "adapter")
    storage.load_adapter(model, output / "adapter", name="second")
    texts = {"second": effect.generate(model, tokenizer, PROMPT)}
    model.set_adapter("default", inference_mode=True)
    texts["adapter"] = effect.generate(model, tokenizer, PROMPT)
    with model.disable_adapter():
        texts["without"] = effect.generate(model, tokenizer, PROMPT)
    texts["artifact"] = effect.generate(loading.load_artifact(output / "artifact"), tokenizer, PROMPT)
    texts["merged"] = effect.generate(loading.load_artifact(output / "merged"), tokenizer, PROMPT)
    return [
        Finding(
            "switching between adapters",
            texts["second"] == texts["adapter"],
            f"the same adapter under two names writes {texts['adapter']!r}",
        ),
        Finding(
            "generation without the adapter",
            texts["without"] == texts["artifact"],
            f"writes {texts['without']!r}",
        ),
        # Not a promise: merged weights round differently, and a near tie may fall the other way.
        Finding(
            "generation by the merged model",
            True if texts["merged"] == texts["adapter"] else None,
            f"writes {texts['merged']!r}",
        ),
    ]


def _measure_losses(loaded: Recipe, output: Path) -> list[Row]:
    """Measures held-out losses of the base, of a smaller top-k, and of the trash can, untrained and trained."""
    assert loaded.data is not None and loaded.adapter is not None
    with console.stage("Measuring what it bought"):
        base = loading.load_base(str(tiny_olmoe.directory()))
        collate = data.collator(base.tokenizer)
        cut: dict[str, Any] = {"text": "text", "max_length": loaded.data.max_length}

        held_out, training = (
            HeldOut(data.tokenize(data.from_texts(corpus.texts(split), "text"), base.tokenizer, **cut), collate)
            for split in ("heldout", "train")
        )
        top_k = int(base.model.config.num_experts_per_tok)
        plain = Row(f"base, top-{top_k}", 1.0, held_out.loss(base.model))
        smaller = Row(
            f"top-{top_k - 1}, untrained",
            (top_k - 1) / top_k,
            held_out.loss(effect.with_top_k(base.model, top_k - 1)),
        )
        can = loading.load_artifact(output / "artifact")
        effect.calibrate(can, training, (top_k - 1) / top_k)
        untrained = Row("trash can, threshold set, untrained", held_out.kept(can), held_out.loss(can))
        trained_model = storage.load_with_adapter(output / "artifact", output / "adapter")
        trained = Row("trash can, trained (this run)", held_out.kept(trained_model), held_out.loss(trained_model))
    healed = _train_plainly(loaded, base.model, training, collate)
    lora = Row(f"top-{top_k - 1}, same LoRA training", smaller.kept, held_out.loss(healed))
    full = _train_plainly(loaded, loading.load_base(str(tiny_olmoe.directory())).model, training, collate)
    everything = Row(f"top-{top_k}, same LoRA training", 1.0, held_out.loss(full))
    rows = [plain, smaller, untrained, everything, lora, trained]
    for name, row, others in (
        ("top-k at the trash can's share, untrained (interpolated)", untrained, [plain, smaller]),
        ("top-k at the trash can's share, trained (interpolated)", trained, [everything, lora]),
    ):
        if others[1].kept <= row.kept <= 1:
            rows.append(Row(name, row.kept, effect.at_same_share(others, row.kept)))
    return rows


def _train_plainly(loaded: Recipe, model: Any, training: HeldOut, collate: Any) -> Any:
    """Gives a stock model the recipe's LoRA, steps and data, with the model's loss and the KL to itself before."""
    assert loaded.adapter is not None
    peft_model = adapters.attach(model, lora=loaded.adapter.lora)
    arguments = TrainingArguments(
        output_dir="unused", report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
        **{key: value for key, value in loaded.training.items() if key != "save_strategy"},
    )  # fmt: skip
    reference = loading.load_base(str(tiny_olmoe.directory())).model
    trainer = ObjectiveTrainer(
        model=peft_model,
        args=arguments,
        train_dataset=training.examples,
        data_collator=collate,
        objective=Objective([Term("model"), Term(forward_kl, 0.5)], reference=reference),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingBar())
    trainer.train()
    return peft_model.eval()
