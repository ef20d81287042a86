"""The figures of held-out examples, from the labels themselves."""

from __future__ import annotations

import datasets
import pico
import pytest
import torch
from torch.nn import functional
from words import tokenizer

from solidify.errors import DataError
from solidify.training import data, examples
from solidify.training.examples import Reading

SIZES = {**pico.SIZES, "intermediate_size": 48, "pad_token_id": 0}
TOKENS = [[4, 9, 10, 5], [4, 11, 12, 5], [4, 13, 14, 5], [4, 15, 16, 5], [4, 17, 18, 5]]


def collate(rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def rows_with(labels: list[object]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": TOKENS[: len(labels)], "labels": labels})


def test_lists_of_numbers_have_a_loss_and_no_accuracy() -> None:
    """The configuration says nothing of the problem, as that of a base that was never trained."""
    labels = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    model = pico.make("BertForSequenceClassification", **SIZES, num_labels=3)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits
    for _ in range(2):  # the first pass has the loss write the problem into the configuration
        found = data.measure(model, rows_with(list(labels)), collate, batch_size=2)
        expected = functional.binary_cross_entropy_with_logits(logits.double(), torch.tensor(labels).double())
        assert found == {"loss": pytest.approx(expected.item(), rel=1e-5)}


def test_a_number_that_looks_like_a_mask_is_a_number() -> None:
    """-100 leaves out a class or a token; of numbers transformers leaves out none."""
    labels = [-100.0, 3.0, -100.0, -1.0, 2.0]
    model = pico.make("BertForSequenceClassification", **SIZES, num_labels=1)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits[:, 0]
    found = data.measure(model, rows_with(list(labels)), collate, batch_size=2)
    expected = functional.mse_loss(logits.double(), torch.tensor(labels).double())
    assert found == {"loss": pytest.approx(expected.item(), rel=1e-5)}


def test_labels_that_are_left_out_count_in_neither_figure() -> None:
    labels = [-100, -100, 2, 0, -100]  # the first batch has none that counts
    model = pico.make("BertForSequenceClassification", **SIZES, num_labels=3)
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits
    found = data.measure(model, rows_with(list(labels)), collate, batch_size=2)
    expected = functional.cross_entropy(logits.double(), torch.tensor(labels))
    right = int((logits.argmax(-1) == torch.tensor(labels)).sum())
    assert found == {"loss": pytest.approx(expected.item(), rel=1e-5), "accuracy": right / 2}


def test_labels_of_which_none_counts_are_refused_in_one_sentence() -> None:
    for head, labels in (("BertForSequenceClassification", [-100, -100]), ("BertForTokenClassification", [[-100] * 4])):
        model = pico.make(head, **SIZES, num_labels=3)
        with pytest.raises(DataError, match=r"no label of the \d examples counts .all are -100., so there is no loss"):
            data.measure(model, rows_with(list(labels)), collate)


def test_held_out_text_of_which_no_token_is_hidden_is_refused_before_training() -> None:
    maker = tokenizer(wrapped=True)
    how = Reading("masked", 16, maker, accepts=("input_ids", "attention_mask"), mask_probability=0.01, seed=3)
    made, _ = examples.make(datasets.Dataset.from_dict({"text": ["a b", "c d"]}), how)
    with pytest.raises(DataError, match=r"none of the 4 tokens is hidden at mask_probability 0\.01"):
        examples.hide(made, examples.collator(how))
