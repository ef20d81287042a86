"""Files of tensors, byte by byte: what is refused, and that pieces make the whole."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solidify.artifact import tensors
from solidify.errors import ArtifactError
from solidify.weights import format
from solidify.weights.format import Entry, Shape, TensorSource


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return dict(json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]]))


def rewrite(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_pieces_and_values_make_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format, "CHUNK", 100)
    tensor = torch.randn(7, 9, dtype=torch.bfloat16)
    save_file({"a": torch.randn(3), "b": tensor}, tmp_path / "x.safetensors")
    entry = format.read_header(tmp_path / "x.safetensors")["b"]
    assert torch.equal(entry.read(), tensor)
    assert b"".join(bytes(format.bytes_of(piece)) for piece in entry.pieces()) == bytes(format.bytes_of(tensor))
    assert torch.equal(torch.cat(list(entry.values(10))), tensor.flatten())
    assert entry.digest() == tensors.digest(tensor)


def test_a_file_is_written_from_pieces_of_several_tensors(tmp_path: Path) -> None:
    a, b = torch.randn(4, 6), torch.randn(10).half()

    def pieces() -> Any:
        yield "a", a[:1]
        yield "b", b[:5]
        yield "a", a[1:]
        yield "b", b[5:]

    source = TensorSource({"a": Shape.of(a), "b": Shape.of(b)}, pieces)
    digests = format.write_file(tmp_path / "x.safetensors", [source])
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["a"], a) and torch.equal(found["b"], b)
    assert digests == {"a": tensors.digest(a), "b": tensors.digest(b)}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.complex128]
)
def test_the_same_bits_are_no_equal_numbers(dtype: torch.dtype) -> None:
    """A NaN is itself, and zeros have signs; what memory they have does not count."""
    nan, zero = torch.full((2, 3), float("nan")).to(dtype), torch.zeros(2, 3).to(dtype)
    assert format.same_bits(nan, nan.clone()) and format.same_bits(zero, torch.zeros(3, 2).to(dtype).T)
    assert not format.same_bits(zero, (-torch.zeros(2, 3)).to(dtype))
    assert not format.same_bits(zero, zero.flatten()) and not format.same_bits(
        zero, torch.zeros(2, 3, dtype=torch.int8)
    )


def test_tensors_without_numbers_or_of_truth_values_have_the_same_bits() -> None:
    assert format.same_bits(torch.empty(0, 3), torch.empty(0, 3)) and format.same_bits(torch.ones(()), torch.ones(()))
    assert not format.same_bits(torch.tensor([True]), torch.tensor([False]))


@pytest.mark.parametrize(("rows", "words"), [(3, "too few values came for a"), (5, "more values came for a")])
def test_a_supply_gives_what_it_said(tmp_path: Path, rows: int, words: str) -> None:
    source = TensorSource({"a": Shape(torch.float32, (4, 6))}, lambda: iter([("a", torch.randn(rows, 6))]))
    with pytest.raises(ArtifactError, match=words):
        format.write_file(tmp_path / "x.safetensors", [source])


def test_what_is_no_whole_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(4, 4), "b": torch.randn(4)}, path)
    content, header = path.read_bytes(), header_of(path)
    data = content[-80:]
    cases: dict[str, bytes] = {"its header is longer than the file": content[:6] + b"\xff\xff" + content[8:]}
    cases["it is truncated"] = content[:-1]
    cases["1 bytes follow its last tensor"] = content + b"x"
    for words, broken in cases.items():
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=words):
            format.read_header(path)
    for name, values, words in (
        ("a", {"data_offsets": [0, 60]}, "a has 60 bytes and not 64"),
        ("b", {"data_offsets": [48, 64]}, "b does not start where the tensor before it ends"),
        ("a", {"dtype": "F3"}, "KeyError: 'F3'"),
    ):
        rewrite(path, {**header, name: {**header[name], **values}}, data)
        with pytest.raises(ArtifactError, match=words):
            format.read_header(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(40, 40)}, path)
    entry = format.read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="ends within a: it is truncated"):
        entry.read()


@pytest.mark.parametrize("fails_after", [None, 0, 1])
def test_the_kernel_moves_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_after: int | None
) -> None:
    """Under another name and at another place, bit for bit; where it cannot, the bytes are written."""
    monkeypatch.setattr(format, "_MOVED", 64)
    tensor, other = torch.randn(13, 9), torch.randn(5).half()
    save_file({"a": torch.randn(3), "b": tensor}, tmp_path / "x.safetensors")
    entry = format.read_header(tmp_path / "x.safetensors")["b"]
    copied, told = os.copy_file_range, list[int]()
    calls = []

    def copy(*given: Any) -> int:
        calls.append(given)
        if fails_after is not None and len(calls) > fails_after:
            raise OSError(errno.EXDEV, "not between these")
        return copied(*given)

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(Entry, "pieces", refuse_reading) if fails_after is None else None
    moved = TensorSource.stored("renamed", entry, tensors.digest(tensor))
    digests = format.write_file(tmp_path / "y.safetensors", [TensorSource.made("new", other), moved], told.append)
    found = load_file(tmp_path / "y.safetensors")
    assert torch.equal(found["renamed"], tensor) and torch.equal(found["new"], other)
    assert digests == {"new": tensors.digest(other), "renamed": tensors.digest(tensor)}
    assert sum(told) == tensor.nbytes + other.nbytes and calls


def refuse_reading(entry: Entry) -> Any:
    raise AssertionError(f"{entry.name} was read")


def test_a_move_from_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.randn(300)}, tmp_path / "x.safetensors")
    entry = format.read_header(tmp_path / "x.safetensors")["a"]
    os.truncate(tmp_path / "x.safetensors", entry.start + 100)
    with pytest.raises(ArtifactError, match="ends within a: it is truncated"):
        format.write_file(tmp_path / "y.safetensors", [TensorSource.stored("a", entry, "0")])
