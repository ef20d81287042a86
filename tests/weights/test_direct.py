"""Files that pass the page cache hold what they are given, wherever their tensors begin and end."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solidify.artifact import tensors
from solidify.errors import ArtifactError
from solidify.weights import direct, format, transfer
from solidify.weights.format import TensorSource


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LARGE", 1)
    monkeypatch.setattr(direct, "_LITTLE", 1)
    monkeypatch.setattr(direct, "STEP", 3 * 4096)
    monkeypatch.setattr(format, "CHUNK", 5000)
    monkeypatch.setattr(transfer, "_PART", 4 * 4096)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that went past the cache, by call."""
    counts: list[int] = []
    for name in ("preadv", "pwrite"):
        plain = getattr(os, name)

        def count(descriptor: int, *given: Any, plain: Any = plain) -> int:
            import fcntl

            done: int = plain(descriptor, *given)
            counts.extend([done] if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT else [])
            return done

        monkeypatch.setattr(os, name, count)
    return counts


def numbers(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


@pytest.mark.parametrize("seed", range(6))
def test_what_is_written_is_what_is_read(tmp_path: Path, passed: list[int], seed: int) -> None:
    """Tensors of any number of bytes, moved from another file, from memory, and in pieces that come mixed."""
    chance = random.Random(seed)
    sizes = [chance.choice([0, 1, 4095, 4096, 4097, chance.randrange(1, 60_000)]) for _ in range(9)]
    old = {f"old{i}": numbers(n) for i, n in enumerate(sizes)}
    new, first, second = numbers(chance.randrange(1, 60_000)), numbers(20_001), numbers(9_999)
    save_file(old, tmp_path / "old.safetensors")
    entries = format.read_header(tmp_path / "old.safetensors")

    def mixed() -> Any:
        for begin in range(0, 20_001, 7_000):
            yield "first", first[begin : begin + 7_000]
            yield "second", second[begin // 2 : begin // 2 + 3_500]

    shapes = {"first": format.Shape.of(first), "second": format.Shape.of(second)}
    sources = [TensorSource.stored(f"moved.{n}", e, tensors.digest(old[n])) for n, e in entries.items()]
    sources += [TensorSource.stored(f"read.{n}", e) for n, e in entries.items()]
    sources += [TensorSource.made("new", new), TensorSource(shapes, mixed)]
    chance.shuffle(sources)
    told: list[int] = []
    digests = format.write_file(tmp_path / "new.safetensors", sources, told.append)
    found = load_file(tmp_path / "new.safetensors")
    wanted = {f"{how}.{name}": tensor for name, tensor in old.items() for how in ("moved", "read")}
    wanted |= {"new": new, "first": first, "second": second}
    assert found.keys() == wanted.keys() == digests.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert digests == {name: tensors.digest(tensor) for name, tensor in wanted.items()}
    assert sum(told) == sum(tensor.nbytes for tensor in wanted.values())
    written = format.read_header(tmp_path / "new.safetensors")
    assert {name: entry.digest() for name, entry in written.items()} == digests
    assert all(torch.equal(entry.read(), wanted[name]) for name, entry in written.items())
    assert sum(passed) > 4096


@pytest.mark.parametrize("size", [1, 4096, 16_384, 100_003])
def test_a_copy_is_the_file(tmp_path: Path, passed: list[int], size: int) -> None:
    (tmp_path / "a").write_bytes(content := random.Random(size).randbytes(size))
    transfer.link_or_copy(tmp_path / "a", tmp_path / "b", link=False)
    assert (tmp_path / "b").read_bytes() == content
    assert bool(passed) == (size >= 4096)


def test_a_file_that_is_cut_says_so(tmp_path: Path) -> None:
    save_file({"a": numbers(50_000)}, tmp_path / "x.safetensors")
    entry = format.read_header(tmp_path / "x.safetensors")["a"]
    os.truncate(tmp_path / "x.safetensors", 30_000)
    with pytest.raises(ArtifactError, match="ends within a: it is truncated"):
        entry.digest()
    with pytest.raises(ArtifactError, match="ends within a: it is truncated"):
        entry.read()


@pytest.mark.parametrize("what", ["no file is opened", "no call is taken", "nothing is reserved"])
def test_without_it_all_goes_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A file system may not open a file so, may want other blocks, and may not know how to reserve them."""
    import fcntl

    opened = os.open

    def refuse(path: Any, flags: int, *given: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *given)

    if what == "no file is opened":
        monkeypatch.setattr(os, "open", refuse)
    elif what == "nothing is reserved":
        monkeypatch.setattr(direct.ctypes, "CDLL", lambda *_, **__: object())
    else:
        for name in ("preadv", "pwrite"):
            plain = getattr(os, name)

            def call(descriptor: int, *given: Any, plain: Any = plain) -> Any:
                if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                    raise OSError(errno.EINVAL, "Invalid argument")
                return plain(descriptor, *given)

            monkeypatch.setattr(os, name, call)
    tensor = numbers(77_777)
    format.write_file(tmp_path / "x.safetensors", [TensorSource.made("a", tensor)])
    entry = format.read_header(tmp_path / "x.safetensors")["a"]
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensor)
    assert entry.digest() == tensors.digest(tensor) and torch.equal(entry.read(), tensor)


def test_a_full_disk_is_told_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct, "_reserve", refuse)
    with pytest.raises(ArtifactError, match=r"the disk became full: .* 0 B were written"):
        format.write_file(tmp_path / "x.safetensors", [TensorSource.made("a", numbers(77_777))])
