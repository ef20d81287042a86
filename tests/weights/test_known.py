"""Digests are computed once, and again when the file may have changed."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from solidify.errors import ArtifactError
from solidify.weights import checkpoint, digest_cache, format, store, transfer


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of tensors that was written a while ago."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.randn(16, 16), "b": torch.randn(64)}, path)
    time.sleep(0.1)
    return path


def test_what_is_known_is_not_read_again_unless_asked(weights: Path, reads: list[str]) -> None:
    first = digest_cache.digests([weights])
    assert sorted(reads) == ["a", "b"]
    assert digest_cache.digests([weights]) == first
    assert len(reads) == 2
    assert digest_cache.digests([weights], fresh=True) == first
    assert len(reads) == 4


def test_the_oldest_notes_go_once_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    monkeypatch.setenv("SOLIDIFY_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(digest_cache, "_KEPT", 2)
    monkeypatch.setattr(digest_cache, "_MOST", 4)
    known = []
    for number in range(5):
        path = weights.with_name(f"{number}.safetensors")
        save_file({"a": torch.randn(3)}, path)
        digest_cache.remember(path, {"a": "digest"})
        known.append(path)
    assert [digest_cache.recall(path) is not None for path in known] == [False, False, False, True, True]


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def in_place(path: Path) -> None:
    flip(path)


def with_its_time_set_back(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def by_another_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    flip(other)
    other.replace(path)


def with_its_time_set_back_and_linked(path: Path) -> None:
    with_its_time_set_back(path)
    os.link(path, path.with_name("link"))


def linked_by_us_while_it_is_changed(path: Path) -> None:
    time.sleep(0.1)
    with_its_time_set_back(path)
    transfer.link_or_copy(path, path.with_name("link"), link=True)


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        with_its_time_set_back,
        by_another_file,
        with_its_time_set_back_and_linked,
        linked_by_us_while_it_is_changed,
    ],
)
def test_a_changed_file_is_read_again(weights: Path, change: Callable[[Path], None]) -> None:
    before = digest_cache.digests([weights])
    change(weights)
    after = digest_cache.digests([weights])
    assert before["a"] == after["a"] and before["b"] != after["b"]


def test_a_file_written_a_moment_ago_is_not_noted(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "new.safetensors"
    save_file({"a": torch.randn(4)}, path)
    digest_cache.digests([path])
    digest_cache.digests([path])
    assert reads == ["a", "a"]


def test_a_file_written_a_moment_ago_is_not_noted_whatever_its_time_says(weights: Path, reads: list[str]) -> None:
    """Two changes within a tick of the clock, each with the time set back, would look alike."""
    with_its_time_set_back(weights)
    digest_cache.digests([weights])
    assert digest_cache.recall(weights) is None
    time.sleep(0.1)
    digest_cache.digests([weights])
    assert digest_cache.recall(weights) is not None


def test_a_file_that_changes_within_a_tick_while_it_is_read_is_not_noted(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read began a moment after a change: the next one may have had the same time."""
    flip(weights)
    digest = format.Entry.digest

    def slowly(entry: format.Entry, **given: bool) -> str:
        time.sleep(0.1)
        return digest(entry, **given)

    monkeypatch.setattr(format.Entry, "digest", slowly)
    digest_cache.digests([weights])
    assert digest_cache.recall(weights) is None


