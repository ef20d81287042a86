"""What the system says of mapped memory is what is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from solidify.artifact import tensors
from solidify.weights import digest_cache, format, mapped, spilling

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is known, and tensors are read")


@pytest.fixture
def module(tmp_path: Path) -> nn.Module:
    """A module whose parameters are mapped from a file."""
    module = nn.Linear(64, 64)
    save_file({name: t.detach() for name, t in module.named_parameters()}, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        for name, parameter in module.named_parameters():
            parameter.data = file.get_tensor(name)
    return module


def test_a_mapped_tensor_is_found_in_its_file(module: nn.Module, tmp_path: Path) -> None:
    entries = format.read_header(tmp_path / "m.safetensors")
    regions = mapped.file_regions(module.state_dict())
    assert regions == {name: (tmp_path / "m.safetensors", entry.start) for name, entry in entries.items()}


@pytest.mark.parametrize("write", [lambda w: w.detach().mul_(2), lambda w: w.detach().numpy().fill(0)])
def test_what_was_written_to_is_no_part_of_the_file(module: nn.Module, write: object) -> None:
    assert callable(write)
    write(module.weight)
    assert "weight" not in mapped.file_regions(module.state_dict())
    assert tensors.digests_where_they_stand(module.state_dict())["weight"] == tensors.digest(module.weight)


def test_what_was_written_to_is_told_from_what_shares_its_page(module: nn.Module) -> None:
    regions = mapped.file_regions(module.state_dict())
    assert not any(mapped.differs_from_file(parameter, regions[name]) for name, parameter in module.named_parameters())
    module.bias.detach().numpy()[3] += 1  # 256 bytes before or behind the weight
    assert mapped.differs_from_file(module.bias, regions["bias"])
    assert mapped.file_regions(module.state_dict()) == {"weight": regions["weight"]}
    assert not mapped.differs_from_file(module.weight, regions["weight"])
    last = float(module.weight.detach()[-1, -1])
    module.weight.detach().numpy()[-1, -1] = last + 1
    assert mapped.differs_from_file(module.weight, regions["weight"])
    assert mapped.file_regions(module.state_dict()) == {}
    module.weight.detach().numpy()[-1, -1] = last
    assert mapped.file_regions(module.state_dict()) == {"weight": regions["weight"]}


@pytest.mark.parametrize("view", [torch.conj, lambda t: torch._neg_view(t)])
def test_what_is_read_otherwise_than_it_stands_is_no_part_of_the_file(tmp_path: Path, view: object) -> None:
    assert callable(view)
    save_file({"a": torch.randn(64, 64, dtype=torch.complex64)}, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        tensor = file.get_tensor("a")
    assert list(mapped.file_regions({"plain": tensor, "view": view(tensor)})) == ["plain"]


def test_other_memory_is_no_part_of_a_file(module: nn.Module, tmp_path: Path) -> None:
    assert mapped.file_regions({"made": torch.randn(8, 8), "turned": module.weight.T, "empty": torch.empty(0)}) == {}
    (tmp_path / "m.safetensors").unlink()
    assert mapped.file_regions(module.state_dict()) == {}


def test_digests_come_from_the_file_without_reading_memory(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tensors.digests(module.state_dict().items())
    monkeypatch.setattr(tensors, "digest", lambda _: "read")
    assert tensors.digests_where_they_stand(module.state_dict()) == expected


def test_what_stands_where_it_stood_is_the_same_unread(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tensors.standing(module.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "digest", lambda _: pytest.fail("read"))
        patch.setattr(format.Entry, "digest", lambda _: pytest.fail("read"))
        now = tensors.standing(module.state_dict())
        assert all(tensors.are_same(before[name], now[name]) for name in before)
    assert not tensors.are_same(before["weight"], before["bias"])


def test_what_stands_elsewhere_is_compared_by_its_bytes(module: nn.Module, tmp_path: Path) -> None:
    before = tensors.standing(module.state_dict())
    module.weight.data = module.weight.data.clone()
    assert tensors.are_same(before["weight"], tensors.standing(module.state_dict())["weight"])
    with torch.no_grad():
        module.weight[3, 5] += 1e-6
        module.bias[2] += 1e-6
    now = tensors.standing(module.state_dict())
    assert not tensors.are_same(before["weight"], now["weight"])
    assert not tensors.are_same(before["bias"], now["bias"])


def test_a_file_that_was_written_to_is_not_the_same(module: nn.Module, tmp_path: Path) -> None:
    before = tensors.standing(module.state_dict())
    with (tmp_path / "m.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    now = tensors.standing(module.state_dict())
    assert not any(tensors.are_same(before[name], now[name]) for name in before)
    assert not tensors.are_same(before["weight"], tensors.digest(module.weight))


def test_memory_that_is_given_back_comes_again(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = module.weight.clone()
    inputs = torch.randn(3, 64)
    expected = module(inputs)
    monkeypatch.setattr(mapped, "_MUCH", 0)
    mapped.release([module])
    with mapped.released(module):
        assert torch.equal(module(inputs), expected)
    assert torch.equal(module.weight, before)


def test_what_was_written_to_is_never_given_back(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system would put the file's values there again."""
    with torch.no_grad():
        module.weight.add_(1)
    before = module.weight.clone()
    monkeypatch.setattr(mapped, "_MUCH", 0)
    mapped.release([module])
    with mapped.released(module):
        module(torch.randn(3, 64))
    assert torch.equal(module.weight, before)


def test_new_tensors_are_spilled_and_old_ones_are_not(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spilling, "_SMALL", 0)
    new = nn.Sequential(module, nn.Linear(8, 8))
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    kept = list(module.state_dict(keep_vars=True).values())
    spilling.spill("here", new, kept, None)  # nobody said where to
    assert "1.weight" not in mapped.file_regions(new.state_dict())
    (tmp_path / "spilled").mkdir()
    spilling.spill("here", new, kept, tmp_path / "spilled")
    (file,) = (tmp_path / "spilled").iterdir()
    assert set(digest_cache.digests([file])) == {"here.1.weight", "here.1.bias"}
    assert mapped.file_regions(new.state_dict())["1.weight"][0] == file
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def test_memory_that_writes_to_its_file_is_no_part_of_it(tmp_path: Path) -> None:
    """What is written to a shared mapping changes the file, too, and shows in no page."""
    (tmp_path / "f").write_bytes(bytes(4096))
    tensors_of = {shared: torch.from_file(str(tmp_path / "f"), shared=shared, size=1024) for shared in (True, False)}
    assert mapped.file_regions({"private": tensors_of[False]}) and not mapped.file_regions({"shared": tensors_of[True]})
