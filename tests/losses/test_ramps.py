"""A ramp moves numbers in buffers by a schedule, and what it moved is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from torch import nn

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.modules.dynamic_tanh import DynamicTanh
from solidify.objective.objective import Objective, Term
from solidify.objective.weights import Schedule
from solidify.training.trainer import ObjectiveTrainer
from training import arguments, in_order

TAPERS = [f"model.layers.{n}.input_layernorm.taper" for n in range(2)]


def tapered() -> Any:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.*.input_layernorm", DynamicTanh)
    return model, edits


def test_a_training_ramps_one_after_another_and_saves_it(tmp_path: Path) -> None:
    model, edits = tapered()
    pico.artifact(model, edits, tmp_path / "artifact")
    loaded = solidify.load(tmp_path / "artifact")
    tuned = solidify.attach(loaded, train=["model.layers.*.input_layernorm"])
    term = Term(losses.ramp, arguments={"buffers": "**.taper", "length": 4, "stagger": 1.0})
    seen: list[list[float]] = []
    acted = term.subject.after_step

    def watch(model: Any, means: torch.Tensor, step: int, steps: int) -> None:
        acted(model, means, step, steps)
        norms = [layer.input_layernorm.modules_to_save["default"] for layer in loaded.model.layers]
        seen.append([float(norm.taper) for norm in norms])

    term.subject.after_step = watch
    trainer = ObjectiveTrainer(
        model=tuned,
        args=arguments(tmp_path / "run", 4, 1, max_steps=6),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=Objective([Term("model"), term]),
    )
    in_order(trainer)
    trainer.train()
    schedule = Schedule(0.0, 1.0, "linear", 0, 4)
    expected = [[schedule.at(step + 1, 6), schedule.at(max(1, step + 1 - 2), 6)] for step in range(1, 7)]
    assert seen == [pytest.approx(values) for values in expected]
    assert seen[0][0] > 0 and seen[0][1] == 0 and seen[-1] == [1.0, 1.0]
    path = solidify.save_adapter(tuned, tmp_path / "adapter")
    again = solidify.load(tmp_path / "artifact", path)
    inputs = {"input_ids": pico.tokens()}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, tuned.eval()(**inputs).logits)
    with tuned.disable_adapter(), torch.no_grad():
        assert torch.equal(tuned(**inputs).logits, solidify.load(tmp_path / "artifact")(**inputs).logits)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("many", torch.zeros(3))
        self.register_buffer("whole", torch.zeros((), dtype=torch.long))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)
        self.register_buffer("good", torch.zeros(()))


@pytest.mark.parametrize(
    ("buffers", "words"),
    [
        ("**.nothing", "'\\*\\*.nothing' hits no buffer"),
        ("many", "many holds 3 numbers"),
        ("whole", "whole holds 1 numbers of torch.int64"),
        (["good", "unsaved"], "unsaved is not saved with the model; register it with persistent=True"),
    ],
)
def test_what_cannot_be_moved_is_refused(buffers: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        losses.ramp(buffers).bind(Counted())
    losses.ramp("good").bind(Counted())


@pytest.mark.parametrize("wrong", [{"shape": "cubic"}, {"stagger": 2.0}, {"length": 0}, {"end": "high"}])
def test_a_wrong_schedule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError):
        losses.ramp("good", **wrong)
