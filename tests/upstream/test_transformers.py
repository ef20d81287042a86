"""The private names of transformers are there, and mean what the package takes them for."""

from __future__ import annotations

import inspect
from typing import Any

import installed
import pytest
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer
from trl.experimental.gkd import GKDTrainer

from solidify.upstream import transformers as seams

TRAINERS = (Trainer, SFTTrainer, DPOTrainer, GKDTrainer)


def test_it_is_the_version_that_was_read() -> None:
    installed.same_minor("transformers", seams.TESTED)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_get_train_sampler", ("self", "train_dataset")),
        ("_save_checkpoint", ("self", "model", "trial")),
        ("_load_optimizer_and_scheduler", ("self", "checkpoint")),
        ("_prepare_inputs", ("self", "inputs")),
        ("_get_output_dir", ("self", "trial")),
        ("_save", ("self", "output_dir", "state_dict")),
        ("save_model", ("self", "output_dir", "_internal_call")),
    ],
)
def test_trainers_have_these_methods(trainer: type, name: str, parameters: tuple[str, ...]) -> None:
    installed.same_parameters(trainer, name, parameters)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_trainer_has_our_names_for_them(trainer: type) -> None:
    ours = {name for name in vars(seams.TrainerSeams) if not name.startswith("_")}
    assert ours == {"train_sampler", "write_checkpoint", "load_progress"}
    assert not {name for name in ours if hasattr(trainer, name)}


def test_trainers_call_the_private_methods() -> None:
    """What we override has an effect only where transformers still goes through it."""
    whole = inspect.getsource(Trainer)
    for call in ("self._save_checkpoint(model, trial)", "self._load_optimizer_and_scheduler(", "_get_train_sampler,"):
        assert call in whole, f"transformers' Trainer no longer says {call}: the override in upstream/ has no effect"


def test_an_override_stands_before_the_trainers_own() -> None:
    calls: list[Any] = []

    class Base:
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            calls.append(("base", model, trial))

    class Ours(seams.TrainerSeams, Base):
        def write_checkpoint(self, model: Any, trial: Any) -> None:
            calls.append("before")
            super().write_checkpoint(model, trial)

    Ours()._save_checkpoint("model", None)
    assert calls == ["before", ("base", "model", None)]
