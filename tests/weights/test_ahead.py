"""What is digested before the imports of a command is what would be digested later, or is not used."""

from __future__ import annotations

import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from solidify.artifact import certificate
from solidify.checks import check as checks
from solidify.errors import ArtifactError
from solidify.weights import ahead, digest_cache, direct, format, header


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A directory with two files of tensors that were written a while ago."""
    save_file({"a": torch.randn(16, 16), "b": torch.randn(64), "none": torch.zeros(0, 3)}, tmp_path / "1.safetensors")
    save_file({"c": torch.randn(7, 9).bfloat16(), "d": torch.arange(5)}, tmp_path / "2.safetensors")
    time.sleep(0.1)
    return listed(tmp_path)


def listed(directory: Path) -> Path:
    """Gives a directory a manifest that lists its weight files."""
    document = {"headers": {path.name: "" for path in directory.glob("*.safetensors")}}
    (directory / "solidify.json").write_text(json.dumps(document))
    return directory


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("large", [True, False])
def test_each_tensor_is_read_once(
    weights: Path, reads: list[str], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(direct, "LARGE", 1)
    wanted = digest_cache.digests(files_of(weights), fresh=True)
    assert sorted(reads) == ["a", "b", "c", "d", "none"]
    with ahead.begun(weights):
        assert digest_cache.digests(files_of(weights), fresh=True) == wanted
    assert len(reads) == 5
    assert digest_cache.digests(files_of(weights), fresh=True) == wanted
    assert len(reads) == 10
    assert not any(thread.name.startswith("digesting") for thread in threading.enumerate())


def test_the_words_for_dtypes_are_torchs_own() -> None:
    assert {word: str(dtype) for word, dtype in format.DTYPES.items()} == header.DTYPE_NAMES


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_a_spoilt_byte_is_found(weights: Path, reads: list[str], name: str) -> None:
    wanted = digest_cache.digests(files_of(weights), fresh=True)
    spoil(weights, name)
    time.sleep(0.1)
    reads.clear()
    with ahead.begun(weights):
        found = digest_cache.digests(files_of(weights), fresh=True)
    assert not reads
    assert {key for key in wanted if wanted[key] != found[key]} == {name}


def spoil(directory: Path, name: str) -> None:
    """Changes the last byte of a tensor."""
    entry = next(e for path in files_of(directory) for e in format.read_header(path).values() if e.name == name)
    with entry.file.open("r+b") as file:
        file.seek(entry.start + entry.shape.nbytes - 1)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))


def in_place(directory: Path) -> None:
    spoil(directory, "b")


def with_its_time_set_back(directory: Path) -> None:
    before = (directory / "1.safetensors").stat()
    spoil(directory, "b")
    os.utime(directory / "1.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))


def by_another_file(directory: Path) -> None:
    other = directory / "other"
    other.write_bytes((directory / "1.safetensors").read_bytes())
    (directory / "1.safetensors").rename(directory / "old")
    other.rename(directory / "1.safetensors")
    spoil(directory, "b")


@pytest.mark.parametrize("change", [in_place, with_its_time_set_back, by_another_file])
def test_a_file_that_changes_meanwhile_is_read_again(
    weights: Path, reads: list[str], change: Callable[[Path], None]
) -> None:
    wanted = digest_cache.digests(files_of(weights), fresh=True)
    reads.clear()
    with ahead.begun(weights):
        change(weights)
        found = digest_cache.digests(files_of(weights), fresh=True)
    assert {key for key in wanted if wanted[key] != found[key]} == {"b"}
    assert sorted(reads) == ["a", "b", "none"]


def test_a_file_that_was_just_written_is_left_to_later(tmp_path: Path, reads: list[str]) -> None:
    save_file({"a": torch.randn(4)}, tmp_path / "new.safetensors")
    with ahead.begun(listed(tmp_path)):
        digest_cache.digests(files_of(tmp_path), fresh=True)
    assert reads == ["a"]


@pytest.mark.parametrize("manifest", ["1.safetensors", "", None, "[]", '{"headers": ["2.safetensors"]}', "pipe"])
def test_a_file_that_no_manifest_lists_is_not_opened(
    weights: Path, manifest: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check refuses it before anything of it is read: its header may be as large as memory."""
    (weights / "solidify.json").unlink()
    if manifest == "pipe":
        os.mkfifo(weights / "solidify.json")
    elif manifest is not None:
        text = json.dumps({"headers": {manifest: ""}}) if manifest == "1.safetensors" else manifest
        (weights / "solidify.json").write_text(text)
    opened: list[str] = []
    read = ahead._read_parts
    monkeypatch.setattr(ahead, "_read_parts", lambda path, state: opened.append(path.name) or read(path, state))
    with ahead.begun(weights):
        pass
    assert opened == (["1.safetensors"] if manifest == "1.safetensors" else [])


