"""A trainer whose frozen layers are computed once: what of its settings lets batches come again, and what it takes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from solidify.behaviour.calling import chance_kept
from solidify.directory import ours
from solidify.errors import ObjectiveError, refuse
from solidify.findings import Finding
from solidify.model import anatomy
from solidify.system import console, foreign, processes
from solidify.training.prefix.cached import Prefix, cache_prefix, find_prefixes, refuse_none
from solidify.training.prefix.key import flatten
from solidify.training.prefix.store import Store
from solidify.training.runner import TrainerRunner
from solidify.upstream.transformers_training import has_length
from solidify.weights.format import same_bits

_TRIED = 4  # rows that are put together twice


def setting_faults(args: Any, runner: type[TrainerRunner], group_by: Sequence[str] = ()) -> list[str]:
    """Returns in words what of a trainer's settings keeps batches from coming again, or layers from being skipped."""
    faults = []
    if runner.writes(args):
        return ["what is trained on is written in training, so no batch comes again"]
    if group_by:
        faults.append("group_by puts other rows together in each epoch; leave it out")
    elif args.train_sampling_strategy != "sequential":
        faults.append(
            f"train_sampling_strategy is {args.train_sampling_strategy!r}, so other rows come together in each epoch "
            "and no batch comes again; set train_sampling_strategy: sequential"
        )
    if args.fsdp or args.deepspeed:
        faults.append("fsdp and deepspeed gather a layer's weights when it is called; leave them out")
    if args.torch_compile:
        faults.append("torch_compile compiles all layers into one; leave it out")
    return faults


def measure(prefixes: Sequence[Prefix], model: Any, tokens: int) -> int:
    """Returns about how many bytes the outputs of frozen layers are, for so many tokens with their padding."""
    width = int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0)
    dtype = anatomy.main_dtype(model) or torch.float32
    return tokens * width * dtype.itemsize * len(prefixes)


def refuse_uncacheable(trainer: Any) -> list[Prefix]:
    """Returns which layers a trainer would compute once.

    Raises:
        ObjectiveError: there are none, or no batch would come again; it says why.
    """
    faults = setting_faults(trainer.args, type(trainer.runner), trainer.group_by)
    rows = trainer.train_dataset
    if trainer.model_init is not None:
        faults.append("model_init makes another model for each trial; give the model itself")
    if rows is not None and not has_length(rows):
        faults.append("the rows come as a stream, which may come otherwise in each epoch")
    elif rows is not None and len(rows) and _draws(trainer.data_collator, rows):
        faults.append(
            f"{type(trainer.data_collator).__name__} makes another batch of the same rows each time (tokens that are "
            "hidden at random, for one)"
        )
    refuse(ObjectiveError, "cache_prefix: frozen layers cannot be computed once", faults)
    return refuse_none(find_prefixes(trainer.model))


@contextmanager
def caching(trainer: Any) -> Iterator[None]:
    """While a trainer with `cache_prefix` trains, its frozen layers are computed once; what they return is kept beside
    its checkpoints, until the training is finished.

    Raises:
        ObjectiveError: as `refuse_uncacheable` and `cache_prefix`, or the disk has no room.
    """
    if not trainer.cache_prefix:
        yield
        return
    prefixes = refuse_uncacheable(trainer)
    directory = Path(trainer.args.output_dir) / ours.PREFIX
    size = _estimate(trainer, prefixes)
    store = Store(directory)
    store.refuse_full(max(0, size - store.size()))
    told = f"; about {console.size(size)} in {directory} until the training is finished" if size else ""
    console.words.print(f"cache_prefix: {', '.join(map(str, prefixes))} are computed once for each batch{told}")
    with cache_prefix(trainer.model, directory, keep=True) as cached:
        cached.place_in(lambda: f"step {trainer.state.global_step}")
        trainer.prefix = cached
        try:
            yield
        finally:
            trainer.prefix = None
    again = f"{cached.compared} of {cached.read} reads were computed again, all bit-equal"
    if cached.left_out:
        again += f"; {cached.left_out} last batches before a checkpoint, figures or the end could not be"
    trainer.prefix_findings = [Finding("frozen layers are read as they are computed", None, again)]
    console.words.print(f"cache_prefix: {cached.computed} passes were computed; {again}")
    trainer.accelerator.wait_for_everyone()
    if processes.is_first():
        store.remove()


def compare_last(trainer: Any) -> None:
    """Compares the last batches that a trainer read with what its frozen layers return, in every process; nothing is to
    be kept, or told, of a training before that.

    Raises:
        ObjectiveError: they differ.
    """
    if trainer.prefix is not None:
        trainer.prefix.compare_last()
        trainer.accelerator.wait_for_everyone()


def comparing(trainer: Any, *, last: bool) -> AbstractContextManager[None]:
    """Has what is read in the block compared where it belongs to the last batch of a training."""
    return trainer.prefix.comparing() if last and trainer.prefix is not None else nullcontext()


def _draws(collate: Any, rows: Any) -> bool:
    """Returns whether a collator makes two different batches of the same rows; False where it cannot be tried."""
    few = [rows[number] for number in range(min(_TRIED, len(rows)))]
    with chance_kept():
        made = [foreign.attempt(collate, copy.deepcopy(few)).value for _ in range(2)]
    one, other = (dict(flatten("", batch)) for batch in made)
    return set(one) != set(other) or not all(same_bits(one[key], other[key]) for key in one)


def _estimate(trainer: Any, prefixes: Sequence[Prefix]) -> int:
    """Returns about how many bytes will be kept; 0 where the rows do not say how long they are."""
    args, tokens = trainer.args, 0
    evaluated = trainer.eval_dataset if args.eval_strategy != "no" else None
    for rows, size in ((trainer.train_dataset, args.train_batch_size), (evaluated, args.eval_batch_size)):
        if rows is None or isinstance(rows, dict) or not has_length(rows) or not len(rows):
            continue
        lengths = foreign.attempt(trainer.runner.lengths, rows).value or []
        batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
        if rows is trainer.train_dataset and args.max_steps > 0:
            batches = batches[: args.max_steps * args.gradient_accumulation_steps * args.world_size]
        tokens += sum(max(batch) * len(batch) for batch in batches) * trainer.runner.texts
    return measure(prefixes, trainer.model, tokens)
