"""How the fresh process reads a large model: samples of every tensor, all of which the disk is asked for at once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from solidify.artifact import tensors, witness

SHAPES = [(1,), (), (0, 4), (3, 5), (2048,), (1500, 3), (700, 1024)]


def find_cached(path: Path, begin: int) -> bool:
    """Returns whether a page of a file is in the page cache, without reading it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], begin, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux says what is in its page cache")
def test_what_is_announced_is_fetched_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    size = 2**24
    save_file({"a": torch.arange(size, dtype=torch.int64)}, path)
    with safe_open(path, framework="pt") as file:
        mapped = file.get_tensor("a")
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)  # else its pages stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        start = path.stat().st_size - mapped.nbytes
        wanted = [start + begin for begin in witness._list_samples(mapped.nbytes)]
        if any(find_cached(path, begin) for begin in wanted[1:]):
            pytest.skip("this file system keeps its files in memory")
        witness._announce_pages([mapped])
        until = time.monotonic() + 20
        while not all(find_cached(path, begin) for begin in wanted) and time.monotonic() < until:
            time.sleep(0.01)
        assert all(find_cached(path, begin) for begin in wanted)
        assert not find_cached(path, start + mapped.nbytes // 8)
        assert torch.equal(mapped[-3:], torch.arange(size - 3, size))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "transposed", "meta"])
def test_samples_are_those_of_the_certificate(shape: tuple[int, ...], kind: str) -> None:
    tensor = torch.randn(shape)
    tensor = tensor.T if kind == "transposed" and tensor.ndim == 2 else tensor
    if kind == "meta":
        witness._announce_pages([tensor.to("meta"), tensor])
        assert witness._digest_pages(tensor.to("meta")) == "meta"
        return
    before = tensor.clone()
    witness._announce_pages([tensor])
    assert torch.equal(tensor, before)
    assert witness._digest_pages(tensor) == tensors.sample(tensor)


@pytest.mark.parametrize("size", [4096, 5000, 8192, 100_000])
@pytest.mark.parametrize("number", range(witness.SAMPLES))
def test_a_spoilt_byte_within_a_sample_is_found(size: int, number: int) -> None:
    tensor = torch.zeros(size, dtype=torch.uint8)
    before = witness._digest_pages(tensor)
    tensor[witness._list_samples(size)[number] + 7] = 1
    assert witness._digest_pages(tensor) != before
