"""From the words of a recipe to the things that the stages take: models, edits, terms, examples, a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig

from solidify.artifact import companions, loading
from solidify.artifact.conversion import Scratch
from solidify.artifact.loading import BaseModel
from solidify.builtin import bases, corpus
from solidify.directory import manifest, trust
from solidify.errors import DataError, RecipeError, refuse
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.objective.objective import Objective, Term
from solidify.recipe import references
from solidify.recipe.schema import Base, Recipe
from solidify.surgery import ledger
from solidify.surgery.replacing import Edit
from solidify.system import console, files, foreign, processes
from solidify.training import batching, data, defaults, groups, images
from solidify.training.groups import ParameterGroup
from solidify.training.trainer import ObjectiveSFTTrainer, ObjectiveTrainer

PROBES = 8  # sequences on which the independence of accumulation is shown


def load_base(recipe: Recipe, device: str = "cpu", scratch: Path | None = None) -> BaseModel:
    """Loads the model that a recipe starts from: built in, local or from the hub.

    In `scratch`, a large one is converted to the layout in memory; what the surgery renames or drops is kept apart.
    """
    where = Scratch(scratch, lambda model: _not_kept(recipe, model)) if scratch is not None else None
    return _load(recipe, recipe.base, device, where)


def _load(recipe: Recipe, source: Base, device: str = "cpu", scratch: Scratch | None = None) -> BaseModel:
    name = source.model
    if (built_in := bases.directory(name)) is not None:
        loaded = loading.load_base(str(built_in), dtype=source.dtype, device=device)
        return replace(loaded, origin={**loaded.origin, "model": name})
    beside = recipe.directory / name
    loaded = loading.load_base(
        str(beside) if name and files.is_directory(beside) else name,
        revision=source.revision,
        dtype=source.dtype,
        device=device,
        trust_remote_code=source.trust_remote_code,
        scratch=scratch,
    )
    if loaded.tokenizer is None and (standing := companions.directory_of(loaded.model.config)) is not None:
        companions.refuse_broken_tokenizer(standing)
    return loaded


def load_teacher(recipe: Recipe, device: str = "cpu") -> PreTrainedModel | None:
    """Loads the model that a recipe learns from, if it names one."""
    return _load(recipe, recipe.teacher, device).model if recipe.teacher is not None else None


def _not_kept(recipe: Recipe, model: PreTrainedModel) -> list[str]:
    """Names the tensors of a model (on the meta device) that the surgery renames or drops."""
    names = list(model.state_dict())
    origins, _ = ledger.origins(names, [edit.document() for edit in operate(recipe, model)])
    return [name for name in names if origins.get(name) != name]


def operate(recipe: Recipe, model: PreTrainedModel, extent: Extent | None = None) -> list[Edit]:
    """Applies the surgery of a recipe to a model, one edit after the other."""
    beside = _Beside(recipe.directory, Extent.given(extent, model))
    return [edit for step in recipe.surgery for edit in step.apply(model, beside)]


class _Beside:
    """What the steps of a recipe need beside the model (`operation.Context`)."""

    def __init__(self, directory: Path, extent: Extent) -> None:
        self.directory, self.extent = directory, extent

    def module(self, reference: str) -> type[torch.nn.Module]:
        """Returns the class that a reference names."""
        module = references.resolve(reference, self.directory)
        if not (isinstance(module, type) and issubclass(module, torch.nn.Module)):
            raise RecipeError(f"surgery: {reference} is not a class of torch.nn.Module")
        return module

    def file(self, name: str) -> Path:
        """Returns a file beside the recipe."""
        return self.directory / name


def trainer_class(recipe: Recipe) -> type[Any]:
    """A field that only SFTConfig has asks for TRL's trainer."""
    plain = {f.name for f in fields(TrainingArguments)}
    sft = {f.name for f in fields(SFTConfig)}
    known = plain | sft
    faults = []
    for key in recipe.training:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            faults.append(f"training.{key} is no field of TrainingArguments or SFTConfig{hint}")
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
            "training.remove_unused_columns would take the images away, and the model read their places as words"
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
    unstarted = _unstarted(arguments)
    if not here and unstarted:
        console.words.print("\n".join(unstarted))
    faults = [*(unstarted if here else []), *_unspreadable(arguments)]
    refuse(RecipeError, "the training cannot be spread like that", faults)


