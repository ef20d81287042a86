"""What the objective logs, read back from the files of the tools that `report_to` names: the real packages, offline."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from solidify import losses
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer
from training import arguments, in_order

STEPS = 2
Values = dict[str, list[float]]  # by metric, in the order of steps


def logit_size(logits: torch.Tensor) -> torch.Tensor:
    return logits.square().mean()


def train(directory: Path, report_to: str) -> Values:
    """Takes two steps that report to a tool; returns what the trainer logged."""
    terms = [Term("model"), Term(logit_size, 0.1), Term(losses.weight_penalty, 1e-3, name="penalty")]
    trainer = ObjectiveTrainer(
        model=pico.llama(),
        args=arguments(directory / "run", 2, 2, report_to=report_to, max_steps=STEPS, run_name="two-steps"),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=Objective(terms),
    )
    in_order(trainer)
    trainer.train()
    logged: Values = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if name == "loss" or name.startswith(("term/", "weighted/")):
                logged.setdefault(f"train/{name}", []).append(value)
    return logged


def compare(found: Values, logged: Values) -> None:
    """Every part of the objective arrived, with its value (single precision is what tensorboard keeps)."""
    names = [f"train/{kind}/{name}" for kind in ("term", "weighted") for name in ("model", "logit_size", "penalty")]
    assert sorted(logged) == sorted([*names, "train/loss"])
    for name in logged:
        assert len(logged[name]) == STEPS
        assert found[name] == pytest.approx(logged[name], rel=1e-6), name
    for step in range(STEPS):
        parts = [found[name][step] for name in names if "/weighted/" in name]
        assert math.fsum(parts) == pytest.approx(found["train/loss"][step], rel=1e-5)


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged = train(tmp_path, "tensorboard")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "events")).Reload()
    found = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [event.step for event in events.Scalars("train/term/model")] == [1, 2]
    compare(found, logged)


@pytest.mark.slow
def test_trackio(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    # trackio reads where its files go when it is imported, which other tests may have done: a process of its own.
    places = {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(Path(pico.__file__).parent)}
    command = [sys.executable, "-W", "ignore", __file__, str(tmp_path), "trackio"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **places})
    logged = json.loads((tmp_path / "logged.json").read_text())

    (database,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    found: Values = {}
    for _, metrics in rows:
        for name, value in json.loads(metrics).items():
            found.setdefault(name, []).append(value)
    compare(found, logged)


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    places = {f"WANDB_{name}_DIR": str(tmp_path / name.lower()) for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")}
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_DISABLE_GIT": "true"}
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), **places, **quiet}.items():
        monkeypatch.setenv(name, value)
    logged = train(tmp_path, "wandb")
    wandb.finish()
    wandb.teardown()  # ends its service process

    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found: Values = {}
    for record in records(file.read_bytes()):
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            found.setdefault(name, []).append(json.loads(item.value_json))
    compare(found, logged)


def records(content: bytes) -> Iterator[Any]:
    """Reads the file of an offline run (wandb 0.31): seven bytes, then records in blocks as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    block, header, place, pieces = 32768, 7, 7, b""
    assert content[:4] == b":W&B"
    while place + header <= len(content):
        if (left := block - place % block) < header:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        pieces += content[place + header : place + header + length]
        place += header + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield Record.FromString(pieces)
            pieces = b""


if __name__ == "__main__":
    (Path(sys.argv[1]) / "logged.json").write_text(json.dumps(train(Path(sys.argv[1]), sys.argv[2])))
