"""`solidify.align`: each new module learns from what the module that it replaced is given and gives, in the base.

The first stage of healing. Inputs come from the unmodified base, so the layers' gradients are independent (MOHAWK
stage 2, arXiv 2408.10189; LoLCATs, arXiv 2410.10254): all units learn in one base pass, or one layer after the other
with one layer in memory, with the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.errors import HealingError, refuse
from solidify.healing import streaming, work
from solidify.healing.learning import Alignment
from solidify.healing.ledger import Aligned, Kept, Result
from solidify.healing.matching import Unit
from solidify.healing.sources import Batch, WholeBase
from solidify.healing.work import Work
from solidify.surgery.edit_record import Edit
from solidify.weights import spilling


def align(
    model: PreTrainedModel,
    base: PreTrainedModel | str | Path,
    batches: Sequence[Batch],
    *,
    edits: Iterable[Edit | Mapping[str, Any]],
    settings: Alignment | None = None,
    held_out: Sequence[Batch] = (),
    directory: str | Path | None = None,
) -> list[Aligned]:
    """Trains every replaced module, in place, to do what the module that it replaced does in the base.

    Args:
        model: the changed model, as `solidify.replace` left it, or an artifact that was loaded.
        base: the model before the change, or where it stands (a directory, a hub id); its weights are mapped.
        batches: what the base runs on, each a dictionary of tensors (batch_size, sequence_length) with `input_ids` and,
            where rows are padded, `attention_mask`. They are gone through in a seeded order, again when they are used
            up.
        edits: what was replaced: what `solidify.replace` returned, or the `edits` of an artifact's manifest.
        settings: how units learn, and how it is done.
        held_out: batches from which the errors before and after are taken; without them, the first of `batches`.
        directory: where results (and, streamed, activations) are kept. What stands there of the same base, data and
            settings is not computed again, so an alignment goes on after an interruption.

    Returns:
        What became of each unit, in the order of the layers. With a share, of this process's own.

    Raises:
        HealingError: the settings are wrong, nothing learns, a module stands at several names, the family cannot be
            streamed, or an error became infinite. The model is then as it was.
    """
    settings = settings or Alignment()
    refuse_types(model, settings, edits := list(edits))
    share = settings.share
    if settings.inputs == "healed" and share[1] > 1:
        raise HealingError("units that learn behind healed ones learn one after the other; leave out share")
    if not isinstance(base, PreTrainedModel):
        base = loading.load_base(str(base)).model
    records = [edit.document() if isinstance(edit, Edit) else dict(edit) for edit in edits]
    todo = work.prepare(model, base, batches, records, settings, held_out)
    stream = settings.streams(base)
    if stream and directory is None:
        directory = spilling.directory_for(model)
    kept = Kept(Path(directory), todo.key()) if directory is not None else Kept(None, "")
    mine = [unit for number, unit in enumerate(todo.units) if number % share[1] == share[0]]
    results = streaming.align(todo, mine, kept) if stream else _align_whole(todo, mine, kept)
    if share[1] == 1:
        work.put_values(model, results)
    return [result.aligned for result in results]


def refuse_types(model: Any, settings: Any, edits: Sequence[Any]) -> None:
    """Raises HealingError for arguments of another type than asked."""
    faults = []
    if not isinstance(model, PreTrainedModel):
        faults.append(
            f"the changed model is one in memory (of solidify.load, say), but is of type {type(model).__name__}"
        )
    if not isinstance(settings, Alignment):
        faults.append(f"settings is a solidify.Alignment, but is of type {type(settings).__name__}")
    wrong = [each for each in edits if not isinstance(each, (Edit, Mapping))]
    if wrong:
        faults.append(f"edits are what solidify.replace returned, but one is of type {type(wrong[0]).__name__}")
    refuse(HealingError, "the arguments do not fit", faults)


def _align_whole(todo: Work, mine: Sequence[Unit], kept: Kept) -> list[Result]:
    """Aligns units with the whole base in memory: all in one pass, or one after the other behind what has learned."""
    healed = todo.settings.inputs == "healed"
    at, behind = todo.settings.match, todo.model if healed else None
    source = WholeBase(todo.base, todo.batches, at, behind=behind)
    looking = WholeBase(todo.base, todo.held_out, at, behind=behind)
    results: list[Result] = []
    for together in [[unit] for unit in mine] if healed else [mine]:
        results += work.align_units(todo, together, source, looking, kept)
        if healed:
            work.put_values(todo.model, results[-1:])
    return results
