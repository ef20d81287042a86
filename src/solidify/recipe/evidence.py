"""What is looked at when a recipe's training has ended: rows that are split in several ways, and held-out figures."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

from solidify.adapter import lookup
from solidify.recipe import datasets, kinds
from solidify.recipe.schema import Recipe
from solidify.system import console
from solidify.training import data, sources

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
