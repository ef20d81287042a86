"""The weights of a merged model: files that no change touches are linked, the others rewritten in one pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import configured, storage
from solidify.errors import AdapterError, ArtifactError, refuse
from solidify.merging import mathematics
from solidify.merging.mathematics import Change, Merger
from solidify.system import console, foreign, heap
from solidify.weights import checkpoint, digest_cache, format, hashing, store, transfer
from solidify.weights.format import Entry, Piece, Shape, TensorSource
from solidify.weights.reverting import Stored, Unit


@dataclass(frozen=True)
class Rewritten:
    """What was written: digests of all tensors, and the `base`'s; names by who gave the tensors; the files.

    `given` are tensors that the adapter had a part in, `added` new ones; `kept` are files that are as they were.
    `untied` says that two tensors of the base that were one are two now.
    """

    digests: dict[str, str]
    base: dict[str, str]
    given: list[str]
    added: list[str]
    files: list[Path]
    kept: list[Path]
    untied: bool

    @property
    def changed(self) -> list[str]:
        """The names of the base's tensors that are others now."""
        return [name for name, digest in self.base.items() if self.digests[name] != digest]

    def counts(self, merger: Merger) -> dict[str, int]:
        """Returns the ledger in numbers."""
        return {
            "adapter tensors used": len(merger.used),
            "tensors changed": len(self.changed),
            "tensors added": len(self.added),
            "tensors kept": len(self.base) - len(self.changed),
            "files kept": len(self.kept),
        }


@dataclass
class _Plan:
    """What becomes of the tensors in memory: by which change, and which are tied no longer (by new name)."""

    changes: dict[str, Change]
    added: dict[str, tuple[str, Change | None]] = field(default_factory=dict)
    alike: list[Change] = field(default_factory=list)
    untied: bool = False


