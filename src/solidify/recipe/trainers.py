"""From a recipe to a trainer: its arguments, its data, and over how many processes it is spread."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from solidify.adapter import lookup, start_kinds
from solidify.directory import trust
from solidify.errors import DataError, ObjectiveError, RecipeError, raised_as, refuse
from solidify.model import anatomy
from solidify.objective.objective import Objective
from solidify.recipe import datasets, first_batch, kinds, objectives, prefix_plan, trl_rows
from solidify.recipe.kinds import Kind
from solidify.recipe.schema import Recipe
from solidify.system import console, foreign, processes
from solidify.training import batching, defaults, groups, packing
from solidify.training.groups import ParameterGroup
from solidify.training.trainer import ObjectiveTrainer
from solidify.upstream.transformers_training import has_length


def trainer_class(recipe: Recipe) -> type[Any]:
    """Returns the trainer that a recipe names; with `auto` a field that only SFTConfig has asks for TRL's."""
    return kinds.find(recipe).trainer


def training_arguments(recipe: Recipe, directory: Path) -> TrainingArguments:
    """Returns the trainer's arguments: the recipe's, over the few defaults that differ from transformers'."""
    assert recipe.data is not None
    values = {
        "report_to": "none",
        "output_dir": str(directory / "checkpoints"),
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 on a CPU is refused
        "disable_tqdm": True,  # solidify shows a bar of its own
        **defaults.following(recipe.training),
    }
    kind = kinds.find(recipe)
    moved = any(group.learning_rate for group in recipe.parameter_groups)
    faults = defaults.of_another_kind(recipe.training, (TrainingArguments, kind.config))
    faults += defaults.faults(recipe.training, held_out=recipe.data.eval is not None, moved=moved)
    faults += trl_rows.length_faults(recipe) if kind.lengths else []
    refuse(RecipeError, "the training section does not fit", faults)
    if recipe.data.image is not None:
        refuse(RecipeError, "images do not go with the training section", _against_images(recipe, kind))
        values = {"remove_unused_columns": False, **values}  # a row's images are a column that the model does not take
    elif kind.trainer is ObjectiveTrainer:
        values = {"remove_unused_columns": False, **values}  # examples hold what is read, and no more
        if recipe.data.packing and values["remove_unused_columns"]:
            raise RecipeError("training.remove_unused_columns would remove where the documents of a window end")
    if not recipe.data.shuffle and not recipe.data.group_by:
        values = {"train_sampling_strategy": "sequential", **values}
    with foreign.calling("the training section does not fit", RecipeError):
        return kind.config(**{**kinds.own_settings(kind, recipe), **values})


def _against_images(recipe: Recipe, kind: Kind) -> list[str]:
    plain = {f.name for f in fields(TrainingArguments)}
    if kind.takes_rows:
        return [f"trainer: {kind.name} reads text alone in a recipe; leave data.image out"]
    faults = [
        f"training.{key} is TRL's, whose trainer makes its batches itself; leave it out"
        for key in recipe.training
        if key not in plain
    ]
    if recipe.training.get("remove_unused_columns"):
        faults.append(
            "training.remove_unused_columns would remove the images, and the model would read their image tokens "
            "as words"
        )
    if recipe.training.get("train_sampling_strategy", "random") != "random":
        faults.append(
            "training.train_sampling_strategy looks for lengths in pixel_values; write data.group_by: [length]"
        )
    return faults


def join(recipe: Recipe, directory: Path) -> None:
    """Meets the other processes that were started with this one, over the backend that training will use.

    Raises:
        RecipeError: the recipe shards in a way that would not happen, or that nothing here could gather again.
    """
    if recipe.adapter is not None:
        refuse_unspreadable(training_arguments(recipe, directory), here=True)
    processes.join()


def refuse_unspreadable(arguments: TrainingArguments, *, here: bool) -> None:
    """Raises RecipeError when a training shards in a way that nothing here could gather.

    With `here` also when it would not happen in these processes; without, that is told, as others may train.
    """
    unstarted = _find_unstarted(arguments)
    if not here and unstarted:
        console.words.print("\n".join(unstarted))
    faults = [*(unstarted if here else []), *_find_unspreadable(arguments)]
    refuse(RecipeError, "the training cannot be spread like that", faults)


