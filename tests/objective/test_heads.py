"""Heads of other kinds: classes, values, masked words, images, an encoder-decoder. One gradient for any split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import nn

from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective
from solidify.objective.term import Term
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, distance, in_order

BERT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "classes": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "values": ("BertForSequenceClassification", {**BERT, "num_labels": 1}),
    "classes of tokens": ("BertForTokenClassification", {**BERT, "num_labels": 3}),
    "masked words": ("BertForMaskedLM", BERT),
    "an encoder-decoder": ("T5ForConditionalGeneration", {**T5, "decoder_start_token_id": 0}),
    "images": (
        "ViTForImageClassification",
        {**{k: v for k, v in BERT.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8, "num_labels": 3},
    ),
}


def rows(head: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    def partly(labels: torch.Tensor) -> torch.Tensor:
        return labels.where(torch.rand(labels.shape, generator=generator) < 0.5, -100)

    labels = {
        "classes": integers(3, 8),
        "values": torch.randn(8, generator=generator),
        "classes of tokens": partly(integers(3, 8, 10)),
        "masked words": partly(integers(100, 8, 10)),
        "an encoder-decoder": partly(integers(100, 8, 6)),
        "images": integers(3, 8),
    }[head]
    if head == "images":
        batch = {"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)}
    else:
        batch = {"input_ids": integers(100, 8, 10, low=3), "attention_mask": torch.ones(8, 10, dtype=torch.long)}
    return [{key: value[row] for key, value in {**batch, "labels": labels}.items()} for row in range(8)]


def collate(some: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in some]) for key in some[0]}


def doubt(logits: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(logits.float().sigmoid()).mean()


doubt.reduction = "sequence_mean"  # type: ignore[attr-defined]


def penalty(model: nn.Module) -> torch.Tensor:
    return torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum()


def objective() -> Objective:
    return Objective([Term("model"), Term(penalty, 0.01), Term(doubt, 0.3)])


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_is_that_of_one_batch(head: str, tmp_path: Path) -> None:
    name, settings = HEADS[head]
    model = pico.make(name, **settings).train()
    output = model(**collate(rows(head)))
    (output.loss + 0.01 * penalty(model) + 0.3 * doubt(output.logits)).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = pico.make(name, **settings)
    trainer: Any = ObjectiveTrainer(
        model=model,
        args=arguments(tmp_path, 1, 8),
        train_dataset=rows(head),
        data_collator=collate,
        objective=objective(),
    )
    in_order(trainer)
    watch = Gradients(model)
    trainer.add_callback(watch)
    trainer.train()
    assert distance(expected, watch.found) < 2e-6

    model = pico.make(name, **settings).train()
    engine = ObjectiveEngine(objective(), model, steps=1)
    window = [collate(rows(head)[start : start + 2]) for start in range(0, 8, 2)]
    engine.begin(window)
    for batch in window:
        engine.loss(batch).backward()
    assert distance(expected, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}) < 2e-6
