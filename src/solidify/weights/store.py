"""A state becomes the weights of a directory: files that stay as they are are linked, the rest is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from solidify.errors import ArtifactError, refuse
from solidify.system import console
from solidify.weights import checkpoint, digest_cache, format, mapped, transfer
from solidify.weights.checkpoint import Checkpoint
from solidify.weights.format import Entry, Place, Shape, TensorSource


def store(
    state: Mapping[str, torch.Tensor],
    directory: Path,
    *,
    tied: Iterable[str] = (),
    origins: Mapping[str, Entry] | None = None,
    link: bool = True,
) -> dict[str, str]:
    """Writes a state dict as safetensors, one file or several with an index, and returns the digest of every tensor.

    Names in `tied` are left out, because the model ties them anew. `origins` says which tensors stand, bit for bit, in
    files already; what a mapped file holds is found without it. A file whose tensors all stay, under their names, is
    linked (or copied, without `link`), any other tensor is copied or written into new files.

    Raises:
        ArtifactError: two names share memory though the model does not tie them, or there is no room.
    """
    left_out = set(tied)
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    refuse(ArtifactError, "tensors that are shared but not tied cannot be reloaded", _find_shared(kept))
    stored = _under_one_name({**(origins or {}), **origins_in_memory(kept)})
    whole = _whole_files({name: entry for name, entry in stored.items() if name in kept})
    linked = {name for header in whole.values() for name in header}
    left = {name: tensor for name, tensor in kept.items() if name not in linked}
    at_first = {entry.file: entry.file.stat() for entry in stored.values()}
    settled = {path: state for path, state in at_first.items() if digest_cache.is_settled(state)}
    known = digest_cache.recall_entries(stored[name] for name in left if name in stored)
    sources = {
        name: TensorSource.stored(name, entry, known.get(entry.place))
        if (entry := stored.get(name)) is not None
        else TensorSource.made(name, tensor)
        for name, tensor in left.items()
    }
    digests = write(directory, sources, whole=whole, link=link)
    entries = checkpoint.read(directory).entries
    taken = {name: stored[name] for name in sources if name in stored and stored[name].place in known}
    transfer.refuse_other(at_first, [(entry.file, entries[name], digests[name]) for name, entry in taken.items()])
    _remember_sources({entry.place: digests[name] for name, entry in stored.items() if name in sources}, settled)
    return digests


def _remember_sources(passed: Mapping[Place, str], at_first: Mapping[Path, os.stat_result]) -> None:
    """Notes the digests of files that were digested as a whole while their tensors were written elsewhere."""
    for path in dict.fromkeys(path for path, _, _ in passed if path in at_first):
        with suppress(ArtifactError):
            header = format.read_header(path)
            if all(entry.place in passed for entry in header.values()) and digest_cache.recall(path) is None:
                found = {name: passed[entry.place] for name, entry in header.items()}
                digest_cache.remember(path, found, at_first[path])


def write(
    directory: Path,
    sources: Mapping[str, TensorSource],
    *,
    whole: Mapping[Path, Mapping[str, Entry]] | None = None,
    groups: Iterable[Iterable[str]] = (),
    link: bool = True,
) -> dict[str, str]:
    """Writes files from sources beside files that are taken as a whole; returns the digest of every tensor.

    Each of `groups` names tensors that get files of their own.

    Raises:
        ArtifactError: there is no room, or a file cannot be read.
    """
    whole = whole or {}
    shapes = {name: source.shapes[name] for name, source in sources.items()}
    units = {id(source): source.shapes for source in sources.values()}
    plan = [list({id(s): units.pop(id(s)) for n in group if id(s := sources[n]) in units}.values()) for group in groups]
    shards = [shard for group in (*plan, list(units.values())) if group for shard in checkpoint.shards(group)]
    names = checkpoint.file_names(len(whole) + len(shards))
    total = sum(shape.nbytes for shape in shapes.values())
    copies = transfer.copied(whole, directory, link=link)
    refuse_full(directory, total + sum(path.stat().st_size for path in copies))
    files: dict[str, Mapping[str, Shape]] = {}
    digests: dict[str, str] = {}
    for (path, header), file in zip(whole.items(), names, strict=False):
        transfer.link_or_copy(path, directory / file, link=link)
        files[file] = {name: entry.shape for name, entry in header.items()}
    with console.bytes_progress("Writing tensors", total) as advance:
        for shard, file in zip(shards, names[len(whole) :], strict=True):
            unique = list({id(sources[name]): sources[name] for name in shard}.values())
            digests |= format.write_file(directory / file, unique, advance)
            files[file] = {name: shapes[name] for name in shard}
    for file in names[len(whole) :]:
        digest_cache.remember(directory / file, {name: digests[name] for name in files[file]})
    digests |= digest_cache.digests([directory / file for file in names[: len(whole)]], title="Digesting what is kept")
    checkpoint.write_index(directory, files)
    return digests


def origins_in_memory(state: Mapping[str, torch.Tensor]) -> dict[str, Entry]:
    """Returns for every tensor that is an unchanged part of a mapped file where it stands there."""
    return {
        name: Entry(path, name, Shape.of(state[name]), start)
        for name, (path, start) in mapped.file_regions(state).items()
    }


def origins_by_digest(
    state: Mapping[str, torch.Tensor], base: Checkpoint, digests: Mapping[str, str]
) -> dict[str, Entry]:
    """Returns for every tensor that equals, by its digest, the one of its name in a checkpoint where that stands.

    Only files all of whose tensors are in the state are looked at.
    """
    fitting = [
        path
        for path in base.files
        if all(
            name in state and Shape.of(state[name]) == entry.shape
            for name, entry in base.entries.items()
            if entry.file == path
        )
    ]
    found = digest_cache.digests(fitting)
    return {name: base.entries[name] for name, digest in found.items() if digests[name] == digest}


def _whole_files(stored: Mapping[str, Entry]) -> dict[Path, dict[str, Entry]]:
    """Returns the files all of whose tensors are kept, under the names that they have there."""
    found = {}
    for path in dict.fromkeys(entry.file for entry in stored.values()):
        try:
            header = format.read_header(path)
        except ArtifactError:
            continue  # something else that is mapped
        if all(name in stored and _same_place(stored[name], entry) for name, entry in header.items()):
            found[path] = header
    return dict(sorted(found.items()))


def _under_one_name(stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Gives a file that is reached by several paths (`../base`, a link) one of them."""
    names: dict[tuple[int, int], Path] = {}
    paths: dict[Path, Path] = {}
    for path in dict.fromkeys(entry.file for entry in stored.values()):
        found = path.stat()
        paths[path] = names.setdefault((found.st_dev, found.st_ino), path)
    return {name: replace(entry, file=paths[entry.file]) for name, entry in stored.items()}


def _same_place(a: Entry, b: Entry) -> bool:
    return a.start == b.start and a.shape == b.shape and a.file.samefile(b.file)


def refuse_full(directory: Path, needed: int) -> None:
    """Raises ArtifactError when there is less room than is needed in a directory."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ArtifactError(
            f"{directory.parent} has {console.size(free)} of free space, and {console.size(needed)} are needed; "
            "make room, or choose another output"
        )


def _find_shared(state: Mapping[str, torch.Tensor]) -> list[str]:
    owners: dict[int, str] = {}
    faults = []
    for name, tensor in state.items():
        key = tensor.untyped_storage().data_ptr()
        if tensor.numel() and key in owners:
            faults.append(f"{owners[key]} and {name} share memory; give each its own, or let the model tie them")
        owners.setdefault(key, name)
    return faults