def _unstarted(arguments: TrainingArguments) -> list[str]:
    state = arguments.distributed_state
    alone = state is None or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if not (arguments.fsdp and alone):
        return []
    return [
        "training.fsdp: accelerate shards over accelerators that torchrun or `accelerate launch` gave a process "
        "each; here every process would silently hold the whole model"
    ]


def _unspreadable(arguments: TrainingArguments) -> list[str]:
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
            "training.deepspeed: ZeRO stage 3 takes the parameters apart, and nothing here gathers them; use stage 2, "
            "or training.fsdp"
        )
    return faults


def make_terms(recipe: Recipe) -> list[Term]:
    """Makes a term of each entry under the recipe's objective; raises ObjectiveError for one that cannot be made."""
    terms = []
    for entry in recipe.objective:
        loss: Any = entry.loss
        if loss != "model":
            loss = references.resolve(loss, recipe.directory)
        name = entry.name or (entry.loss.rpartition(":")[2] if entry.loss != "model" else "model")
        terms.append(Term(loss, entry.weight, name=name, arguments=entry.arguments, statistics=entry.statistics))
    objective = Objective(terms)
    if recipe.teacher is not None and not objective.asks_reference:
        raise RecipeError("teacher: no term of the objective looks at it; add one such as solidify.losses:forward_kl")
    return terms


def make_objective(recipe: Recipe, model: PreTrainedModel) -> Objective:
    """Binds the terms of a recipe to a model; the reference is the teacher, or what the surgery started from."""
    terms = make_terms(recipe)
    objective = Objective(terms)
    if recipe.teacher is not None:
        return Objective(terms, reference=load_teacher(recipe))
    if objective.asks_reference and not _switching_off_is_exact(recipe, model):
        return Objective(terms, reference=load_base(recipe).model)
    return objective


def _switching_off_is_exact(recipe: Recipe, model: PreTrainedModel) -> bool:
    """Returns whether the model without its changes is the base; what an artifact brought is switched off too."""
    changed_before = manifest.kind(recipe.directory / recipe.base.model) == "artifact"
    return not changed_before and all(edit.get("bypass") for edit in model.config.surgery)


def read_texts(recipe: Recipe) -> tuple[Any, Any]:
    """Reads training and evaluation text (None without the latter)."""
    assert recipe.data is not None
    read: list[Any] = []
    for name in (recipe.data.train, recipe.data.eval):
        if name is None:
            read.append(None)
        elif name in corpus.NAMES:
            read.append(data.from_texts(corpus.texts(corpus.NAMES[name]), recipe.data.text))
        elif name.startswith("builtin:"):
            raise RecipeError(f"data: there is no {name!r}; built in: {', '.join(corpus.NAMES)}")
        else:
            read.append(data.read(recipe.directory / name, recipe.data.text, recipe.data.image))
    return read[0], read[1]


def make_examples(recipe: Recipe, processor: Any) -> tuple[Any, Any]:
    """Returns training and evaluation examples, tokenized (None without the latter)."""
    assert recipe.data is not None
    options: dict[str, Any] = {"text": recipe.data.text, "max_length": recipe.data.max_length}
    tokenize: Any = data.tokenize if recipe.data.image is None else images.tokenize
    preparing = _tokenizer(processor) if recipe.data.image is None else processor
    train_texts, eval_texts = read_texts(recipe)
    tokenized = tokenize(train_texts, preparing, **options)
    return tokenized, tokenize(eval_texts, preparing, **options) if eval_texts is not None else None


def make_collator(recipe: Recipe, processor: Any) -> Any:
    """Returns what makes a batch of a recipe's examples."""
    assert recipe.data is not None
    return data.collator(_tokenizer(processor)) if recipe.data.image is None else images.Collator(processor)


def _tokenizer(processor: Any) -> Any:
    tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RecipeError(f"data: text needs a tokenizer, but all the base has is a {type(processor).__name__}")
    return tokenizer