def _find_unstarted(arguments: TrainingArguments) -> list[str]:
    state = arguments.distributed_state
    alone = state is None or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if not (arguments.fsdp and alone):
        return []
    return [
        "training.fsdp: accelerate shards a model over accelerators, one for each process of torchrun or `accelerate "
        "launch`; without them every process would silently hold the whole model; leave fsdp out"
    ]


def _find_unspreadable(arguments: TrainingArguments) -> list[str]:
    faults = []
    configured = arguments.fsdp_config if isinstance(arguments.fsdp_config, dict) else {}
    if arguments.fsdp and configured.get("version", 2) != 2:
        faults.append("training.fsdp_config: version must be 2; checks and saving gather what fully_shard spreads")
    if arguments.fsdp and configured.get("cpu_ram_efficient_loading"):
        faults.append(
            "training.fsdp_config: leave out cpu_ram_efficient_loading; every process maps the artifact's file, whose "
            "memory they share"
        )
    if is_deepspeed_zero3_enabled():
        faults.append(
            "training.deepspeed: ZeRO stage 3 splits the parameters, and solidify does not gather them again; use "
            "stage 2, or training.fsdp"
        )
    return faults


def parameter_groups(recipe: Recipe) -> list[ParameterGroup]:
    """Returns the recipe's parameter groups; raises RecipeError for one that cannot be."""
    with raised_as(RecipeError, of=ObjectiveError):
        return groups.declared([group.model_dump() for group in recipe.parameter_groups])


