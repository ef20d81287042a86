"""Alignment with one layer in memory: its inputs are read from a file, its outputs written to one."""

from __future__ import annotations

from collections.abc import Sequence

from solidify.healing import activations, matching, work
from solidify.healing.activations import Activations
from solidify.healing.ledger import Kept, Result
from solidify.healing.matching import Call, Unit
from solidify.healing.sources import LayerStream
from solidify.healing.work import Work
from solidify.system import console, heap
from solidify.weights import mapped


def align(todo: Work, mine: Sequence[Unit], kept: Kept) -> list[Result]:
    """Aligns units layer by layer, with one layer of the base and of the changed model in memory.

    Raises:
        HealingError: a unit stands in no list of layers, or in another than the rest; the family cannot be streamed.
    """
    heap.map_large()  # else pieces that nobody uses are a twentieth of the peak
    layers = matching.list_layers(todo.base, [unit.name for unit in mine])
    batches = [*todo.batches, *todo.held_out]
    stream = LayerStream(todo.base, layers, batches, todo.settings.match)
    stream.refuse_unstreamable()
    if todo.settings.inputs == "healed":
        stream.behind = LayerStream(todo.model, layers, batches, todo.settings.match)
        stream.behind.refuse_unstreamable("the changed model")
    results: list[Result] = []
    mapped.release([todo.base, todo.model])  # what comparing the two has read of every layer
    for number, layer in enumerate(layers):
        stream.number = number
        here = [unit for unit in mine if unit.name == layer or unit.name.startswith(f"{layer}.")]
        results += _align_layer(todo, here, stream, kept)
        if number + 1 < len(layers):
            _write_outputs(stream, kept, "base")
            if stream.behind is not None:
                stream.behind.number = number
                _write_outputs(stream.behind, kept, "healed")
                stream.behind.number = number + 1
        mapped.release([model.get_submodule(layer) for model in (todo.base, todo.model)])
    return results


def _align_layer(todo: Work, here: Sequence[Unit], stream: LayerStream, kept: Kept) -> list[Result]:
    """Aligns the units of the current layer: together, or one after the other behind what has learned."""
    results: list[Result] = []
    looking = _Later(stream, len(todo.batches))
    for together in [[unit] for unit in here] if stream.behind is not None else [here]:
        found = work.align_units(todo, together, stream, looking, kept)
        if stream.behind is not None:
            work.put_values(todo.model, found)
        results += found
    return results


class _Later:
    """The calls of a stream, from a batch on."""

    def __init__(self, stream: LayerStream, first: int) -> None:
        self.stream, self.first = stream, first

    def calls(self, index: int, units: Sequence[Unit]) -> dict[str, Call]:
        """Returns the calls of units for one of the later batches."""
        return self.stream.calls(self.first + index, units)


def _write_outputs(stream: LayerStream, kept: Kept, whose: str) -> None:
    """Writes what the current layer returns for every batch, and has the stream read it; one that is whole is kept."""
    assert kept.directory is not None
    path = kept.directory / f"{whose}-{stream.number:04d}-{kept.key[:16]}.bin"
    first = stream.run(0)
    shapes, dtype = stream.shape_outputs(first), first.dtype
    found = Activations.open(path, shapes, dtype)
    if found is None:
        making = Activations.create(path, shapes, dtype)
        with console.progress(f"Layer {stream.number} of {len(stream.layers)}", len(stream.batches)) as advance:
            for index in range(len(stream.batches)):
                making.set(index, stream.run(index))
                advance()
        found = activations.finish(path, making)
    stream.read = found
    earlier = kept.directory / f"{whose}-{stream.number - 1:04d}-{kept.key[:16]}.bin"
    earlier.unlink(missing_ok=True)
