"""Which rows come together: batches of one modality and of similar lengths, the same on every process.

What one optimizer step sees has one modality wherever the numbers of rows allow it (what is left over of each comes
last), as LLaVA-1.5 is trained (its `group_by_modality_length`, https://github.com/haotian-liu/LLaVA; arXiv 2310.03744).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from solidify.errors import DataError, refuse
from solidify.upstream.accelerate import DataLoaderShard
from solidify.upstream.transformers_training import get_length_grouped_indices, has_length
from solidify.upstream.trl import RepeatSampler

GROUPS = ("modality", "length")
# Columns that hold something other than text; a row's modality is which of them it fills.
_MEDIA = ("images", "image", "pixel_values", "videos", "pixel_values_videos", "audio", "input_features", "input_values")


class GroupedSampler(Sampler[int]):
    """Yields every row once, `step` rows after `step` rows of one modality, of similar lengths when they are given.

    The order depends on `seed` and the epoch alone. What is left over of each modality, less than a step, comes last,
    one modality after the other. With lengths, the longest row comes first, so that memory that does not suffice is
    found out at once.
    """

    def __init__(self, modalities: Sequence[Hashable], lengths: Sequence[int] | None, *, step: int, seed: int) -> None:
        self.lengths = list(lengths) if lengths is not None else None
        self.step, self.seed, self.epoch = step, seed, 0
        self._rows: dict[Hashable, list[int]] = {}
        for row, modality in enumerate(modalities):
            self._rows.setdefault(modality, []).append(row)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        steps: list[list[int]] = []
        left: list[list[int]] = []
        for rows in self._rows.values():
            order = self._order_rows(rows, generator)
            whole = len(order) - len(order) % self.step
            steps += [order[start : start + self.step] for start in range(0, whole, self.step)]
            left.append(order[whole:])
        steps = [steps[index] for index in torch.randperm(len(steps), generator=generator)]
        if self.lengths is not None and steps:
            longest = [max(self.lengths[row] for row in rows) for rows in steps]
            steps.insert(0, steps.pop(longest.index(max(longest))))
        return iter([row for rows in steps + left for row in rows])

    def _order_rows(self, rows: list[int], generator: torch.Generator) -> list[int]:
        if self.lengths is None:
            return [rows[index] for index in torch.randperm(len(rows), generator=generator)]
        lengths = [self.lengths[row] for row in rows]
        return [rows[index] for index in get_length_grouped_indices(lengths, self.step, generator=generator)]


class ReplayedSampler(Sampler[int]):
    """Yields what a `RepeatSampler` of TRL yields, in the order of any epoch.

    TRL's takes each epoch's order from a generator that starts anew in every process: a training that goes on in a
    later epoch would read the first one's order again (TRL 1.16, `trl/trainer/utils.py`).
    """

    def __init__(self, sampler: RepeatSampler) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Draws the orders of all epochs before this one."""
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)


def modalities(rows: Any) -> list[tuple[str, ...]]:
    """Returns of every row which columns with something other than text it fills; none means text alone."""
    if isinstance(rows, datasets.Dataset):
        columns = [[(name, _is_filled(value)) for value in rows[name]] for name in _MEDIA if name in rows.column_names]
        return [tuple(name for name, filled in row if filled) for row in zip(*columns, strict=True)] or [()] * len(rows)
    return [tuple(name for name in _MEDIA if _is_filled(rows[index].get(name))) for index in range(len(rows))]


def _is_filled(value: Any) -> bool:
    return value is not None and (not isinstance(value, (str, list, tuple)) or len(value) > 0)


def lengths(rows: Any, column: str = "length") -> list[int]:
    """Returns the number of tokens of every row: its `column`, or else what its `input_ids` hold.

    Raises:
        DataError: the rows have neither.
    """
    first = rows[0]
    if column in first:
        return [int(rows[index][column]) for index in range(len(rows))]
    if "input_ids" not in first:
        raise DataError(f"rows are to be grouped by length, but have neither input_ids nor a column {column!r}")
    ids = rows["input_ids"] if isinstance(rows, datasets.Dataset) else (row["input_ids"] for row in rows)
    return [len(row) for row in ids]


def refuse_mixed(rows: Any) -> None:
    """Raises DataError for rows of several modalities, which processes that share one model's weights cannot take."""
    if len(set(modalities(rows))) > 1:
        raise DataError(
            "fsdp gathers the weights of the vision tower when a batch has images, and a process whose batch has none "
            "would not take part; train on rows with images and on rows without in runs of their own"
        )


def refuse_ungroupable(trainer: Any, group_by: Sequence[str]) -> None:
    """Raises DataError for rows that a trainer cannot group as `group_by` says (`modality`, `length` or both).

    There is no such group, the trainer has an order of its own, the rows cannot be counted, have no length or no column
    for anything other than text, `train_sampling_strategy` says otherwise, or weights are sharded (FSDP) and some rows
    alone have images.
    """
    rows = trainer.train_dataset
    if rows is None:
        return
    if group_by:
        refuse(DataError, "the rows cannot be grouped", _find_faults(trainer, rows, group_by))
    if "length" in group_by:
        trainer.runner.lengths([rows[0]])
    if trainer.args.fsdp and has_length(rows):
        refuse_mixed(rows)


def _find_faults(trainer: Any, rows: Any, group_by: Sequence[str]) -> list[str]:
    strategy = trainer.args.train_sampling_strategy
    faults = [f"{name!r} is unknown; known: {', '.join(GROUPS)}" for name in group_by if name not in GROUPS]
    if trainer.runner.ungrouped:
        return [*faults, f"{trainer.runner.ungrouped}; leave out group_by"]
    if strategy != "random":
        faults.append(f"train_sampling_strategy={strategy!r} says otherwise; leave one out")
    if not has_length(rows):
        faults.append("they come one by one")
    elif "modality" in group_by and not any(name in rows[0] for name in _MEDIA):
        faults.append(f"they have no column for anything other than text, which would be {' or '.join(_MEDIA)}")
    return faults


def sampler(trainer: Any, group_by: Sequence[str]) -> GroupedSampler:
    """Returns the sampler that groups a trainer's rows.

    The rows as they were given are looked at: of those that a trainer samples, columns may have been removed.

    Raises:
        DataError: the rows do not say how long they are.
    """
    rows, args = trainer.train_dataset, trainer.args
    return GroupedSampler(
        modalities(rows) if "modality" in group_by else [()] * len(rows),
        trainer.runner.lengths(rows) if "length" in group_by else None,
        step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        seed=args.data_seed if args.data_seed is not None else args.seed,
    )


class AtEpochs(TrainerCallback):  # type: ignore[misc]
    """When several processes go on in the middle of an epoch, accelerate 1.15 wraps the sampler so that no one tells it
    which epoch it is, and all would read the rows in the order of the first one: here the loader is told before."""

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Chooses the order of the epoch."""
        loader = kwargs.get("train_dataloader")
        if isinstance(loader, DataLoaderShard):
            loader.set_epoch(int(state.epoch or 0))
