"""Objectives on models whose labels stand where they are predicted: encoder-decoders and masked models."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pico
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective, Term
from training import arguments, in_order

IDS = {"vocab_size": 128, "pad_token_id": 1, "eos_token_id": 0, "decoder_start_token_id": 1}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


def t5(**more: Any) -> Any:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**IDS, **sizes, **more))


def bart(**more: Any) -> Any:
    settings = {**IDS, **WIDTHS, **HEADS, "dropout": 0.0, "bos_token_id": 2, **more}
    return BartForConditionalGeneration(BartConfig(**settings))


def whisper(**more: Any) -> Any:
    sizes = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "bos_token_id": 2}
    return WhisperForConditionalGeneration(WhisperConfig(**IDS, **WIDTHS, **HEADS, **sizes, dropout=0.0, **more))


def bert(**more: Any) -> Any:
    return pico.make(
        "BertForMaskedLM",
        **{
            **pico.SIZES,
            "intermediate_size": 48,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            **more,
        },
    )


FAMILIES = {"T5": t5, "BART": bart, "Whisper": whisper, "BERT": bert}


def family(name: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    return FAMILIES[name](**more).train()


def batch(name: str) -> dict[str, torch.Tensor]:
    labels = torch.tensor([[9, 10, 11, 12, 0], [13, 14, 0, -100, -100]])
    if name == "Whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)), "labels": labels}
    ids = pico.tokens(2, 5 if name == "BERT" else 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A user's own loss, which does not shift."""
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum", label_smoothing=0.1
    )


smoothed.reduction = "token_sum"  # type: ignore[attr-defined]


def value(model: Any, term: Term, given: Mapping[str, Any], reference: Any = None) -> torch.Tensor:
    engine = ObjectiveEngine(Objective([term], reference=reference), model)
    try:
        return engine.loss(given)
    finally:
        engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_term_of_the_users_needs_no_term_model(name: str) -> None:
    model, given = family(name), batch(name)
    logits = model(**given).logits
    wanted = smoothed(logits, given["labels"]) / (given["labels"] != -100).sum()
    found = value(model, Term(smoothed), given)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_terms_that_shift_say_what_the_models_own_loss_says(name: str) -> None:
    model, given = family(name), batch(name)
    wanted = model(**given).loss
    torch.testing.assert_close(value(model, Term(losses.next_token), given), wanted)
    where = given["labels"] != -100
    log_p = torch.log_softmax(model(**given).logits[where], -1)
    entropy = (log_p.exp() * log_p).sum() / where.sum()
    torch.testing.assert_close(value(model, Term(losses.output_entropy), given), entropy)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("loss", [losses.forward_kl, losses.chunked_distillation])
def test_a_teacher_reads_the_same(name: str, loss: Any) -> None:
    model, teacher, given = family(name), family(name, seed=1), batch(name)
    where = given["labels"] != -100
    teacher.eval()
    log_p, log_q = (torch.log_softmax(m(**given).logits[where], -1) for m in (teacher, model))
    wanted = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / where.sum()
    torch.testing.assert_close(value(model, Term(loss), given, teacher), wanted.detach().requires_grad_())


class DecoderNorm:
    """Looks into the decoder, and into the hidden states that it returns."""

    captures: ClassVar[dict[str, Capture]] = {"inside": Capture(modules="**.decoder.*.0", element=0)}

    def __call__(self, inside: Mapping[str, torch.Tensor], hidden_states: torch.Tensor) -> torch.Tensor:
        (seen,) = inside.values()
        assert seen.shape == hidden_states.shape
        return seen.square().mean() + hidden_states.square().mean()


@pytest.mark.parametrize("name", ["T5", "BART", "Whisper"])
def test_captures_and_hidden_states_are_the_decoders(name: str) -> None:
    model, given = family(name), batch(name)
    assert bool(value(model, Term(DecoderNorm), given) > 0)


@pytest.mark.parametrize("name", ["T5", "BART", "Whisper"])
def test_the_trainer_takes_them_too_and_any_split_gives_the_same(name: str, tmp_path: Path) -> None:
    given = batch(name)
    rows = [{key: tensor[place] for key, tensor in given.items()} for place in range(2)]
    found = []
    for size, steps in ((2, 1), (1, 2)):
        model = family(name)
        trainer = solidify.ObjectiveTrainer(
            model=model,
            args=arguments(tmp_path, size, steps, max_grad_norm=0.0, learning_rate=0.0),
            train_dataset=rows,
            data_collator=lambda listed: {key: torch.stack([row[key] for row in listed]) for key in listed[0]},
            objective=Objective([Term(smoothed), Term(losses.next_token)]),
        )
        in_order(trainer)
        trainer.train()
        found.append(trainer.history[0])
    assert found[0]["term/smoothed"] == pytest.approx(found[1]["term/smoothed"], rel=1e-5)
    assert found[0]["term/NextToken"] == pytest.approx(family(name)(**given).loss.item(), rel=1e-5)


def test_decoder_inputs_that_are_given_stay() -> None:
    model, given = family("T5"), batch("T5")
    given["decoder_input_ids"] = torch.full_like(given["labels"], 7)
    wanted = smoothed(model(**given).logits, given["labels"]) / (given["labels"] != -100).sum()
    torch.testing.assert_close(value(model, Term(smoothed), given), wanted)


def test_columns_of_a_teacher_are_a_decoders_alone() -> None:
    with pytest.raises(ObjectiveError, match="CachedKL needs a decoder-only model"):
        ObjectiveEngine(Objective([Term(losses.cached_kl)]), family("T5"))
    ObjectiveEngine(Objective([Term(losses.cached_kl)]), pico.llama()).close()


def test_one_label_a_row_is_refused_by_a_term_on_tokens() -> None:
    model = pico.make("BertForSequenceClassification", **pico.SIZES, intermediate_size=48)
    given = {"input_ids": pico.tokens(2, 5), "labels": torch.tensor([0, 1])}
    with pytest.raises(ObjectiveError, match=r"needs a label for each of them, but labels are \[3\]|\[2\]"):
        value(model, Term(losses.output_entropy), given)


def test_without_labels_the_model_is_left_as_it_was() -> None:
    model = copy.deepcopy(pico.llama())
    given = {"input_ids": pico.tokens(2, 5)}

    def norm(hidden_states: torch.Tensor) -> torch.Tensor:
        """No labels are needed for it."""
        return hidden_states.square().mean()

    assert bool(value(model, Term(norm), given) > 0)
