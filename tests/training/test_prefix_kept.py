"""What `cache_prefix` keeps, where, and for how long; and tensors that it cannot keep, or not tell."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen import Around, batches, both, put, small, train
from torch import nn

import solidify
from solidify.directory import ours
from solidify.errors import ObjectiveError
from solidify.system import disk
from solidify.weights import hashing


def test_files_of_others_are_refused_and_stay(tmp_path: Path) -> None:
    names = ("brain.activations.csv", "mine.activations", "a" * 64 + ".activations.old")
    for name in names:
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_text("mine")
        with (
            pytest.raises(ObjectiveError, match=f"holds what is no activations of frozen layers.*: {name}"),
            solidify.cache_prefix(small(), directory),
        ):
            pass
        assert (directory / name).read_text() == "mine"


def test_a_file_that_appears_in_between_stays(tmp_path: Path) -> None:
    plain, found, _ = both(
        tmp_path / "kept", between=lambda _: tmp_path.joinpath("kept").is_dir() and put_file(tmp_path / "kept")
    )
    assert found == plain
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.activations"]


def exchange(paths: list[Path]) -> None:
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)


def rewrite(make: Callable[[Any], Any], *, signed: bool) -> Callable[[list[Path]], None]:
    """Returns what writes another header into files, under a digest that is right or not."""

    def act(paths: list[Path]) -> None:
        for path in paths:
            digest, head, body = path.read_bytes().split(b"\n", 2)
            content = json.dumps(make(json.loads(head))).encode() + b"\n" + body
            path.write_bytes((hashing.digest_bytes(content).encode() if signed else digest) + b"\n" + content)

    return act


def put_directories(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()
        path.mkdir()


def write_no_text(paths: list[Path]) -> None:
    for path in paths:
        path.write_bytes(b"\xff\xfe")


SPOILT: dict[str, Callable[[list[Path]], None]] = {
    "exchanged": exchange,
    "a number for a header": rewrite(lambda _: 0, signed=True),
    "an empty header": rewrite(lambda _: {}, signed=True),
    "orders that are no lists": rewrite(lambda said: {**said, "orders": [1]}, signed=True),
    "another order": rewrite(lambda said: {**said, "orders": [[1, 0, 2]]}, signed=False),
    "a tuple": rewrite(lambda said: {**said, "alone": not said["alone"]}, signed=False),
    "no text": write_no_text,
    "directories": put_directories,
    "no directory": lambda paths: shutil.rmtree(paths[0].parent),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_spoilt_files_are_computed_again(fault: str, tmp_path: Path) -> None:
    directory = tmp_path / "kept"

    def spoil(_: Any) -> None:
        if directory.exists():
            SPOILT[fault](sorted(directory.iterdir()))

    plain, found, cached = both(directory, between=spoil)
    assert found == plain
    assert (cached.computed, cached.read) == (4, 2)


def put_file(directory: Path) -> None:
    (directory / "mine.activations").write_text("mine")


def spoil_directories(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


@pytest.mark.parametrize("spoil", [os.mkfifo, spoil_directories])
def test_what_stands_in_the_place_of_a_file_is_passed_over(spoil: Any, tmp_path: Path) -> None:
    def act(_: Any) -> None:
        for path in [*(tmp_path / "kept").glob("*")]:
            path.unlink()
            spoil(path)

    plain, found, cached = both(tmp_path / "kept", between=act)
    assert found == plain
    assert (cached.computed, cached.read) == (6, 0)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_two_trainings_share_a_directory(tmp_path: Path) -> None:
    plain, kept = train(small()), tmp_path / "kept"
    one, other = small(), small()
    with solidify.cache_prefix(one, kept) as first:
        assert train(one) == plain
        with solidify.cache_prefix(other, kept) as second:
            assert train(other) == plain
        assert len(list(kept.iterdir())) == 2
        assert train(small()) == plain
    assert (first.read, second.read) == (4, 5)
    assert not kept.exists()


def test_a_directory_that_goes_while_a_file_is_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, removed = disk.write, list[Path]()

    def write(path: Path, content: bytes) -> None:
        if not removed:
            removed.append(path)
            path.parent.rmdir()
        own(path, content)

    plain = train(small())
    monkeypatch.setattr(disk, "write", write)
    model = small()
    with solidify.cache_prefix(model, tmp_path / "kept") as cached:
        assert train(model) == plain
    assert (cached.computed, cached.read) == (2, 4)


ODD: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "a sparse or nested tensor"),
    "compressed": (lambda: torch.eye(4).to_sparse_csr(), "a sparse or nested tensor"),
    "meta": (lambda: torch.ones(3, device="meta"), "a tensor without numbers"),
    "bits": (lambda: torch.empty(4, dtype=vars(torch)["uint4"]), r"a tensor of torch\.uint4"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a sparse or nested tensor"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_tensors_whose_numbers_cannot_be_read_are_refused(kind: str, loose: bool, tmp_path: Path) -> None:
    make, said = ODD[kind]

    def prepare(model: Any) -> None:
        put(Around, 0)(model)
        if loose:
            model.model.layers[0].mlp.odd = make()
        else:
            model.model.layers[0].mlp.register_buffer("odd", make())

    with pytest.raises(ObjectiveError, match=rf"0\.mlp\.odd of the frozen layers (is|holds) {said}"):
        both(tmp_path / "kept", prepare)


class Sparse(Around):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).to_sparse()


class Double(Around):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).to(torch.complex128)


class Layer(Around):
    """Returns what another module makes of a layer's output."""

    def __init__(self, inner: nn.Module, made: nn.Module) -> None:
        super().__init__(inner)
        self.made = made

    def forward(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        found: torch.Tensor = self.made(self.inner(hidden_states, **more))
        return found


class Dense(Around):
    def forward(self, hidden_states: torch.Tensor, **more: Any) -> torch.Tensor:
        dense = hidden_states.to_dense() if hidden_states.is_sparse else hidden_states.real.float()
        found: torch.Tensor = self.inner(dense, **more)
        return found


@pytest.mark.parametrize(("kind", "said"), [(Sparse, "a sparse or nested tensor"), (Double, "torch.complex128")])
def test_outputs_that_cannot_be_written_are_refused(kind: type[Around], said: str, tmp_path: Path) -> None:
    def prepare(model: Any) -> None:
        model.model.layers[2] = Layer(model.model.layers[2], kind(nn.Identity()))
        model.model.layers[3] = Dense(model.model.layers[3])
        model.model.layers[3].self_attn = model.model.layers[3].inner.self_attn

    with pytest.raises(ObjectiveError, match=rf"model\.layers\.2 returns (a tensor of )?{said}, which is no plain"):
        both(tmp_path / "kept", prepare)


def test_layers_that_change_in_each_step_are_not_kept_for_ever(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    with solidify.cache_prefix(model, tmp_path / "kept", keep=True) as cached:
        for number in range(24):
            model.model.layers[0].step = number
            model(**batches(2)[number % 2])
    assert (cached.computed, cached.read) == (16, 0)
    assert len(list((tmp_path / "kept").iterdir())) == 16
    assert capsys.readouterr().err.count("is kept any more") == 1


def test_layers_that_change_in_each_epoch_are_not_kept_for_ever(tmp_path: Path) -> None:
    model, data = small(), batches(20)
    with solidify.cache_prefix(model, tmp_path / "kept", keep=True) as cached, torch.no_grad():
        with torch.enable_grad():
            model(**data[0])
        for number in range(4):
            model.model.layers[0].step = number
            for batch in data:
                model(**batch)
    assert cached.read == 0
    assert 40 < len(list((tmp_path / "kept").iterdir())) <= 43


def test_layers_that_change_once_are_read_again(tmp_path: Path) -> None:
    model, data = small(), batches(20)
    with solidify.cache_prefix(model, tmp_path / "kept", keep=True) as cached, torch.no_grad():
        with torch.enable_grad():
            model(**data[0])
        for number in range(3):
            model.model.layers[0].step = number > 0
            for batch in data:
                model(**batch)
    assert cached.read == 20


def test_calls_of_ever_other_kinds_run_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, calls = small(), list[int]()
    model.model.layers[3].register_forward_hook(lambda *_: calls.append(1))
    with solidify.cache_prefix(model, tmp_path / "kept"):
        for number in range(36):
            model.number = number
            model(**batches(1)[0])
    assert len(calls) == 32 * 3 + 4
    assert capsys.readouterr().err.count("kinds of call were compared, and others run plainly") == 1


@pytest.mark.parametrize("name", ["mine.activations", "a" * 64 + ".activations.csv", "a" * 64])
def test_checkpoints_with_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / ours.PREFIX).mkdir()
    (tmp_path / ours.PREFIX / ("b" * 64 + ours.ACTIVATIONS)).write_text("ours")
    assert ours.in_checkpoints(tmp_path) == []
    (tmp_path / ours.PREFIX / name).write_text("mine")
    assert ours.in_checkpoints(tmp_path) == [f"prefix/{name} is no activations that a trainer keeps"]


class ByMode(Around):
    """Returns something else where no graph is built, or what it is given asks for no gradient."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        found = super().forward(hidden_states)
        return found if torch.is_grad_enabled() else found * (3 if torch.is_inference_mode_enabled() else 2)


def pass_in_modes(model: Any) -> list[float]:
    """Runs batches with a graph, and again without."""
    found = []
    for number, mode in ((0, torch.enable_grad), (2, torch.no_grad), (0, torch.no_grad), (0, torch.inference_mode)):
        with mode():
            found += [model(**batch).loss.item() for batch in batches()[number:]]
    return found


def test_each_gradient_mode_is_kept_by_itself(tmp_path: Path) -> None:
    plain, model = pass_in_modes(small(put(ByMode, 0))), small(put(ByMode, 0))
    with solidify.cache_prefix(model, tmp_path / "kept"):
        assert pass_in_modes(model) == plain


def call_otherwise(model: Any, how: str) -> Iterator[Any]:
    """Yields what a model returns for two batches, in turn; from the second round on more is asked of it."""
    for step in range(6):
        batch, asked = batches(2)[step % 2], step > 1
        if how == "a setting":
            model.config.output_hidden_states = asked
            yield model(**batch)
        elif how == "an attribute":
            model.asked = asked
            yield model(**batch, layer=0)
        elif how == "by position":
            yield model(batch["input_ids"], batch["attention_mask"], batch["labels"], 2 if asked else 0)
        else:
            layer: Any = {"an integer": int(asked), "a list": [1] if asked else []}[how]
            yield model(**batch, layer=layer)


@pytest.mark.parametrize("how", ["a setting", "an attribute", "by position", "an integer", "a list"])
def test_a_call_that_asks_for_more_is_another_kind(how: str, tmp_path: Path) -> None:
    model = small()
    if how != "a setting":
        own = model.forward

        def forward(input_ids: Any, attention_mask: Any, labels: Any, layer: Any = 0) -> Any:
            asked = bool(layer) or getattr(model, "asked", False)
            return own(input_ids, attention_mask, labels=labels, output_hidden_states=asked)

        model.forward = forward
    with (
        pytest.raises(ObjectiveError, match=r"returns another hidden_states.*leave output_hidden_states out"),
        solidify.cache_prefix(model, tmp_path / "kept"),
    ):
        for output in call_otherwise(model, how):
            output.loss.backward()