def refuse_unprepared(recipe: Recipe, processor: Any) -> None:
    """Raises RecipeError when the recipe's data has images, and the base nothing that puts them among the tokens; or
    the recipe groups by images, and its data has none."""
    if recipe.data is not None and "modality" in recipe.data.group_by and recipe.data.image is None:
        raise RecipeError(
            "data.group_by: modality tells rows with images from rows without; say in data.image which are"
        )
    if recipe.data is not None and recipe.data.image is not None and not isinstance(processor, ProcessorMixin):
        raise RecipeError(
            f"data.image: {recipe.base.model} has no processor that can be loaded here, which says how many tokens an "
            "image takes (it needs processor_config.json beside the model, and the package pillow)"
        )


def parameter_groups(recipe: Recipe) -> list[ParameterGroup]:
    """Returns the recipe's parameter groups; raises RecipeError for one that cannot be."""
    return groups.declared([group.model_dump() for group in recipe.parameter_groups])


def make_trainer(recipe: Recipe, directory: Path, model: Any, processor: Any) -> tuple[Any, Any]:
    """Returns a trainer for a recipe, and the examples it trains on."""
    assert recipe.data is not None
    arguments = training_arguments(recipe, directory)
    objective = make_objective(recipe, model.get_base_model())
    refuse_unprepared(recipe, processor)
    kind = trainer_class(recipe)
    if kind is ObjectiveSFTTrainer:
        train_texts, eval_texts = read_texts(recipe)
        options: dict[str, Any] = {"train_dataset": train_texts, "eval_dataset": eval_texts}
    else:
        examples, held_out = make_examples(recipe, processor)
        collate = make_collator(recipe, processor)
        options = {"train_dataset": examples, "eval_dataset": held_out, "data_collator": collate}
    refused = foreign.calling(f"{kind.__name__} does not take the training section", RecipeError)
    with refused, trust.never_asking():  # TRL reads a tokenizer that the section may name
        trainer = kind(
            model=model,
            args=arguments,
            processing_class=processor if recipe.data.image is not None else _tokenizer(processor),
            objective=objective,
            parameter_groups=parameter_groups(recipe),
            group_by=recipe.data.group_by,
            **options,
        )
    if recipe.data.image is not None and [term.loss for term in recipe.objective] == ["model"]:
        _refuse_idle_rows(trainer)
    return trainer, trainer.train_dataset


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


def ragged(examples: Any, batch_size: int) -> list[dict[str, Any]]:
    """Takes a few examples and cuts them to different lengths, so that micro-batches are ragged.

    All together have no more tokens than `batch_size` examples: what trains in memory is checked in it. If some have
    images, the first half has; of those nothing is cut before a token that follows the images.
    """
    kinds = batching.modalities(examples)
    rows = sorted(_alternating(kinds)[:PROBES], key=lambda row: not kinds[row])
    whole = [examples[row] for row in rows]
    bound = max(len(row["input_ids"]) for row in whole) * batch_size // PROBES
    probes: list[dict[str, Any]] = []
    for place, row in enumerate(whole):
        ids, labels = list(row["input_ids"]), list(row["labels"] if "labels" in row else row["input_ids"])
        length = max(4, min(len(ids), bound) * (place + 2) // (PROBES + 2))
        others = {name: row[name] for name in (data.IMAGES,) if row.get(name)}
        if others:
            length = max(length, 2 + max(i for i, label in enumerate(labels) if label == -100))
        probes.append({"input_ids": ids[:length], "labels": labels[:length], **others})
    return probes


def _alternating(modalities: Sequence[Any]) -> list[int]:
    """Returns the numbers of rows, one of each modality in turn as long as there are."""
    turns: dict[Any, int] = {}
    places = []
    for row, modality in enumerate(modalities):
        turns[modality] = turns.get(modality, -1) + 1
        places.append((turns[modality], row))
    return [row for _, row in sorted(places)]


def skeleton(reference: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns a model on the meta device: of a base, or of an artifact (whose digests and code are then judged)."""
    name = bases.directory(reference) or reference
    return loading.load_base(str(name), device="meta", trust_remote_code=trust_remote_code).model
