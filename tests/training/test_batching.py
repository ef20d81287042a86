"""Rows of one modality and of similar lengths come together, each once, in the same order on every process."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import llava
import pico
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, RandomSampler
from transformers import Trainer

from solidify.errors import DataError
from solidify.objective.objective import Objective, Term
from solidify.training import batching
from solidify.training.batching import GroupedSampler
from solidify.training.trainer import ObjectiveTrainer
from training import arguments

BOTH = ("modality", "length")


def made_up(count: int = 203, seed: int = 5) -> tuple[list[tuple[str, ...]], list[int]]:
    """Modalities and lengths that are not related."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [("images",) if x < 0.4 else () for x in torch.rand(count, generator=generator)]
    return kinds, torch.randint(3, 300, (count,), generator=generator).tolist()


def rows(count: int = 26) -> list[dict[str, Any]]:
    """Examples that can be told apart, of which some name images."""
    kinds, _ = made_up(count)
    return [
        {**row, "images": ["x.png"] if kind else [], "input_ids": [place + 3, *row["input_ids"][1:]]}
        for place, (row, kind) in enumerate(zip(pico.ragged(count), kinds, strict=True))
    ]


class Seen:
    """Collates, and keeps which rows came together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        self.batches.append([row["input_ids"][0] - 3 for row in batch])
        return pico.collate(batch)


def trainer(directory: Path, group_by: Any, *, examples: Any = None, kind: Any = ObjectiveTrainer, **more: Any) -> Any:
    options: dict[str, Any] = {"objective": Objective([Term("model")])} if issubclass(kind, ObjectiveTrainer) else {}
    options |= {"group_by": group_by} if issubclass(kind, ObjectiveTrainer) else {}
    return kind(
        model=pico.llama(),
        args=arguments(directory, 2, 2, **{"max_steps": -1, "num_train_epochs": 2, **more}),
        train_dataset=examples or rows(),
        data_collator=Seen(),
        **options,
    )


def mixed(batches: list[list[int]], kinds: Any) -> int:
    return sum(len({kinds[row] for row in batch}) > 1 for batch in batches)


def cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """The share of a batch that is padding, over all batches."""
    wide = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / wide


# What goes wrong without.


def test_random_rows_mix_modalities_in_nearly_every_step() -> None:
    kinds, lengths = made_up()
    steps = cut(list(RandomSampler(kinds)), 8)
    assert mixed(steps, kinds) > 0.9 * len(steps)
    assert padding(cut([row for step in steps for row in step], 4), lengths) > 0.3


def test_transformers_looks_for_the_lengths_of_images(tmp_path: Path) -> None:
    """A processor's first input is pixel_values, whose length is no number of tokens."""
    trainer = Trainer(
        pico.llama(),
        arguments(tmp_path, 2, 2, train_sampling_strategy="group_by_length"),
        train_dataset=rows(),
        processing_class=llava.processor(),
    )
    with pytest.raises(ValueError, match="dictionaries with an 'pixel_values' key"):
        trainer._get_train_sampler()


