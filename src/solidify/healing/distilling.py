"""`solidify.distill`: the whole changed model learns from its base, token by token.

The second stage of healing. The loss is the divergence of the two next-token distributions, computed in chunks so that
neither model's logits of a whole batch ever exist; the base runs without a graph, its weights mapped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments

from solidify.adapter import lookup
from solidify.artifact import loading
from solidify.errors import HealingError, refuse
from solidify.healing.measuring import make_labels
from solidify.healing.sources import Batch
from solidify.healing.work import batch_faults
from solidify.losses.distillation import ChunkedDistillation
from solidify.model import anatomy
from solidify.objective.objective import Objective
from solidify.objective.term import Term
from solidify.surgery.edit_record import Edit
from solidify.system import disk
from solidify.training.groups import ParameterGroup
from solidify.training.progress import TrainingBar
from solidify.training.trainer import ObjectiveTrainer

DEFAULTS: Mapping[str, Any] = {
    "max_steps": 200,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,  # solidify shows a bar of its own
    "logging_steps": 10,
    "seed": 42,
}


def distill(
    model: PreTrainedModel,
    base: PreTrainedModel | str | Path,
    batches: Sequence[Batch],
    *,
    train: str | Sequence[str | Edit] | None = None,
    parameter_groups: Sequence[ParameterGroup | Mapping[str, Any]] = (),
    terms: Sequence[Term] | None = None,
    **training: Any,
) -> list[dict[str, float]]:
    """Trains a changed model, in place, to say what its base says. Returns what was logged, by step.

    Args:
        model: the changed model; or one that `solidify.attach` put an adapter on, whose parameters are then trained.
        base: the model before the change, or where it stands.
        batches: dictionaries of tensors (batch_size, sequence_length) with `input_ids` and, where rows are padded,
            `attention_mask`; one is a step (or, with `gradient_accumulation_steps`, a part of one).
        train: what learns: patterns of parameters or modules (`**`: everything), or the edits of the surgery, for what
            it made new. Left out only with an adapter, whose parameters are then trained.
        parameter_groups: names with a learning rate, a weight decay or optimizer settings of their own.
        terms: what is minimised; left out, the chunked forward KL from the base.
        training: fields of `TrainingArguments`.

    Raises:
        HealingError: nothing is trained, or a pattern names nothing.
        ObjectiveError: the trainer cannot do as it is told.
    """
    faults = [*batch_faults(batches)] if batches else ["there are no batches to learn from"]
    faults += [] if base is not model else ["the base is the changed model itself; give the model before the change"]
    if getattr(model.config, "is_encoder_decoder", False):
        faults.append("it has an encoder and a decoder; distil it with solidify.ObjectiveTrainer and data of your own")
    refuse(HealingError, "the model cannot be distilled as asked", faults)
    if not isinstance(base, PreTrainedModel):
        base = loading.load_base(str(base)).model
    training_before = model.training
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _choose_trained(model, train)
    chosen = list(terms) if terms is not None else [Term(ChunkedDistillation(), 1.0, name="chunked_distillation")]
    try:
        with disk.temporary() as scratch:
            arguments = TrainingArguments(
                output_dir=str(scratch), use_cpu=not torch.accelerator.is_available(), **{**DEFAULTS, **training}
            )
            trainer = ObjectiveTrainer(
                model=model,
                args=arguments,
                train_dataset=_Batches(batches),
                data_collator=_take_one,
                objective=Objective(chosen, reference=base),
                parameter_groups=parameter_groups,
            )
            trainer.add_callback(TrainingBar())
            trainer.train()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    model.train(training_before)
    return list(trainer.history)


def _choose_trained(model: PreTrainedModel, train: str | Sequence[str | Edit] | None) -> None:
    """Sets what is trained by name; without names the model is left as it is."""
    if train is None:
        if lookup.peft_model(model) is None:
            raise HealingError(
                "say what learns with `train`: patterns ('**' is everything), or the edits; or attach an adapter"
            )
        return
    asked = [train] if isinstance(train, str) else list(train)
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    wanted, faults = set[str](), []
    for each in asked:
        made = [name for name, origin in each.tensors.items() if origin is None] if isinstance(each, Edit) else []
        hits = anatomy.match_within(each, names) if isinstance(each, str) else [name for name in names if name in made]
        wanted.update(hits)
        if not hits:
            faults.append(f"train: {each!r} names nothing that could learn")
    refuse(HealingError, "the model cannot be distilled as asked", faults)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


class _Batches(Dataset[Batch]):
    """Batches that were made, each with its labels."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.batches[index]
        return {**batch, "labels": make_labels(batch)}


def _take_one(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Hands a batch on as it was made.

    Raises:
        HealingError: several were asked for at once.
    """
    if len(rows) != 1:
        raise HealingError("per_device_train_batch_size counts batches that were made, and is 1")
    return rows[0]
