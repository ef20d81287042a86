"""From a recipe to a trainer: its arguments, its data, and over how many processes it is spread."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig

from solidify.adapter import lookup
from solidify.directory import trust
from solidify.errors import DataError, ObjectiveError, RecipeError, raised_as, refuse
from solidify.model import anatomy
from solidify.recipe import datasets, objectives
from solidify.recipe.schema import Recipe
from solidify.system import console, foreign, processes
from solidify.training import batching, defaults, groups, packing
from solidify.training.groups import ParameterGroup
from solidify.training.sft import ObjectiveSFTTrainer
from solidify.training.trainer import ObjectiveTrainer


def trainer_class(recipe: Recipe) -> type[Any]:
    """A field that only SFTConfig has asks for TRL's trainer."""
    plain = {f.name for f in fields(TrainingArguments)}
    sft = {f.name for f in fields(SFTConfig)}
    field_names = plain | sft
    faults = []
    for key in recipe.training:
        if key not in field_names:
            close = get_close_matches(key, field_names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            faults.append(f"training.{key} is not a field of TrainingArguments or SFTConfig{hint}")
    refuse(RecipeError, "the training section does not fit", faults)
    return ObjectiveSFTTrainer if any(key not in plain for key in recipe.training) else ObjectiveTrainer


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
    moved = any(group.learning_rate for group in recipe.parameter_groups)
    faults = defaults.of_another_kind(recipe.training, (TrainingArguments, SFTConfig))
    faults += defaults.faults(recipe.training, held_out=recipe.data.eval is not None, moved=moved)
    refuse(RecipeError, "the training section does not fit", faults)
    if recipe.data.image is not None:
        refuse(RecipeError, "images do not go with the training section", _against_images(recipe))
        values = {"remove_unused_columns": False, **values}  # a row's images are a column that the model does not take
    elif trainer_class(recipe) is ObjectiveTrainer:
        values = {"remove_unused_columns": False, **values}  # examples hold what is read, and no more
        if recipe.data.packing and values["remove_unused_columns"]:
            raise RecipeError("training.remove_unused_columns would remove where the documents of a window end")
    if not recipe.data.shuffle and not recipe.data.group_by:
        values = {"train_sampling_strategy": "sequential", **values}
    kind = TrainingArguments
    if trainer_class(recipe) is ObjectiveSFTTrainer:
        kind = SFTConfig
        # TRL would add its own load balance to the loss of every MoE model; here the objective says what is in it.
        own = {
            "router_aux_loss_coef": 0.0,
            "max_length": recipe.data.max_length,
            "dataset_text_field": recipe.data.text,
        }
        values = {**own, **values}
    with foreign.calling("the training section does not fit", RecipeError):
        return kind(**values)


def _against_images(recipe: Recipe) -> list[str]:
    plain = {f.name for f in fields(TrainingArguments)}
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


def make_trainer(recipe: Recipe, directory: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    """Returns a trainer for a recipe, and the examples it trains on."""
    assert recipe.data is not None
    arguments = training_arguments(recipe, directory)
    objective = objectives.make_objective(recipe, model.get_base_model())
    plain = lookup.plain_model(model)
    datasets.refuse_unprepared(recipe, processor, plain)
    kind = trainer_class(recipe)
    if kind is ObjectiveSFTTrainer:
        train_texts, eval_texts = datasets.make_sft_rows(recipe, processor, plain)
        options: dict[str, Any] = {"train_dataset": train_texts, "eval_dataset": eval_texts}
    else:
        prepared = datasets.prepare(recipe, processor, plain)
        options = {
            "train_dataset": prepared.train,
            "eval_dataset": prepared.held_out,
            "data_collator": prepared.collate,
        }
        _say_counted(prepared)
        if recipe.data.packing:
            packing.refuse_leaking(model)
            console.words.print("data.packing: no document of a window reaches another, as tried on this model")
    refused = foreign.calling(f"{kind.__name__} does not take the training section", RecipeError)
    with refused, trust.never_asking():  # TRL reads a tokenizer that the section may name
        trainer = kind(
            model=model,
            args=arguments,
            processing_class=datasets.processing_class(recipe, processor, plain),
            objective=objective,
            parameter_groups=parameter_groups(recipe),
            group_by=recipe.data.group_by,
            **options,
        )
    if datasets.is_multimodal(recipe, plain) and [term.loss for term in recipe.objective] == ["model"]:
        _refuse_idle_rows(trainer)
    return trainer, trainer.train_dataset


def _say_counted(prepared: datasets.Prepared) -> None:
    for part, counts in prepared.counted.items() if processes.is_first() else ():
        console.words.print(f"data.{part}: {prepared.format}: {counts}")


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
