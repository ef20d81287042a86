"""What a teacher said once, kept in the dataset, teaches as the teacher itself would."""

from __future__ import annotations

from typing import Any

import pico
import pytest
import torch
from datasets import Dataset

from solidify import losses
from solidify.errors import DataError, ObjectiveError

WORDS = pico.SIZES["vocab_size"]


def sharp(seed: int) -> Any:
    """A model with opinions."""
    model = pico.llama(seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def rows() -> Dataset:
    return Dataset.from_list(pico.ragged(5))


def left(batch_of: Any) -> Any:
    """Pads on the left."""

    def collate(some: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = batch_of(some)
        for place, n in enumerate(batch["attention_mask"].sum(1).tolist()):
            for tensor in batch.values():
                tensor[place] = tensor[place].roll(tensor.shape[1] - n)
            batch["labels"][place, -n] = -100  # nothing stands before it that could predict it
        return batch

    return collate


def batch_with(k: int, collate: Any = pico.collate, teacher: Any = None) -> dict[str, torch.Tensor]:
    teacher = teacher or sharp(4)
    columns = losses.teacher_columns(teacher, rows(), collate, k, batch_size=2)
    return losses.with_teacher_columns(collate)([dict(row) for row in columns])


def logits_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("collate", [pico.collate, left(pico.collate)], ids=["right", "left"])
def test_with_all_tokens_kept_it_is_the_exact_divergence(collate: Any) -> None:
    student, teacher = sharp(1), sharp(4)
    batch = batch_with(WORDS, collate, teacher)
    ours = logits_of(student, batch)
    with torch.no_grad():
        theirs = logits_of(teacher, batch)
    exact = losses.forward_kl()(ours, theirs, batch["labels"])
    cached = losses.cached_kl()(ours, batch, batch["labels"])
    assert cached.item() == pytest.approx(exact.item(), rel=1e-5)
    a, b = (torch.autograd.grad(loss, ours, retain_graph=True)[0] for loss in (cached, exact))
    assert torch.allclose(a, b, atol=1e-5)
    assert b.abs().sum() > 1


def test_with_some_kept_it_is_the_divergence_of_the_buckets_and_never_more() -> None:
    student, teacher = sharp(1), sharp(4)
    before = 0.0
    for k in (1, 4, 32, WORDS - 1, WORDS):
        batch = batch_with(k, teacher=teacher)
        assert batch["teacher_ids"].shape == (*batch["input_ids"].shape, k)
        ours = logits_of(student, batch)
        found = losses.cached_kl()(ours, batch, batch["labels"])
        with torch.no_grad():
            p, q = logits_of(teacher, batch).double().softmax(-1), ours.double().softmax(-1)
        expected = 0.0
        for row, place in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            kept = p[row, place].topk(k).indices
            a, b = p[row, place][kept], q[row, place][kept]
            expected += float((a * (a / b).log()).sum())
            rest, other = 1 - float(a.sum()), 1 - float(b.sum())
            expected += rest * torch.tensor(rest / other).log().item() if k < WORDS else 0.0
        assert found.item() == pytest.approx(expected, rel=1e-4)
        assert found.item() >= before * (1 - 1e-6)  # a finer partition says more
        before = found.item()
        (gradient,) = torch.autograd.grad(found, ours)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


def test_the_dataset_and_the_teacher_stay_as_they_were() -> None:
    teacher, data = pico.llama().train(), rows()
    before = data.column_names
    columns = losses.teacher_columns(teacher, data, pico.collate, 3)
    assert teacher.training
    assert data.column_names == before
    assert columns.column_names == [*before, "teacher_ids", "teacher_log_probabilities", "teacher_log_remainder"]
    for row, old in zip(columns, data, strict=True):
        assert row["input_ids"] == old["input_ids"]
        assert len(row["teacher_ids"]) == len(row["teacher_log_remainder"]) == len(old["input_ids"])
        for values, rest in zip(row["teacher_log_probabilities"], row["teacher_log_remainder"], strict=True):
            total = torch.tensor([*values, rest]).double().exp().sum().item()
            assert total == pytest.approx(1.0, abs=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    teacher = pico.llama()
    with pytest.raises(DataError, match="k = 129 is at most"):
        losses.teacher_columns(teacher, rows(), pico.collate, WORDS + 1)
    with pytest.raises(DataError, match="need a batch with an attention_mask"):
        losses.teacher_columns(teacher, rows(), lambda some: {"input_ids": pico.collate(some)["input_ids"]}, 2)
    collate = losses.with_teacher_columns(pico.collate)
    with pytest.raises(DataError, match="teacher_ids"):
        collate(pico.ragged(2))
    cut = [dict(row) for row in losses.teacher_columns(teacher, rows(), pico.collate, 2)]
    cut[1]["input_ids"], cut[1]["labels"] = cut[1]["input_ids"][:-1], cut[1]["labels"][:-1]
    with pytest.raises(DataError, match="row 1 of a batch has"):
        collate(cut)
    batch = batch_with(2)
    logits = logits_of(teacher, batch)
    with pytest.raises(ObjectiveError, match="lacks columns"):
        losses.cached_kl()(logits, {}, batch["labels"])
    with pytest.raises(ObjectiveError, match="the teacher named token"):
        losses.cached_kl()(logits[..., :3], batch, batch["labels"])
