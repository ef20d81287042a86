"""All or nothing for a model in memory: what user code, PEFT or an interrupt leaves half done is put back.

What is put back, `snapshot.py` remembers. What a change was not asked to change has the values that it had, or the
change is refused (`outside.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from solidify.errors import SurgeryError
from solidify.model.extent import Extent
from solidify.surgery import outside
from solidify.surgery.outside import Outside
from solidify.surgery.snapshot import Snapshot


@dataclass(frozen=True)
class Started:
    """What a transaction gives to its block: the values that are kept of parameters and buffers, by their `id`."""

    values: Mapping[int, torch.Tensor]
    _before: Snapshot
    _changes: Collection[str] | None

    def refuse_altered(self, built: type, hooks: tuple[type, ...] = (), apart: Collection[str] = ()) -> None:
        """Refuses what code that builds modules, or tries them alone, did to others, beside writing values.

        The class that was `built` may keep something in itself; hooks may be new that are methods of the classes
        `hooks`, and modules `apart` may hold something else themselves.

        Raises:
            SurgeryError: an attribute, a child, a hook, a configuration, a class, a flag or a buffer is another.
        """
        if self._changes is not None:
            outside.refuse_changed(self._before.list_altered(self._changes, built, hooks, apart))


@contextmanager
def transaction(model: nn.Module, extent: Extent, changes: Collection[str] | None = None) -> Iterator[Started]:
    """Runs the block; when it is left by any exception, an interrupt too, the model is put back as it was, in place.

    Of a bounded model, values that the block wrote into a parameter's own memory cannot be put back; a note on the
    exception names them then. `changes` names the modules and tensors that the block is to change (None: nothing is
    compared).

    Raises:
        SurgeryError: the block ended, well or by such an error, but a tensor outside `changes` is not what it was.
    """
    before = Snapshot(model, extent)
    values = before.list_values()
    around = Outside(model, changes, values) if changes is not None else None
    try:
        try:
            yield Started(values, before, changes)
        except SurgeryError:
            if around is not None:  # what was written elsewhere is the cause of what was refused
                around.refuse_changes()
            raise
        if around is not None:
            around.refuse_changes()
    except BaseException as error:
        lost = around.list_lost() if around is not None and not extent.whole else []
        lost = list(dict.fromkeys([*before.put_back(), *lost]))
        if lost:
            error.add_note(f"values were written in place, and the model must be loaded again: {', '.join(lost[:4])}")
        raise
