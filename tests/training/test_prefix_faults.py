"""What would make a training with `cache_prefix` another than the plain one is refused, or computed anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

import solidify
from solidify.errors import ObjectiveError
from solidify.training.prefix import CachedPrefix
from solidify.weights import hashing

Act = Callable[[Any], Any]


def nothing(_: Any) -> None:
    """Leaves a model as it is."""


def small(prepare: Act = nothing) -> Any:
    """A model of which the attention of the last layer learns."""
    torch.manual_seed(0)
    model = pico.llama(num_hidden_layers=4)
    model.config.use_cache = False
    prepare(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.model.layers[3].self_attn.parameters():
        parameter.requires_grad_(True)
    return model.train()


def train(model: Any, between: Act = nothing, after: int = 1) -> list[float]:
    """Six steps over two batches in turn; `between` acts on the model after one of them."""
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.5)
    torch.manual_seed(2)
    batches = [pico.collate(pico.ragged(3, seed=seed)) for seed in range(2)]
    found = []
    for step in range(6):
        loss = model(**batches[step % 2]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        if step == after:
            between(model)
    return found


def both(
    directory: Path, prepare: Act = nothing, between: Act = nothing, after: int = 1
) -> tuple[list[float], list[float], CachedPrefix]:
    """Trains plainly and with a prefix; returns the losses of both."""
    plain = train(small(prepare), between, after)
    model = small(prepare)
    with solidify.cache_prefix(model, directory) as cached:
        return plain, train(model, between, after), cached


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


def test_whole_files_are_read(tmp_path: Path) -> None:
    plain, found, cached = both(tmp_path / "kept")
    assert found == plain
    assert (cached.computed, cached.read) == (2, 4)


def test_a_file_for_a_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("x")
    with (
        pytest.raises(ObjectiveError, match=r"no directory can be made at .*a_file \(it is a file\)"),
        solidify.cache_prefix(small(), tmp_path / "a_file"),
    ):
        pass
