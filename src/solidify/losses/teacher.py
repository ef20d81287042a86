"""Distillation from a teacher that runs once: its largest next-token probabilities become columns of the dataset.

Per position are kept the `k` largest log-probabilities, their token ids, and the logarithm of what is left. The rest of
the vocabulary is then one bucket, for teacher and student alike: by the data-processing inequality the divergence of
the buckets is never larger than the full one, and with k = vocab_size it is the full one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from solidify.errors import DataError, ObjectiveError, refuse
from solidify.losses.precision import wide
from solidify.losses.prediction import targets
from solidify.model import anatomy

if TYPE_CHECKING:
    from datasets import Dataset

IDS, LOG_PROBABILITIES, REMAINDER = "teacher_ids", "teacher_log_probabilities", "teacher_log_remainder"
COLUMNS = (IDS, LOG_PROBABILITIES, REMAINDER)

_NOTHING = -1e4  # the logarithm of no probability at all; finite, and exp(-1e4) is exactly 0
_FILL: Mapping[str, float] = {IDS: 0, LOG_PROBABILITIES: _NOTHING, REMAINDER: _NOTHING}  # says nothing, costs nothing

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def teacher_columns(
    model: nn.Module, dataset: Dataset, collate: Collate, k: int = 64, *, batch_size: int = 8
) -> Dataset:
    """Returns the dataset with what a teacher says at every position of every row; the dataset itself is unchanged.

    Args:
        model: the teacher; it runs in evaluation mode, without gradients, where it stands.
        dataset: tokenised rows, as they will be trained on.
        collate: makes a padded batch with an `attention_mask` of rows; the training's own.
        k: how many probabilities to keep a position; at most the size of the vocabulary.
        batch_size: rows at a time.

    Each new column has one entry per token of the row: `teacher_ids` and `teacher_log_probabilities` k numbers,
    `teacher_log_remainder` one. Probabilities are at temperature 1, computed in float32.

    Raises:
        DataError: a row's tokens and the teacher's positions are not one for one, or k is larger than the vocabulary.
    """
    from datasets import Features, List, Value

    device = next(model.parameters()).device

    def say(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Adds the columns to a batch of rows."""
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = {key: t.to(device) if isinstance(t, torch.Tensor) else t for key, t in collate(rows).items()}
        mask = _read_mask(made)
        logits = model(**{key: value for key, value in made.items() if key != "labels"}).logits
        if logits.shape[:2] != mask.shape or not 0 < k <= logits.shape[-1]:
            raise DataError(
                f"teacher_columns: the teacher returned logits {list(logits.shape)} for tokens {list(mask.shape)}; "
                f"one position a token is needed, and k = {k} is at most the vocabulary"
            )
        found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for row, attended in zip(logits, mask, strict=True):
            log_p = F.log_softmax(wide(row[attended]), dim=-1)
            values, ids = log_p.topk(k, dim=-1)
            found[IDS].append(ids.cpu().numpy())
            found[LOG_PROBABILITIES].append(values.cpu().numpy())
            found[REMAINDER].append(_log_rest(log_p, ids).cpu().numpy())
        return found

    features = Features(
        {**dataset.features, IDS: List(List(Value("int32"))), LOG_PROBABILITIES: List(List(Value("float32")))}
        | {REMAINDER: List(Value("float32"))}
    )
    with torch.no_grad(), anatomy.evaluation(model):
        # The teacher is no part of a fingerprint that datasets could compute; nothing is taken from its cache.
        made = dataset.with_format(None).map(
            say, batched=True, batch_size=batch_size, features=features, load_from_cache_file=False,
            new_fingerprint=f"teacher{id(model):x}{k}", desc="teacher",
        )  # fmt: skip
    result: Dataset = made
    return result


def with_teacher_columns(collate: Collate) -> Collate:
    """Wraps a collator: what it does to rows, and the teacher's columns padded to where the row's tokens stand.

    Padding on either side is read off the `attention_mask`. The batch gains `teacher_ids` and
    `teacher_log_probabilities` (batch_size, sequence_length, k) and `teacher_log_remainder` (batch_size,
    sequence_length). The trainer must keep columns that the model does not know (`remove_unused_columns: false`).

    Raises:
        DataError: rows lack the columns, or hold another number of positions than tokens (it was cut afterwards).
    """

    def wrapped(rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates the rest, and pads the columns to it."""
        missing = [name for name in COLUMNS if any(name not in row for row in rows)]
        refuse(DataError, "the rows lack the teacher's columns; make them with teacher_columns", missing)
        batch = dict(collate([{key: v for key, v in row.items() if key not in COLUMNS} for row in rows]))
        mask = _read_mask(batch)
        for name in COLUMNS:
            values = [torch.as_tensor(row[name]) for row in rows]
            _refuse_other_lengths(values, mask)
            padded = values[0].new_full((*mask.shape, *values[0].shape[1:]), _FILL[name])
            for index, value in enumerate(values):
                padded[index, mask[index]] = value
            batch[name] = padded.long() if name == IDS else padded.float()
        return batch

    return wrapped


class CachedKL:
    """`Σ_{v∈K} p_v log(p_v/q_v) + p_R log(p_R/q_R)` over target tokens: forward KL from a teacher's kept columns.

    K are the teacher's k most likely tokens, R all others as one bucket. Equal to `forward_kl` at temperature 1 for
    k = vocab_size, and never larger. Sum over target tokens (`token_sum`). The columns come from `teacher_columns` and
    `with_teacher_columns`; `columns` names what the term reads of a batch.
    """

    reduction = "token_sum"
    decoders_only = True  # its columns stand beside the tokens that a decoder reads
    columns: ClassVar[tuple[str, ...]] = COLUMNS

    def __call__(self, logits: torch.Tensor, inputs: Mapping[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (batch_size, sequence_length, vocab_size), the batch, and labels.

        Raises:
            ObjectiveError: the batch lacks the columns, or they name tokens that the model does not have.
        """
        refuse(
            ObjectiveError,
            "cached_kl: the batch lacks columns; wrap the collator in with_teacher_columns",
            [name for name in COLUMNS if name not in inputs],
        )
        where = targets(labels, logits.shape[1])
        ids, log_p, rest = (inputs[name][:, :-1][where] for name in COLUMNS)
        if ids.numel() and int(ids.max()) >= logits.shape[-1]:
            raise ObjectiveError(
                f"cached_kl: the teacher named token {int(ids.max())}, but the model's vocabulary has "
                f"{logits.shape[-1]}"
            )
        log_q = F.log_softmax(wide(logits[:, :-1][where]), dim=-1)
        kept = F.kl_div(log_q.gather(-1, ids), log_p, log_target=True, reduction="sum")
        return kept + F.kl_div(_log_rest(log_q, ids), rest, log_target=True, reduction="sum")


def _log_rest(log_p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the logarithm of all probability that is not at `ids` (positions,); -10000 for none."""
    rest = log_p.scatter(-1, ids, torch.finfo(log_p.dtype).min / 2).logsumexp(-1)
    return rest.clamp(min=_NOTHING)


def _read_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        raise DataError("a teacher's columns need a batch with an attention_mask (batch_size, sequence_length)")
    return mask.bool()


def _refuse_other_lengths(values: Sequence[torch.Tensor], mask: torch.Tensor) -> None:
    refuse(
        DataError,
        "the teacher's columns do not match the tokens one for one",
        [
            f"row {index} of a batch has {int(n)} tokens, but {len(value)} positions of the teacher"
            for index, (value, n) in enumerate(zip(values, mask.sum(-1), strict=True))
            if len(value) != int(n)
        ],
    )
