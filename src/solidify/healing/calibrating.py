"""`solidify.score_experts`: how much each expert of MoE blocks matters on given data.

The model runs as a whole, or one layer at a time over all batches, each layer's output going to a file; both give the
same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.errors import HealingError, refuse
from solidify.healing import activations, matching
from solidify.healing.activations import Activations
from solidify.healing.sources import Batch, LayerStream, run_until_left
from solidify.model import anatomy
from solidify.surgery import expert_parts, selection
from solidify.surgery.expert_calls import BlockScorer
from solidify.surgery.expert_scores import METHODS, ExpertScores
from solidify.system import console, disk, processes
from solidify.weights import mapped


def score_experts(
    model: PreTrainedModel | str | Path,
    where: str | Sequence[str],
    batches: Iterable[Batch],
    *,
    by: str = "reap",
    stream: bool | None = None,
) -> ExpertScores:
    """Scores the experts of the MoE blocks that `where` names on batches of tokens; the model is unchanged.

    Args:
        model: a model, its hub id, or its directory.
        where: module names of MoE blocks, or patterns.
        batches: what the model is called with: `input_ids` (batch_size, sequence_length), `attention_mask`.
        by: a score of `METHODS`: `reap` (arXiv 2510.13999, equation 9) or `frequency`.
        stream: whether one layer is in memory at a time, and every layer runs over all batches before the next; left
            out, that is so where the model is larger than the free memory.

    Raises:
        SurgeryError: a name means nothing, or what it names has no experts.
        HealingError: `by` is unknown, there are no batches, the model does not run on them or cannot be streamed.
    """
    batches = list(batches)
    faults = [] if by in METHODS else [f"by is one of {', '.join(METHODS)}, but {by!r} was given"]
    faults += [] if len(batches) else ["there are no batches"]
    refuse(HealingError, "the experts cannot be scored as asked", faults)
    if not isinstance(model, PreTrainedModel):
        model = loading.load_base(str(model)).model
    names = selection.targets(model, where, None, None)
    scorers = {name: BlockScorer(model, name) for name in names}
    if stream if stream is not None else anatomy.size(model) > processes.free_memory():
        _score_layers(model, scorers, batches)
    else:
        _score_whole(model, scorers, batches)
    idle = [f"{name} is not called by the model on these batches" for name, each in scorers.items() if not each.tokens]
    refuse(HealingError, "the experts cannot be scored as asked", idle)
    return ExpertScores(
        by,
        {name: METHODS[by](each.sums, each.counts, each.tokens).tolist() for name, each in scorers.items()},
        {name: scorer.counts.tolist() for name, scorer in scorers.items()},
        next(iter(scorers.values())).tokens,
        {name: number for name in names if (number := expert_parts.count_groups(model, name)) > 1},
    )


def _score_whole(model: PreTrainedModel, scorers: Mapping[str, BlockScorer], batches: Sequence[Batch]) -> None:
    with ExitStack() as stack:
        stack.enter_context(mapped.released(model))
        for scorer in scorers.values():
            stack.enter_context(scorer.watching())
        advance = stack.enter_context(console.progress("Scoring experts", len(batches)))
        for batch in batches:
            _set_masks(scorers, batch)
            run_until_left(model, batch)
            advance()


def _score_layers(model: PreTrainedModel, scorers: Mapping[str, BlockScorer], batches: Sequence[Batch]) -> None:
    """Runs every layer over all batches, and writes what it returns to a file that the next one reads."""
    stream = LayerStream(model, matching.list_layers(model, list(scorers)), batches, "output")
    stream.refuse_unstreamable()
    advancing = console.progress("Scoring experts layer by layer", len(stream.layers))
    with disk.temporary() as directory, advancing as advance:
        for number, layer in enumerate(stream.layers):
            stream.number = number
            here = {name: each for name, each in scorers.items() if name == layer or name.startswith(f"{layer}.")}
            stream.read = _run_layer(stream, here, directory / f"{number:04d}.bin")
            (directory / f"{number - 1:04d}.bin").unlink(missing_ok=True)
            mapped.release([model.get_submodule(layer)])
            advance(layer)


def _run_layer(stream: LayerStream, scorers: Mapping[str, BlockScorer], path: Path) -> Activations:
    """Runs the current layer on every batch and returns what it returned, in a file."""
    making: Activations | None = None
    with ExitStack() as stack:
        for scorer in scorers.values():
            stack.enter_context(scorer.watching())
        for index, batch in enumerate(stream.batches):
            _set_masks(scorers, batch)
            output = stream.run(index)
            if making is None:
                making = Activations.create(path, stream.shape_outputs(output), output.dtype)
            making.set(index, output)
    assert making is not None
    return activations.finish(path, making)


def _set_masks(scorers: Mapping[str, BlockScorer], batch: Mapping[str, torch.Tensor]) -> None:
    for scorer in scorers.values():
        scorer.mask = matching.attended(batch)
