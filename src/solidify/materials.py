"""From the words of a recipe to the things that the stages take: models, edits, terms, examples, a trainer."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import SFTConfig

from solidify import processes, references
from solidify.artifact import loading, manifest
from solidify.artifact.conversion import Scratch
from solidify.artifact.loading import BaseModel
from solidify.builtin import corpus, tiny_olmoe
from solidify.errors import RecipeError, refuse
from solidify.model import depth, heads, ledger, surgery
from solidify.model.surgery import Edit
from solidify.objective.objective import Objective, Term
from solidify.recipe import Add, Insert, Recipe, Remove
from solidify.tuning import data
from solidify.tuning.trainer import ObjectiveSFTTrainer, ObjectiveTrainer

PROBES = 8  # sequences on which the independence of accumulation is shown


def load_base(recipe: Recipe, device: str = "cpu", scratch: Path | None = None) -> BaseModel:
    """Loads the model that a recipe starts from: built in, local or from the hub.

    In `scratch`, a large one is converted to the layout in memory; what the surgery renames or drops is kept apart.
    """
    name = recipe.base.model
    if name == tiny_olmoe.NAME:
        loaded = loading.load_base(str(tiny_olmoe.directory()), dtype=recipe.base.dtype, device=device)
        return BaseModel(loaded.model, loaded.tokenizer, {**loaded.origin, "model": name})
    if name.startswith("builtin:"):
        raise RecipeError(f"base.model: there is no {name!r}; built in: {tiny_olmoe.NAME}")
    beside = recipe.directory / name
    return loading.load_base(
        str(beside) if beside.is_dir() else name,
        revision=recipe.base.revision,
        dtype=recipe.base.dtype,
        device=device,
        trust_remote_code=recipe.base.trust_remote_code,
        scratch=Scratch(scratch, lambda model: _not_kept(recipe, model)) if scratch is not None else None,
    )


def _not_kept(recipe: Recipe, model: PreTrainedModel) -> list[str]:
    """Names the tensors of a model (on the meta device) that the surgery renames or drops."""
    names = list(model.state_dict())
    origins, _ = ledger.origins(names, [edit.document() for edit in operate(recipe, model)])
    return [name for name in names if origins.get(name) != name]


def operate(recipe: Recipe, model: PreTrainedModel) -> list[Edit]:
    """Applies the surgery of a recipe to a model, one edit after the other."""
    return [edit for step in recipe.surgery for edit in _step(recipe, step, model)]


def _step(recipe: Recipe, step: Any, model: PreTrainedModel) -> list[Edit]:
    if isinstance(step, Insert):
        return depth.insert(model, step.insert, zero=step.zero, expect=step.expect, count=step.count)
    if isinstance(step, Remove):
        return depth.remove(model, step.remove, expect=step.expect, count=step.count)
    module = references.resolve(step.module, recipe.directory)
    if not (isinstance(module, type) and issubclass(module, torch.nn.Module)):
        raise RecipeError(f"surgery: {step.module} is not a class of torch.nn.Module")
    weights = recipe.directory / step.weights if step.weights else None
    if isinstance(step, Add):
        return heads.add(model, step.add, module, reads=step.reads, arguments=step.arguments, weights=weights)
    put = surgery.share if step.shared else surgery.replace
    return put(
        model,
        step.replace,
        module,
        arguments=step.arguments,
        expect=step.expect,
        count=step.count,
        weights=weights,
    )


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
        **recipe.training,
    }
    kind = TrainingArguments
    if trainer_class(recipe) is ObjectiveSFTTrainer:
        kind = SFTConfig
        # TRL would add its own load balance to the loss of every MoE model; here the objective says what is in it.
        defaults = {
            "router_aux_loss_coef": 0.0,
            "max_length": recipe.data.max_length,
            "dataset_text_field": recipe.data.text,
        }
        values = {**defaults, **values}
    try:
        return kind(**values)
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"the training section does not fit: {error}") from error


def join(recipe: Recipe, directory: Path) -> None:
    """Meets the other processes that were started with this one, over the backend that training will use.

    Raises:
        RecipeError: the recipe shards in a way that would not happen, or that nothing here could gather again.
    """
    if recipe.adapter is not None:
        arguments = training_arguments(recipe, directory)
        refuse(RecipeError, "the training cannot be spread like that", _unspreadable(arguments))
    processes.join()


def _unspreadable(arguments: TrainingArguments) -> list[str]:
    faults = []
    state = arguments.distributed_state
    if arguments.fsdp and (state is None or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)):
        faults.append(
            "training.fsdp: accelerate shards over accelerators that torchrun or `accelerate launch` gave a process "
            "each; here every process would silently hold the whole model"
        )
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
        terms.append(Term(loss, entry.weight, name=name, arguments=entry.arguments))
    Objective(terms)
    return terms


def make_objective(recipe: Recipe, model: PreTrainedModel) -> Objective:
    """Binds the terms of a recipe to a model."""
    terms = make_terms(recipe)
    objective = Objective(terms)
    if objective.asks_for("reference_logits") and not _switching_off_is_exact(recipe, model):
        return Objective(terms, reference=load_base(recipe).model.requires_grad_(False))
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
            read.append(data.read(recipe.directory / name, recipe.data.text))
    return read[0], read[1]


def make_examples(recipe: Recipe, tokenizer: Any) -> tuple[Any, Any]:
    """Returns training and evaluation examples, tokenized (None without the latter)."""
    assert recipe.data is not None
    options: dict[str, Any] = {"text": recipe.data.text, "max_length": recipe.data.max_length}
    train_texts, eval_texts = read_texts(recipe)
    tokenized = data.tokenize(train_texts, tokenizer, **options)
    return tokenized, data.tokenize(eval_texts, tokenizer, **options) if eval_texts is not None else None


def make_trainer(recipe: Recipe, directory: Path, model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Returns a trainer for a recipe, and the examples it trains on."""
    arguments = training_arguments(recipe, directory)
    objective = make_objective(recipe, model.get_base_model())
    examples, held_out = make_examples(recipe, tokenizer)
    options: dict[str, Any] = {
        "train_dataset": examples,
        "eval_dataset": held_out,
        "data_collator": data.collator(tokenizer),
    }
    kind = trainer_class(recipe)
    if kind is ObjectiveSFTTrainer:
        train_texts, eval_texts = read_texts(recipe)
        options = {"train_dataset": train_texts, "eval_dataset": eval_texts}
    trainer = kind(model=model, args=arguments, processing_class=tokenizer, objective=objective, **options)
    return trainer, trainer.train_dataset


def ragged(examples: Any, batch_size: int) -> list[dict[str, Any]]:
    """Takes a few examples and cuts them to different lengths, so that micro-batches are ragged.

    All together have no more tokens than `batch_size` examples: what trains in memory is checked in it.
    """
    probes: list[dict[str, Any]] = []
    for place in range(min(PROBES, len(examples))):
        row = examples[place]
        longest = min(len(row["input_ids"]), max(map(len, examples[:PROBES]["input_ids"])) * batch_size // PROBES)
        length = max(4, longest * (place + 2) // (PROBES + 2))
        ids = list(row["input_ids"][:length])
        labels = list(row["labels"][:length]) if "labels" in row else list(ids)
        probes.append({"input_ids": ids, "labels": labels})
    return probes


def skeleton(reference: str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Returns a model on the meta device: of a base, or of an artifact (whose digests and code are then judged)."""
    name = str(tiny_olmoe.directory()) if reference == tiny_olmoe.NAME else reference
    return loading.load_base(name, device="meta", trust_remote_code=trust_remote_code).model