# What holds with.


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("count", [203, 200, 3, 1])
def test_every_row_comes_once_and_no_step_is_mixed_but_where_the_rest_is(count: int, by_length: bool) -> None:
    kinds, lengths = made_up(count)
    sampler = GroupedSampler(kinds, lengths if by_length else None, step=8, seed=3)
    order = list(sampler)
    assert len(sampler) == count
    assert sorted(order) == list(range(count))
    pure = sum(kinds.count(kind) // 8 for kind in set(kinds))
    assert mixed(cut(order, 8)[:pure], kinds) == 0
    assert mixed(cut(order, 8), kinds) <= 1
    assert mixed(cut(order, 2), kinds) <= 1  # of all micro-batches of two rows


def test_rows_of_one_modality_are_grouped_by_length() -> None:
    lengths = made_up(400)[1]
    order = list(GroupedSampler([("images",)] * 400, lengths, step=8, seed=3))
    assert sorted(order) == list(range(400))
    assert padding(cut(order, 4), lengths) < padding(cut(list(range(400)), 4), lengths) / 2


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    kinds, lengths = made_up()
    sampler = GroupedSampler(kinds, lengths, step=8, seed=3)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first == list(GroupedSampler(kinds, lengths, step=8, seed=3))
    assert list(GroupedSampler(kinds, lengths, step=8, seed=4)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_similar_lengths_come_together_and_the_longest_first() -> None:
    kinds, lengths = made_up(2000)
    batches = cut(list(GroupedSampler(kinds, lengths, step=8, seed=3)), 4)
    by_modality = cut(list(GroupedSampler(kinds, None, step=8, seed=3)), 4)
    assert padding(batches, lengths) < 0.12 < 0.3 < padding(by_modality, lengths)
    assert max(lengths) in [lengths[row] for row in batches[0]]
    turns = [kinds[batch[0]] for batch in batches]
    assert sum(one != other for one, other in pairwise(turns)) > 50  # modalities take turns


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows_and_see_the_same_modality_in_every_step(processes: int) -> None:
    """Through accelerate's own shards, as a Trainer's loader deals batches out; two micro-batches to a step."""
    kinds, lengths = made_up(24 * processes * 4)
    sampler = GroupedSampler(kinds, lengths, step=4 * 2 * processes, seed=3)
    shares = [list(BatchSamplerShard(BatchSampler(sampler, 4, False), processes, rank)) for rank in range(processes)]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(len(kinds)))
    pure = sum(kinds.count(kind) // (8 * processes) for kind in set(kinds))
    for step in range(pure):
        seen = [row for share in shares for batch in share[2 * step : 2 * step + 2] for row in batch]
        assert len({kinds[row] for row in seen}) == 1


def test_a_trainer_reads_grouped_batches_anew_in_every_epoch(tmp_path: Path) -> None:
    made = trainer(tmp_path, BOTH)
    made.train()
    kinds = batching.modalities(made.train_dataset)
    epochs = cut(made.data_collator.batches, 13)
    assert len(epochs) == 2
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(row for batch in epoch for row in batch) == list(range(26))  # type: ignore[attr-defined]
        assert mixed(epoch, kinds) <= 1
    assert mixed(cut(list(RandomSampler(kinds)), 2), kinds) > 1


def test_a_resumed_training_goes_on_in_the_order_that_it_had(tmp_path: Path) -> None:
    """Cut in the middle of the second epoch."""
    whole = trainer(tmp_path / "whole", BOTH)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 9}
    trainer(tmp_path / "cut", BOTH, **options).train()
    again = trainer(tmp_path / "cut", BOTH, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-9"))
    rest = whole.data_collator.batches[13 + 4 :]  # seven steps in the first epoch, the last of one batch; two after
    assert again.data_collator.batches[-len(rest) :] == rest
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_groups_transformers_chooses(tmp_path: Path) -> None:
    assert type(trainer(tmp_path, ())._get_train_sampler()) is RandomSampler
    sampler = trainer(tmp_path, ("length",))._get_train_sampler()
    assert mixed(cut(list(sampler), 4), batching.modalities(rows())) > 1  # by length alone


def test_rows_are_counted_in_lists_and_in_data_sets() -> None:
    listed = rows(9)
    table = datasets.Dataset.from_list(listed)
    assert batching.modalities(table) == batching.modalities(listed)
    assert {(), ("images",)} == set(batching.modalities(table))
    assert batching.lengths(table) == batching.lengths(listed) == [len(row["input_ids"]) for row in listed]
    assert batching.lengths(table.add_column("length", list(range(9)))) == list(range(9))
    assert batching.modalities(table.remove_columns(["images"])) == [()] * 9
    named = datasets.Dataset.from_dict({"image": ["a.png", None, ""], "pixel_values": [[1.0], None, None]})
    assert batching.modalities(named) == [("image", "pixel_values"), (), ()]


# What is refused.


def test_groups_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be grouped: 'size' is unknown; known: modality, length"):
        trainer(tmp_path, ("size",))
    with pytest.raises(DataError, match="train_sampling_strategy='sequential' says otherwise"):
        trainer(tmp_path, BOTH, train_sampling_strategy="sequential")
    with pytest.raises(DataError, match="neither input_ids nor a column 'length'"):
        batching.lengths([{"text": "a"}])
    with pytest.raises(DataError, match="fsdp gathers the weights of the vision tower"):
        batching.refuse_mixed(rows())
    batching.refuse_mixed([row for row in rows() if row["images"]])
    with pytest.raises(DataError, match="they have no column for anything other than text, which would be images"):
        trainer(tmp_path, BOTH, examples=pico.ragged(8))
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows()))
    with pytest.raises(DataError, match="they come one by one"):
        trainer(tmp_path, BOTH, examples=stream, max_steps=2).train()
