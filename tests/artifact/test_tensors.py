from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from solidify.artifact import tensors
from solidify.errors import ArtifactError
from solidify.weights import checkpoint, digest_cache, format, store


def state() -> dict[str, torch.Tensor]:
    """Matrices with small tensors of odd size between them, as a module with a scalar buffer has them."""
    return {
        "a.bias": torch.randn(1),
        "b.weight": torch.randn(16, 16),
        "c.scale": torch.randn(()),
        "d.weight": torch.randn(8, 32).bfloat16(),
        "e.flags": torch.tensor([True, False, True]),
        "f.weight": torch.randn(2, 16, 16),
    }


def offsets(path: Path) -> dict[str, int]:
    """Returns where every tensor's bytes start in a file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def test_what_is_written_is_read_by_the_library_bit_for_bit(tmp_path: Path) -> None:
    original = {**state(), "transposed": torch.randn(16, 32).T, "empty": torch.zeros(0, 4)}
    store.store(original, tmp_path)
    found = load_file(tmp_path / checkpoint.WEIGHTS)
    assert set(found) == set(original)
    for name, tensor in original.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_every_matrix_starts_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    store.store(state(), tmp_path)
    ours = offsets(tmp_path / checkpoint.WEIGHTS)
    assert all(ours[name] % 64 == 0 for name, tensor in state().items() if tensor.ndim >= 2)
    save_file(state(), tmp_path / "plain.safetensors")
    plain = offsets(tmp_path / "plain.safetensors")
    assert any(plain[name] % 64 for name, tensor in state().items() if tensor.ndim >= 2)


def test_matrices_of_odd_size_stand_in_files_of_their_own(tmp_path: Path) -> None:
    odd = {f"{i}.weight": torch.randn(3, 5) for i in range(3)} | state()
    store.store(odd, tmp_path)
    paths = checkpoint.weight_files(tmp_path)
    assert len(paths) == 3
    for path in paths:
        for name, offset in offsets(path).items():
            assert odd[name].ndim < 2 or offset % 64 == 0
    assert digest_cache.digests(paths) == tensors.digests(odd.items())


def test_large_states_are_split_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", 2048)
    big = {f"{i}.weight": torch.randn(16, 16) for i in range(5)}
    store.store(big, tmp_path)
    index = json.loads((tmp_path / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    assert set(index["weight_map"]) == set(big)
    assert len(checkpoint.weight_files(tmp_path)) == 3


def test_tied_names_are_left_out_and_other_sharing_is_refused(tmp_path: Path) -> None:
    weight = torch.randn(4, 16)
    store.store({"embed.weight": weight, "head.weight": weight}, tmp_path, tied=["head.weight"])
    assert set(load_file(tmp_path / checkpoint.WEIGHTS)) == {"embed.weight"}
    with pytest.raises(ArtifactError, match=r"embed.weight and head.weight share memory"):
        store.store({"embed.weight": weight, "head.weight": weight}, tmp_path)


def test_a_digest_sees_dtype_shape_and_every_bit() -> None:
    tensor = torch.randn(4, 16)
    flipped = tensor.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    others = [tensor.view(16, 4), tensor.view(torch.int32), flipped, tensor.double()]
    assert len({tensors.digest(t) for t in [tensor, *others]}) == 5
    assert tensors.digest(tensor.T.contiguous().T) == tensors.digest(tensor)


def test_files_that_are_missing_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds neither"):
        checkpoint.weight_files(tmp_path)
    store.store(state(), tmp_path)
    content = (tmp_path / checkpoint.WEIGHTS).read_bytes()
    (tmp_path / checkpoint.WEIGHTS).write_bytes(content[:-40])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        digest_cache.digests(checkpoint.weight_files(tmp_path))
    (tmp_path / checkpoint.WEIGHTS).unlink()
    (tmp_path / checkpoint.INDEX).write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(ArtifactError, match=r"names gone.safetensors, which"):
        checkpoint.weight_files(tmp_path)
    (tmp_path / checkpoint.INDEX).write_text("{")
    with pytest.raises(ArtifactError, match="is not a safetensors index"):
        checkpoint.weight_files(tmp_path)


def test_realigning_follows_the_file_and_changes_no_value(tmp_path: Path) -> None:
    """Also where the file's own matrices are not aligned, as in most files of the hub."""
    module = torch.nn.Linear(16, 16)
    before = module.weight.detach().clone()
    save_file({"odd": torch.randn(3), "weight": before}, tmp_path / "plain.safetensors")
    entry = format.read_header(tmp_path / "plain.safetensors")["weight"]
    assert entry.start % 64
    tensors.realign({"weight": entry}, dict(module.named_parameters()))
    assert module.weight.data_ptr() % 64 == entry.start % 64
    assert torch.equal(module.weight, before)