def refuse_unteachable(recipe: Recipe, model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """Raises what a training would refuse of a model, its rows and its partners; `model` may be on the meta device.

    Returns how the rows are read.
    """
    kind = kinds.find(recipe)
    refuse_unreadable_start(recipe)
    kinds.refuse_head(kind, model)
    if kind.takes_rows:
        found = kinds.rehearse_rows(kind, recipe, datasets.tokenizer_of(processor))
    else:
        with kinds.pointed_out(recipe):
            found = first_batch.rehearse(recipe, processor, model)
    if kind.name == "sft":
        _refuse_idle_fields(recipe, found["format"])
        found = {**found, "max_length": trl_rows.longest(recipe)} if found["format"] == "text" else found
    if (way := trl_rows.find_sharing(recipe)) is not None:
        packing.refuse_unpackable(model, way)
    kinds.refuse_partners(kind, recipe, model)
    arguments = training_arguments(recipe, Path("nowhere"))
    faults = kinds.setting_faults(kind, arguments, Objective(objectives.make_terms(recipe)), recipe)
    refuse(ObjectiveError, f"{kind.trainer.__name__} cannot train like this", faults)
    prefix_plan.refuse_uncacheable(recipe, kind, arguments)
    return found


def refuse_unreadable_start(recipe: Recipe) -> None:
    """Raises RecipeError for a start that is made from data, where the trainer makes tokens of the rows itself."""
    start = start_kinds.fed(recipe.adapter.lora if recipe.adapter is not None else None)
    kind = kinds.find(recipe)
    if start is not None and kind.takes_rows:
        raise RecipeError(
            f"adapter.lora: the start {start!r} reads rows of data.train as the model does, and trainer: {kind.name} "
            "makes tokens of them itself; take another start, or attach in Python, with `batches`"
        )


def _refuse_idle_fields(recipe: Recipe, form: str) -> None:
    """Raises RecipeError for fields of SFTConfig that do nothing to the rows of a recipe."""
    refuse(RecipeError, "the training section does not fit the rows", trl_rows.sft_faults(recipe, form))


def make_trainer(recipe: Recipe, directory: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    """Returns a trainer for a recipe, and the examples it trains on."""
    assert recipe.data is not None
    kind, arguments = kinds.find(recipe), training_arguments(recipe, directory)
    prefix_plan.refuse_uncacheable(recipe, kind, arguments)
    objective = objectives.make_objective(recipe, model.get_base_model())
    plain = lookup.plain_model(model)
    datasets.refuse_unprepared(recipe, processor, plain)
    form, given = _prepare_rows(kind, recipe, processor, model)
    if prefix_plan.shuffles_once(recipe, kind, arguments):
        given["train_dataset"] = given["train_dataset"].shuffle(seed=recipe.data.seed)
    options = kinds.options(kind, recipe, objective)
    refused = foreign.calling(f"{kind.trainer.__name__} does not take the training section", RecipeError)
    with refused, trust.never_asking():  # TRL reads a tokenizer that the section may name
        trainer = kind.trainer(
            model=model,
            args=arguments,
            processing_class=_processing_class(kind, recipe, processor, plain),
            objective=objective,
            parameter_groups=parameter_groups(recipe),
            group_by=recipe.data.group_by,
            cache_prefix=bool(recipe.cache_prefix),
            **given,
            **options,
        )
    _say_left_out(given["train_dataset"], trainer.train_dataset, kind)
    _refuse_sharing(recipe, kind, model, trainer)
    if kind.takes_rows or (kind.name == "sft" and form == "text"):
        trl_rows.say_cut("train", form, given["train_dataset"], trainer.train_dataset, trainer)
        trl_rows.say_cut("eval", form, given["eval_dataset"], trainer.eval_dataset, trainer)
    if datasets.is_multimodal(recipe, plain) and [term.loss for term in recipe.objective] == ["model"]:
        _refuse_idle_rows(trainer)
    return trainer, trainer.train_dataset


def _say_counted(prepared: datasets.Prepared) -> None:
    for part, counts in prepared.counted.items() if processes.is_first() else ():
        console.words.print(f"data.{part}: {prepared.format}: {counts}")


def _prepare_rows(kind: Kind, recipe: Recipe, processor: Any, model: Any) -> tuple[str, dict[str, Any]]:
    """Returns the format of what a trainer reads, its rows, and what makes batches where that is not the trainer's."""
    assert recipe.data is not None
    plain = lookup.plain_model(model)
    if kind.takes_rows:
        read = kinds.read_rows(kind, recipe)
        return kinds.name_format(kind, read[0]), {"train_dataset": read[0], "eval_dataset": read[1]}
    of_trl = kind.name == "sft"
    prepared = (datasets.make_sft_rows if of_trl else datasets.prepare)(recipe, processor, plain)
    if of_trl:
        _refuse_idle_fields(recipe, prepared.format)
    _say_counted(prepared)
    given = {"train_dataset": prepared.train, "eval_dataset": prepared.held_out}
    return prepared.format, given if of_trl else {**given, "data_collator": prepared.collate}


def _refuse_sharing(recipe: Recipe, kind: Kind, model: Any, trainer: Any) -> None:
    """Raises DataError where several documents stand in one row, and one reaches another in this model."""
    way = trl_rows.find_sharing(recipe)
    if way is None:
        return
    of_trl = kind.name == "sft" and way != "data.packing"
    packing.refuse_leaking(model, trainer.data_collator if of_trl else None, way)
    console.words.print(f"{way}: no document of a window reaches another, as tried on this model")


def _processing_class(kind: Kind, recipe: Recipe, processor: Any, model: Any) -> Any:
    """Returns what prepares text; TRL's trainers of conversations read it by the recipe's chat template."""
    if not kind.takes_rows:
        return datasets.processing_class(recipe, processor, model)
    return kinds.with_template(recipe, datasets.tokenizer_of(processor))


def _say_left_out(given: Any, read: Any, kind: Kind) -> None:
    """Says how many rows TRL leaves out, as longer than it may be, and refuses a training without any."""
    if not (kind.takes_rows and has_length(given) and has_length(read)) or len(read) >= len(given):
        return
    left = f"{len(given) - len(read)} of {len(given)} rows are longer than max_length and left out"
    if not len(read):
        raise DataError(f"{left}, so nothing is left to learn from; give data.max_length more")
    console.words.print(left)


def _refuse_idle_rows(trainer: Any) -> None:
    """Raises DataError when a row without images reaches nothing that is trained: a batch of such rows has no gradient.

    Torch would say so in the middle of the training.
    """
    rows = trainer.train_dataset
    number = next((row for row, filled in enumerate(batching.modalities(rows)) if not filled), None)
    if number is None:
        return
    ids = list(rows[number]["input_ids"][:8])
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids}])
    batch = {name: tensor.to(trainer.model.device) for name, tensor in batch.items()}
    with trainer.compute_loss_context_manager(), anatomy.evaluation(trainer.model):
        loss = trainer.model(**batch).loss
    if not loss.requires_grad:
        raise DataError(
            f"rows without images (example {number} is one) reach nothing that is trained, so a batch of them has no "
            "gradient; leave them out, or train something in the language model too"
        )