def lying(document: object, content: bytes = bytes(16)) -> bytes:
    text = json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + content


UNREADABLE = {
    "no header": b"",
    "a header that is longer than the file": struct.pack("<Q", 2**60) + b"{}",
    "no document": struct.pack("<Q", 3) + b"[1]" + bytes(4),
    "no record": lying({"a": 3}),
    "another dtype": lying({"a": {"dtype": "Q4", "shape": [4], "data_offsets": [0, 16]}}),
    "more than there is": lying({"a": {"dtype": "U8", "shape": [2**50], "data_offsets": [0, 2**50]}}),
    "a negative offset": lying({"a": {"dtype": "U8", "shape": [16], "data_offsets": [-(2**40), 16]}}),
    "words for numbers": lying({"a": {"dtype": "U8", "shape": "ab", "data_offsets": ["x", "y"]}}),
    "a list in a shape": lying({"a": {"dtype": "U8", "shape": [[16]], "data_offsets": [0, 16]}}),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_told_by_who_reads_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(UNREADABLE[kind])
    time.sleep(0.1)
    with pytest.raises(ArtifactError) as plain:
        digest_cache.digests([path], fresh=True)
    with ahead.begun(listed(tmp_path)), pytest.raises(ArtifactError) as found:
        digest_cache.digests([path], fresh=True)
    assert str(found.value) == str(plain.value)


def test_pipes_links_and_directories_are_passed_over(weights: Path, reads: list[str]) -> None:
    os.mkfifo(weights / "pipe.safetensors")
    (weights / "link.safetensors").symlink_to("1.safetensors")
    (weights / "directory.safetensors").mkdir()
    with ahead.begun(listed(weights)):
        digest_cache.digests([weights / "1.safetensors", weights / "2.safetensors"], fresh=True)
    assert not reads
    with ahead.begun(weights / "nowhere"):
        pass


def test_who_leaves_early_waits_for_a_step_at_most(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object) -> Iterator[memoryview]:
        while True:
            yield memoryview(bytes(8))

    monkeypatch.setattr(direct.Source, "pieces", endless)
    with pytest.raises(KeyboardInterrupt), ahead.begun(weights):
        raise KeyboardInterrupt
    assert not any(thread.name.startswith("digesting") for thread in threading.enumerate())
    assert not ahead._begun


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("spoilt", [True, False])
def test_a_check_runs_nothing_of_a_spoilt_artifact(
    wrapped_artifact: Path,
    copy_of: Callable[[Path], Path],
    layer: int,
    spoilt: bool,
    monkeypatch: pytest.MonkeyPatch,
    reads: list[str],
) -> None:
    directory = copy_of(wrapped_artifact)
    name = f"model.layers.{layer}.self_attn.v_proj.weight"
    if spoilt:
        spoil(directory, name)
    time.sleep(0.1)
    run: list[Path] = []
    monkeypatch.setattr(certificate, "witness", lambda own, _: run.append(own) or [])
    monkeypatch.setattr(checks, "serving", lambda *_: [])
    with ahead.begun(directory):
        report = checks.check(directory)
    assert not reads
    assert report.passed != spoilt
    assert len(run) == (not spoilt)
    if spoilt:
        assert f"the tensor {name} is not the one that was written" in report.failed[0].evidence


def test_a_file_that_another_takes_the_place_of_is_not_taken_for_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directories that exchange names leave every file its times."""
    other = weights.with_name("other")
    shutil.copytree(weights, other)
    spoil(other, "a")
    time.sleep(0.1)
    wanted = digest_cache.digests(files_of(weights), fresh=True)
    digest, begin = ahead._digest_part, threading.Event()
    monkeypatch.setattr(ahead, "_digest_part", lambda *given: begin.wait() and digest(*given))
    with ahead.begun(weights):
        weights.rename(weights.with_name("away"))
        other.rename(weights)
        begin.set()
        for future in ahead._begun.values():
            future.result()
        weights.rename(other)
        weights.with_name("away").rename(weights)
        assert digest_cache.digests(files_of(weights), fresh=True) == wanted


@pytest.mark.parametrize("number", ["Infinity", "1e999", "NaN", "-5"])
def test_numbers_in_a_header_that_are_none_are_left_to_others(tmp_path: Path, number: str) -> None:
    for place in ('"shape": [{}], "data_offsets": [0, 8]', '"shape": [2], "data_offsets": [0, {}]'):
        header = f'{{"a": {{"dtype": "F32", {place.format(number)}}}}}'.encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        time.sleep(0.1)
        with ahead.begun(tmp_path), pytest.raises(ArtifactError):
            digest_cache.digests(files_of(tmp_path), fresh=True)


def test_links_that_lead_in_a_circle_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with ahead.begun(tmp_path / "a"):
        assert not ahead._begun