def test_a_file_that_is_exchanged_behind_its_header_is_not_noted(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digests are of the new file's bytes at the old one's places; its state is asked for before its header."""
    other = weights.with_name("other")
    save_file({"a": torch.zeros(3), "b": torch.ones(16, 20)}, other)
    read_header = format.read_header

    def exchanging(path: Path) -> dict[str, format.Entry]:
        header = read_header(path)
        if other.exists():
            other.replace(path)
            time.sleep(0.1)
        return header

    monkeypatch.setattr(format, "read_header", exchanging)
    digest_cache.digests([weights])
    assert digest_cache.recall(weights) is None
    assert digest_cache.digests([weights]) == digest_cache.digests([weights], fresh=True)


@pytest.mark.parametrize("note", [[], {}, "words", {"a": "0"}, {"a": 1, "b": 2}, {"a": "0", "b": "0", "c": "0"}])
def test_a_note_that_does_not_fit_its_file_counts_for_nothing(weights: Path, note: Any) -> None:
    wanted = digest_cache.digests([weights])
    digest_cache._write_note(weights.stat(), note)
    assert digest_cache.digests([weights]) == wanted
    entries = format.read_header(weights).values()
    digest_cache._write_note(weights.stat(), note)
    assert digest_cache.recall_entries(entries) == {}


def test_links_made_and_removed_leave_it_known(weights: Path, tmp_path: Path, reads: list[str]) -> None:
    first = digest_cache.digests([weights])
    assert transfer.link_or_copy(weights, tmp_path / "linked", link=True)
    assert (tmp_path / "linked").stat().st_ino == weights.stat().st_ino
    assert digest_cache.digests([tmp_path / "linked"]) == digest_cache.digests([weights]) == first
    directory = tmp_path / "result"
    directory.mkdir()
    transfer.link_or_copy(weights, directory / weights.name, link=True)
    digest_cache.remove(directory)
    assert not directory.exists()
    assert digest_cache.digests([weights]) == first
    assert len(reads) == 2
    (tmp_path / "linked").unlink()  # by others: the system's time of change says no more than that something was done
    assert digest_cache.digests([weights]) == first
    assert len(reads) == 4


def test_a_copy_is_known_as_its_source_is(weights: Path, tmp_path: Path, reads: list[str]) -> None:
    first = digest_cache.digests([weights])
    assert not transfer.link_or_copy(weights, tmp_path / "copy", link=False)
    assert (tmp_path / "copy").stat().st_ino != weights.stat().st_ino
    assert (tmp_path / "copy").read_bytes() == weights.read_bytes()
    assert digest_cache.digests([tmp_path / "copy"]) == first
    assert len(reads) == 2


def test_where_links_are_not_to_be_had_files_are_copied(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert not transfer.link_or_copy(weights, tmp_path / "a", link=True)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert not transfer.link_or_copy(weights, tmp_path / "b", link=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == weights.read_bytes()


def test_a_link_in_the_hubs_cache_leads_to_the_file_itself(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot.safetensors").symlink_to(weights)
    transfer.link_or_copy(tmp_path / "snapshot.safetensors", tmp_path / "linked", link=True)
    assert not (tmp_path / "linked").is_symlink()
    assert (tmp_path / "linked").stat().st_ino == weights.stat().st_ino


def test_what_is_known_goes_under_another_name_unread(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state whose tensors stand in a file under other names; a file that was changed since is read."""
    known = digest_cache.digests([weights])
    entries = format.read_header(weights)
    state = {f"inner.{name}": entry.read() for name, entry in entries.items()}
    origins = {f"inner.{name}": entry for name, entry in entries.items()}
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(format.Entry, "pieces", lambda entry: pytest.fail(f"{entry.name} was read"))
        found = store.store(state, tmp_path / "out", origins=origins)
    assert found == {f"inner.{name}": digest for name, digest in known.items()}
    written = digest_cache.digests(sorted((tmp_path / "out").glob("*.safetensors")), fresh=True)
    assert written == found
    assert digest_cache.recall_entries(entries.values()) == {
        entry.place: known[entry.name] for entry in entries.values()
    }
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert digest_cache.recall_entries(entries.values()) == {}


def test_an_empty_tensor_keeps_its_own_digest(tmp_path: Path) -> None:
    """It begins where the next one does."""
    state = {"x": torch.randn(4, 8), "empty": torch.zeros(0, 3), "y": torch.randn(8, 8)}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    store.store(state, tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    time.sleep(0.1)
    known, entries = digest_cache.digests([file]), format.read_header(file)
    for kept in (("y", "empty"), ("empty", "x")):
        found = store.store({n: state[n] for n in kept}, tmp_path / "b", origins={n: entries[n] for n in kept})
        assert found == {name: known[name] for name in kept}
        written = tmp_path / "b" / "model.safetensors"
        assert digest_cache.digests([written]) == digest_cache.digests([written], fresh=True) == found


def test_what_was_digested_on_its_way_is_known_in_its_own_file(weights: Path, tmp_path: Path) -> None:
    """Where all of a file's tensors went elsewhere; not where one was left."""
    entries = format.read_header(weights)
    for place, names in (("some", list(entries)[1:]), ("all", list(entries))):
        assert digest_cache.recall(weights) is None
        (tmp_path / place).mkdir()
        state = {f"inner.{name}": entries[name].read() for name in names}
        store.store(state, tmp_path / place, origins={f"inner.{name}": entries[name] for name in names})
    found = digest_cache.recall(weights)
    assert found == {name: entry.digest() for name, entry in entries.items()}


@pytest.mark.parametrize("moment", ["never", "before", "after", "linked"])
def test_a_known_tensor_whose_file_is_touched_while_it_is_copied_is_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A file that is written to is refused, its time set back or not; one that is linked by others is what it was."""
    digest_cache.digests([weights])
    with safe_open(weights, "pt") as file:
        state = {f"new.{name}": file.get_tensor(name) for name in ("a", "b")}
    written = store.write

    def write(*given: Any, **options: Any) -> dict[str, str]:
        if moment == "before":
            with_its_time_set_back(weights)
        elif moment == "linked":
            os.link(weights, tmp_path / "link")
        digests = written(*given, **options)
        if moment == "after":
            in_place(weights)
        return digests

    monkeypatch.setattr(store, "write", write)
    (tmp_path / "output").mkdir()
    if moment == "before":
        with pytest.raises(ArtifactError, match="was written to while it was read"):
            store.store(state, tmp_path / "output")
        return
    digests = store.store(state, tmp_path / "output")
    assert digests == digest_cache.digests([tmp_path / "output" / "model.safetensors"], fresh=True)


def test_one_file_of_all_weights_counts_and_no_index_of_others(tmp_path: Path) -> None:
    """As for transformers, which reads the same two directories."""
    model = pico.llama()
    model.save_pretrained(tmp_path / "both", max_shard_size="20KB")
    assert checkpoint.index_of(tmp_path / "both") is not None and len(checkpoint.weight_files(tmp_path / "both")) > 1
    other = pico.llama()
    with torch.no_grad():
        other.lm_head.weight.add_(1)
    other.save_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path / "both")
    assert checkpoint.weight_files(tmp_path / "both") == [tmp_path / "both" / "model.safetensors"]
    assert set(checkpoint.read(tmp_path / "both").entries) == set(load_file(tmp_path / "one" / "model.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(loaded.lm_head.weight, other.lm_head.weight)
    (tmp_path / "both" / checkpoint.INDEX).write_text("{")
    assert checkpoint.weight_files(tmp_path / "both") == [tmp_path / "both" / "model.safetensors"]


def test_a_file_that_changes_while_it_is_copied_gives_its_copy_no_digest(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest_cache.digests([weights])
    time.sleep(0.1)
    copy = transfer._copy_bytes

    def copied(source: Path, target: Path) -> None:
        with_its_time_set_back(source)
        copy(source, target)

    monkeypatch.setattr(transfer, "_copy_bytes", copied)
    transfer.link_or_copy(weights, tmp_path / "copy", link=False)
    assert digest_cache.recall(tmp_path / "copy") is None


def test_a_directory_of_more_files_than_may_be_open_is_removed(tmp_path: Path) -> None:
    directory = tmp_path / "result"
    directory.mkdir()
    for number in range(40):
        (tmp_path / f"{number}.safetensors").write_bytes(b"")
        os.link(tmp_path / f"{number}.safetensors", directory / f"{number}.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        digest_cache.remove(directory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not directory.exists() and len(list(tmp_path.glob("*.safetensors"))) == 40
