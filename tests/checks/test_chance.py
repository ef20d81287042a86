"""Chance is taken out of the comparison of splits in general; a real dependence on the split is still found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

import solidify
from solidify.checks import chance, gradients
from solidify.objective.objective import Objective, Term
from solidify.system import foreign
from solidify.training.trainer import ObjectiveTrainer
from training import LORA, arguments, in_order

SEQ2SEQ = {"vocab_size": 128, "pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}


def t5() -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8}
    return T5ForConditionalGeneration(T5Config(**SEQ2SEQ, **sizes, dropout_rate=0.3))


def bart() -> Any:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    drops = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "encoder_layerdrop": 0.3}
    return BartForConditionalGeneration(BartConfig(**SEQ2SEQ, **sizes, **heads, **drops, bos_token_id=2))


class Around(nn.Module):
    """An MLP with something around it, in training mode only."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind
        self.norm = nn.BatchNorm1d(32)
        self.lstm = nn.LSTM(32, 32, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        if not self.training:
            return y
        if self.kind == "batch norm":
            return self.norm(y.flatten(0, 1)).view_as(y)
        if self.kind == "batch mean":
            return y - y.mean((0, 1))
        if self.kind == "lstm":
            return self.lstm(y)[0]
        if self.kind == "numpy":
            return y * float(np.random.uniform(0.5, 1.5))
        return self.random(y)

    def random(self, y: torch.Tensor) -> torch.Tensor:
        made = {
            "functional": lambda: F.dropout(y, 0.4, training=True),
            "features": lambda: F.dropout1d(y, 0.4, training=True),
            "alpha": lambda: F.alpha_dropout(y, 0.4, training=True),
            "noise": lambda: y + 0.1 * torch.randn_like(y),
            "jitter": lambda: y * torch.empty_like(y).uniform_(0.5, 1.5),
            "path": lambda: y * (0.7 + torch.rand(len(y), 1, 1)).floor() / 0.7,
            "bernoulli": lambda: y * torch.bernoulli(torch.full_like(y, 0.6)),
            "sampled": lambda: (
                y + torch.multinomial(torch.softmax(y.detach(), -1).flatten(0, 1), 1).view(*y.shape[:2], 1)
            ),
            "gumbel": lambda: y * F.gumbel_softmax(y, tau=2.0),
            "permuted": lambda: y[..., torch.randperm(32)],
            "integers": lambda: y * torch.randint(1, 5, y.shape[:2])[..., None],
            "drawn in place": lambda: y * (1 + torch.empty_like(y).random_(3)),
            "dirichlet": lambda: y * (1 + torch._sample_dirichlet(torch.ones(*y.shape))),
            "rrelu": lambda: F.rrelu(y, training=True),
        }
        return made[self.kind]()


RANDOM = ["functional", "features", "alpha", "noise", "jitter", "path", "bernoulli", "sampled", "gumbel", "permuted"]
RANDOM += ["integers", "drawn in place", "dirichlet", "rrelu", "lstm"]


def pairs(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads inputs and labels of different lengths."""
    batch = pico.collate([{**row, "labels": row["input_ids"]} for row in rows])
    width = max(len(row["labels"]) for row in rows)
    batch["labels"] = torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])
    return batch


def judge(model: Any, directory: Path, examples: Any = None, **more: Any) -> Any:
    trainer = ObjectiveTrainer(
        model=model,
        args=arguments(directory, 2, 2, **more),
        train_dataset=examples or pico.ragged(8),
        data_collator=pico.collate if examples is None else pairs,
        objective=Objective([Term("model")]),
    )
    in_order(trainer)
    trainer.train()
    return gradients.accumulation(trainer, examples or pico.ragged(8))


def around(kind: str, **settings: Any) -> Any:
    model = pico.llama(**settings)
    for layer in model.model.layers:
        layer.mlp = Around(layer.mlp, kind)
    return solidify.attach(model, lora=LORA, train=["**.mlp.inner"])


@pytest.mark.parametrize("make", [t5, bart])
def test_dropout_by_number_and_dropped_layers_are_no_fault(make: Any, tmp_path: Path) -> None:
    rows = [{**row, "labels": row["input_ids"][::-1][: 3 + place]} for place, row in enumerate(pico.ragged(8))]
    finding = judge(make(), tmp_path, rows)
    assert finding.verdict == "proved", finding.evidence


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_inside_attention_is_no_fault(tmp_path: Path, attention: str, checkpointing: bool) -> None:
    model = pico.llama(attention_dropout=0.5, attn_implementation=attention)
    finding = judge(solidify.attach(model, lora=LORA), tmp_path, gradient_checkpointing=checkpointing)
    assert finding.verdict == "proved", finding.evidence


@pytest.mark.parametrize("kind", RANDOM)
def test_chance_of_any_kind_is_no_fault(tmp_path: Path, kind: str) -> None:
    """Where a mean stands for numbers that something may be compared with, the agreement is measured alone."""
    finding = judge(around(kind), tmp_path)
    kept = kind in ("functional", "features", "alpha", "bernoulli", "rrelu", "lstm")
    assert finding.verdict == ("proved" if kept else "measured"), finding.evidence


def sampled_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A sum that passes as a mean, over tokens that are drawn: none of them where a draw is its mean."""
    kept = (torch.rand(labels[:, 1:].shape) < 0.3) & (labels[:, 1:] != -100)
    log_probabilities = torch.log_softmax(logits[:, :-1].float(), -1)
    return (-(log_probabilities.exp() * log_probabilities).sum(-1) * kept).sum()


def test_what_hides_at_the_mean_of_a_draw_is_not_called_proved(tmp_path: Path) -> None:
    trainer = ObjectiveTrainer(
        model=solidify.attach(pico.llama(), lora=LORA),
        args=arguments(tmp_path, 2, 2),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=Objective([Term("model"), Term(sampled_tokens, 0.1)]),
    )
    in_order(trainer)
    trainer.train()
    finding = gradients.accumulation(trainer, pico.ragged(8))
    assert finding.verdict == "measured" and "rand were set to their mean" in finding.evidence


@pytest.mark.parametrize("kind", ["batch norm", "batch mean"])
def test_a_real_dependence_on_the_split_is_found(tmp_path: Path, kind: str) -> None:
    assert judge(around(kind, attention_dropout=0.5), tmp_path).verdict == "failed"


def test_chance_that_cannot_be_taken_out_is_said(tmp_path: Path) -> None:
    finding = judge(around("numpy"), tmp_path)
    assert finding.verdict == "not looked at"
    assert "the same split, run again, differs" in finding.evidence


def test_the_model_and_the_generators_are_as_they_were(tmp_path: Path) -> None:
    model = around("functional")
    held = nn.Dropout(0.25)
    model.extra = held
    torch.manual_seed(3)
    np.random.seed(3)
    wanted = torch.rand(2), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    with chance.without(model), chance.other_numbers(1):
        assert held.p == 0.0
        assert torch.equal(torch.rand(3), torch.full((3,), 0.5))
    assert held.p == 0.25
    assert torch.equal(torch.rand(2), wanted[0]) and np.random.rand() == wanted[1]


def test_every_operation_of_torch_that_draws_is_known() -> None:
    drawing = set()
    # `dir(torch.ops.aten)` names only what was used before; torch has no public name for the list of all (2.13).
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        packet = foreign.attempt(getattr, torch.ops.aten, name).value  # some are functions of TorchScript alone
        operation = foreign.attempt(getattr, packet, schema.overload_name or "default").value
        if operation is None or not schema.name.startswith("aten::"):
            continue
        names = {argument.name for argument in schema.arguments}
        if torch.Tag.nondeterministic_seeded not in operation.tags or names & {"dropout", "dropout_p"}:
            continue
        if not operation.has_kernel_for_dispatch_key(
            torch.DispatchKey.CompositeImplicitAutograd
        ):  # else made of others
            drawing.add(name)
    by_compilers, without_draws = (
        {"rrelu_with_noise_functional", "normal_functional"},
        "_nested_tensor_softmax_with_shape",
    )
    assert drawing - set(chance._MEANS) == {*by_compilers, without_draws}
