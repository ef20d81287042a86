"""What is looked at when a recipe's training has ended: rows that are split in several ways, and held-out figures."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from solidify.adapter import lookup
from solidify.artifact import loading
from solidify.recipe import datasets, kinds, models
from solidify.recipe.schema import Recipe
from solidify.system import console
from solidify.training import data, sources

_SURGERY = ("heldout_loss_base", "heldout_loss_artifact")  # before surgery, and after it
_LOSS = ("heldout_loss_artifact", "heldout_loss_trained")  # without the adapter, and with it


def probes(trainer: Any, examples: Any) -> list[dict[str, Any]]:
    """Returns a few rows that take no more memory at once than a micro-batch of the training; none if none are so few.

    Examples that were made here are cut to different lengths; of TRL's own rows the shortest are taken as they are.
    """
    size = trainer.args.per_device_train_batch_size
    few = sources.first(examples, datasets.PROBES) if sources.is_stream(examples) else examples
    if not len(few) or not any(name.endswith("_ids") and name != "input_ids" for name in few[0]):
        return datasets.ragged(examples, size, trainer.data_collator)
    lengths = trainer.runner.lengths(few)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for count in (datasets.PROBES, datasets.PROBES // 2, 2):
        if count <= len(order) and count * lengths[order[count - 1]] <= size * lengths[order[-1]]:
            return [dict(few[row]) for row in order[:count]]
    return []


def evaluate(recipe: Recipe, trainer: Any) -> dict[str, float]:
    """Lets a trainer that makes its own batches measure the held-out rows; all processes take part."""
    kind = kinds.find(recipe)
    if trainer.eval_dataset is None or not kind.takes_rows:
        return {}
    with console.stage("Measuring the held-out rows"):
        found = _read_numbers(trainer)
        if kind.name == "reward":  # whose loss means something without the adapter, too
            with trainer.accelerator.unwrap_model(trainer.model).disable_adapter():
                before = _read_numbers(trainer)
            found |= dict(zip(_LOSS, (before["eval_loss"], found["eval_loss"]), strict=True))
    return found


def _read_numbers(trainer: Any) -> dict[str, float]:
    numbers = trainer.evaluate()
    timed = ("runtime", "per_second", "epoch")
    return {k: v for k, v in numbers.items() if isinstance(v, (int, float)) and not k.endswith(timed)}


def measures_surgery(recipe: Recipe) -> bool:
    """Returns whether held-out rows tell what surgery alone does: nothing is trained or healed that measures them."""
    alone = recipe.adapter is None and recipe.heal is None and bool(recipe.surgery)
    return alone and recipe.data is not None and recipe.data.eval is not None


def measure_surgery(recipe: Recipe, artifact: Path) -> dict[str, float]:
    """Measures the held-out loss of the base, and of the artifact that surgery made of it, one after the other."""
    found: dict[str, float] = {}
    for name in _SURGERY:
        if name == _SURGERY[0]:
            base = models.load_base(recipe)
            model, processor = base.model, base.processor or base.tokenizer
        else:
            allowed = recipe.base.trust_remote_code
            model = loading.load_artifact(artifact, trust_remote_code=allowed)
            processor = loading.load_processor(artifact, trust_remote_code=allowed)
        prepared = datasets.prepare(recipe, processor, model, parts=("eval",))
        assert prepared.held_out is not None
        measured = data.measure(model, prepared.held_out, prepared.collate)
        found |= {name.replace("loss", key): value for key, value in measured.items()}
        del model
        gc.collect()
    return found


def measure_losses(recipe: Recipe, processor: Any, model: Any) -> dict[str, float]:
    """Measures the held-out loss of a model that learns by its own loss, without the adapter and with it."""
    if kinds.find(recipe).takes_rows:
        return {}
    prepared = datasets.prepare(recipe, processor, lookup.plain_model(model), parts=("eval",))
    if prepared.held_out is None:
        return {}
    found: dict[str, float] = {}
    for name, switched in zip(_LOSS, (model.disable_adapter(), nullcontext()), strict=True):
        with switched:
            measured = data.measure(model, prepared.held_out, prepared.collate)
        found |= {name.replace("loss", key): value for key, value in measured.items()}
    gc.collect()
    return found