def aliases(model: nn.Module) -> list[list[str]]:
    """Returns the names of tensors that are one, for every such tensor of the model."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@dataclass(frozen=True)
class Prepared:
    """A base and an adapter that fits it; of the base only headers were read.

    `ties` are names of tensors that are one; `heads` name the weights of input and output embeddings.
    """

    stored: Stored
    merger: Merger
    ties: list[list[str]]
    heads: set[str]


def prepare(skeleton: PreTrainedModel, base: Path, adapter: Path, bare: Sequence[str] = ()) -> Prepared:
    """Puts an adapter on a skeleton of its base, on the meta device; `bare` are parameters that it trains in full.

    Raises:
        AdapterError: it is of a kind that cannot be merged, or a tensor of it fits nowhere, is missing or not finite.
        ArtifactError: the weights of either are not whole.
    """
    stored = Stored(skeleton, checkpoint.read(base))
    shapes = {name: Shape.of(tensor) for name, tensor in skeleton.state_dict().items()}
    ties, heads = aliases(skeleton), _find_embeddings(skeleton)
    model = mathematics.attach(skeleton, configured.read(adapter, skeleton), bare)
    merger = mathematics.read(model, format.read_header(adapter / storage.WEIGHTS), shapes)
    refuse(AdapterError, "the adapter is not finite", _not_finite(merger))
    return Prepared(stored, merger, ties, heads)


def rewrite(prepared: Prepared, directory: Path, *, expected: Mapping[str, str], link: bool) -> Rewritten:
    """Writes the weights of base and adapter into a directory, under the base's file names.

    `expected` are the base's digests as far as they are known; whatever is read is compared with them.

    Raises:
        AdapterError: a merged tensor is not finite, a tensor of the adapter was not used once, or tied tensors would
            part that cannot.
        ArtifactError: the base is not what `expected` says, changes while it is read, or there is no room.
    """
    stored, merger = prepared.stored, prepared.merger
    plan = _plan_ties(prepared)
    writing = _Writing(stored, merger, plan, directory, expected)
    before = {path: transfer.read_state(path) for path in stored.checkpoint.files}
    at_first = {path: path.stat() for path in stored.checkpoint.files}
    touched = [path for path in stored.checkpoint.files if writing.touches(path)]
    kept = [path for path in stored.checkpoint.files if path not in touched]
    copies = transfer.copied(kept, directory, link=link)
    store.refuse_full(directory, sum(path.stat().st_size for path in (*touched, *copies)))
    for path in kept:
        transfer.link_or_copy(path, directory / path.name, link=link)
    with console.bytes_progress("Merging", sum(path.stat().st_size for path in touched)) as advance:
        for path in touched:
            writing.file(path, advance)
    for change in plan.alike:
        merger.tell_alike(change)
    writing.index()
    refuse(AdapterError, "the adapter cannot be merged", [*merger.faults, *_find_misuses(merger)])
    found = digest_cache.digests([directory / path.name for path in kept])
    writing.digests |= found
    writing.base |= found
    faults = [
        f"the tensor {name} is not the one that was written (its digest differs)"
        for name, digest in writing.base.items()
        if expected.get(name, digest) != digest
    ]
    faults += [
        f"{path} was written to while it was read"
        for path, state in before.items()
        if transfer.read_state(path) != state
    ]
    refuse(ArtifactError, f"{stored.checkpoint.directory} changed while it was read", faults)
    entries = {path: format.read_header(directory / path.name) for path in touched}
    known = [(p, entries[p][key], digest) for p, found in writing.known.items() for key, digest in found.items()]
    transfer.refuse_other({path: at_first[path] for path in touched}, known)
    for path in touched:
        target = directory / path.name
        digest_cache.remember(target, {name: writing.digests[name] for name in format.read_header(target)})
    files = [directory / path.name for path in stored.checkpoint.files]
    return Rewritten(
        writing.digests,
        {name: writing.base[name] for name in stored.checkpoint.entries},
        sorted(writing.given),
        sorted(plan.added),
        files,
        [directory / path.name for path in kept],
        plan.untied,
    )


def _not_finite(merger: Merger) -> list[str]:
    """Reads the adapter through: what is broken is told at once, before anything is written."""
    faults = []
    for key, entry in merger.entries.items():
        if entry.shape.dtype.is_floating_point and not all(
            torch.isfinite(piece.view(entry.shape.dtype)).all() for piece in entry.pieces()
        ):
            faults.append(f"{key} holds NaN or infinity")
    return faults


def _find_misuses(merger: Merger) -> list[str]:
    return [f"{key} was used {merger.used[key]} times and not once" for key in merger.entries if merger.used[key] != 1]


def _plan_ties(prepared: Prepared) -> _Plan:
    """Settles what becomes of tensors that are one in the base: they stay one, or part where the model can do so."""
    stored, merger = prepared.stored, prepared.merger
    plan = _Plan(dict(merger.changes))
    faults = []
    for group in prepared.ties:
        changes = [plan.changes.get(name) for name in group]
        there = [change for change in changes if change is not None]
        if not there:
            continue
        first = there[0]
        if len(there) == len(group) and all(_are_same(merger, first, change) for change in there[1:]):
            plan.alike += there[1:]
            for name in group:
                plan.changes[name] = first
        elif set(group) == prepared.heads:
            plan.untied = True
            standing = next(name for name in group if name in stored.units)
            for name, change in zip(group, changes, strict=True):
                if name not in stored.units:
                    plan.changes.pop(name, None)
                    plan.added[name] = (standing, change)
        else:
            out = ", ".join(name for name, change in zip(group, changes, strict=True) if change is not first)
            faults.append(f"{first.name} is tied to {out}, which the adapter changes in another way")
    refuse(AdapterError, "the adapter cannot be merged", faults)
    return plan


def _find_embeddings(model: PreTrainedModel) -> set[str]:
    """Names the weights of the input and output embeddings, which a configuration can untie; none in other families.

    A family without embeddings says so by an error of its own (a convolutional one: NotImplementedError).
    """
    asked = (foreign.attempt(ask).value for ask in (model.get_input_embeddings, model.get_output_embeddings))
    modules = [module for module in asked if isinstance(module, nn.Module)]
    weights = {id(m.weight) for m in modules if isinstance(getattr(m, "weight", None), nn.Parameter)}
    found = model.named_parameters(remove_duplicate=False)
    return {name for name, p in found if id(p) in weights} if len(modules) == 2 else set()


def _are_same(merger: Merger, a: Change, b: Change) -> bool:
    """Returns whether two tensors that are one in the base become the same: tied copies, or one low-rank update."""
    if a.tokens is not None or b.tokens is not None:
        return (a.keys, a.tokens) == (b.keys, b.tokens)
    if a.layer is None and b.layer is None:
        return _digest_tensor(merger, a.keys[0]) == _digest_tensor(merger, b.keys[0])
    if a.layer is None or b.layer is None or _digest_tensor(merger, a.instead) != _digest_tensor(merger, b.instead):
        return False
    if a.layer.scaling != b.layer.scaling or any(change.layer.lora_variant for change in (a, b) if change.layer):
        return False

    def factor(change: Change, name: str) -> torch.Tensor | None:
        return next((merger.entries[key].read() for key in change.keys if f".{name}" in key), None)

    # PEFT's tied layers: the embedding's B, transposed, is the head's A, and its A the head's B.
    for embedding, head in ((a, b), (b, a)):
        pairs = (("lora_embedding_A", "lora_B"), ("lora_embedding_B", "lora_A"))
        found = [(factor(embedding, ours), factor(head, theirs)) for ours, theirs in pairs]
        if all(x is not None and y is not None and torch.equal(x.T, y) for x, y in found):
            return True
    return False


def _digest_tensor(merger: Merger, key: str | None) -> str | None:
    return merger.entries[key].digest() if key is not None else None


@dataclass
class _Writing:
    """One pass over the base's files."""

    stored: Stored
    merger: Merger
    plan: _Plan
    directory: Path
    expected: Mapping[str, str]
    digests: dict[str, str] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)
    known: dict[Path, dict[str, str]] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        changing = {id(u): u for name, u in self.stored.units.items() if name in self.plan.changes}
        self.units = {key: unit for unit in changing.values() for key in unit.keys}
        self.header = {path: [e for e in self.entries if e.file == path] for path in self.stored.checkpoint.files}
        self.new = {name: self.stored.key_of(name) for name in self.plan.added}

    @property
    def entries(self) -> list[Entry]:
        """The base's tensors, in the order of its files."""
        return list(self.stored.checkpoint.entries.values())

    def touches(self, path: Path) -> bool:
        """Returns whether a file cannot stay as it is."""
        return any(entry.name in self.units for entry in self.header[path]) or bool(self._find_added(path))

    def _find_added(self, path: Path) -> dict[str, tuple[str, Change | None]]:
        """Returns the new tensors that are written beside the one that they were tied to."""
        return {
            name: (source, change)
            for name, (source, change) in self.plan.added.items()
            if self.stored.checkpoint.entries[self.stored.units[source].keys[0]].file == path
        }

    def file(self, path: Path, advance: Callable[[int], None]) -> None:
        """Rewrites one file: read, digested, written; changed tensors are made when their turn comes."""
        here = {entry.name: entry for entry in self.header[path]}
        supplies = [
            self._make_new_source(name, source, change) for name, (source, change) in self._find_added(path).items()
        ]
        known = digest_cache.recall_entries(entry for key, entry in here.items() if key not in self.units)
        self.known[path] = {entry.name: known[entry.place] for entry in here.values() if entry.place in known}
        seen: set[int] = set()
        for key, entry in here.items():
            unit = self.units.get(key)
            if unit is None:
                supplies.append(TensorSource.stored(key, entry, known.get(entry.place)))
            elif id(unit) not in seen:
                seen.add(id(unit))
                keys = [k for k in here if k in set(unit.keys)]
                self.given |= set(keys)
                supplies.append(self._make_changed_source(unit, {k: here[k] for k in keys}))
        written = format.write_file(self.directory / path.name, supplies, advance)
        self.digests |= written
        self.base |= {key: written[key] for key in here if key not in self.units}

    def _make_changed_source(self, unit: Unit, keys: Mapping[str, Entry]) -> TensorSource:
        return TensorSource(
            {key: entry.shape for key, entry in keys.items()}, lambda: self._yield_pieces(unit, set(keys))
        )

    def _make_new_source(self, name: str, source: str, change: Change | None) -> TensorSource:
        unit, key = self.stored.units[source], self.new[name]
        shape = unit.shapes[source]

        def pieces() -> Iterator[Piece]:
            """Yields the values that the tensor gets under its own name, some rows at a time."""
            for rows in self.merger.ranges({source: change} if change is not None else {}, unit.shapes, unit.rows):
                base = unit.read(rows)[source]
                yield key, base if change is None else self.merger.merged(change, base, rows, unit.rows)

        return TensorSource({key: shape}, pieces)

    def _yield_pieces(self, unit: Unit, keys: set[str]) -> Iterator[Piece]:
        changes = {name: self.plan.changes[name] for name in unit.shapes if name in self.plan.changes}
        if unit.entry is not None and all(c.layer is None and c.tokens is None for c in changes.values()):
            ((name, change),) = changes.items()
            yield from ((unit.entry.name, piece) for piece in self.merger.pieces(change, unit.shapes[name]))
        else:
            yield from self._yield_parts(unit, keys, changes)
            heap.trim()
        for key in keys - set(self.base):
            self.base[key] = self.stored.checkpoint.entries[key].digest()

    def _yield_parts(self, unit: Unit, keys: set[str], changes: Mapping[str, Change]) -> Iterator[Piece]:
        """Reads, merges and yields a unit part by part; a tensor that is stored as it is in memory is digested too."""
        hasher = hashing.tensor_hasher(unit.entry.shape.dtype, unit.entry.shape.sizes) if unit.entry else None
        for rows in self.merger.ranges(changes, unit.shapes, unit.rows):
            if not keys & set(unit.keys_of(rows)):
                continue
            made = unit.read(rows)
            for name, tensor in list(made.items()):
                if hasher is not None:
                    hasher.update(format.bytes_of(tensor))
                if name in changes:
                    made[name] = self.merger.merged(changes[name], tensor, rows, unit.rows)
            for found, piece in unit.written(made, rows).items():
                if found in keys:
                    yield found, piece
        if hasher is not None and unit.entry is not None:
            self.base[unit.entry.name] = hasher.hexdigest()

    def index(self) -> None:
        """Puts an index beside the files if the base has one: the same, unless tensors were added."""
        source = checkpoint.index_of(self.stored.checkpoint.directory)
        if source is not None and not self.plan.added:
            shutil.copyfile(source, self.directory / checkpoint.INDEX)
        elif source is not None:
            headers = {p.name: format.read_header(self.directory / p.name) for p in self.stored.checkpoint.files}
            shapes = {file: {name: entry.shape for name, entry in header.items()} for file, header in headers.items()}
            checkpoint.write_index(self.directory, shapes)
