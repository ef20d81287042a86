"""The private names of transformers that the package uses, each under a name of ours.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TESTED = "5.23"


class TrainerSeams:
    """Stands before a Trainer among the bases: its private methods that we change, under names to override.

    A class after this one in the order of bases may be a trainer of TRL's, which overrides some of them itself.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.train_sampler(train_dataset)

    def train_sampler(self, train_dataset: Any = None) -> Any:
        """Returns the order of the training rows; there is no argument that takes a sampler."""
        return super()._get_train_sampler(train_dataset)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.write_checkpoint(model, trial)

    def write_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint and drops older ones; the callback `on_save` comes when they are gone."""
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self.load_progress(checkpoint)

    def load_progress(self, checkpoint: str | None) -> None:
        """Takes the optimizer and schedule back, once the model is loaded; no callback is called at that moment."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]


def prepare_inputs(trainer: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a batch where the model is, and gives it the dtype that DeepSpeed asks for, as the trainer does itself."""
    prepared: dict[str, Any] = trainer._prepare_inputs(dict(batch))
    return prepared


def shifts_labels(trainer: Any) -> bool:
    """Returns whether the model's own loss shifts labels, by which the trainer counts its target tokens."""
    return bool(trainer._loss_shifts_labels)


def output_directory(trainer: Any, trial: Any) -> str:
    """Returns where the trainer puts checkpoints: in a hyperparameter search, a directory for each trial."""
    return str(trainer._get_output_dir(trial=trial))


def write_model(trainer: Any, directory: str | None, state: Mapping[str, Any]) -> None:
    """Writes a model's files from a state that was gathered; the public `save_model` gathers the whole model."""
    trainer._save(directory, state_dict=state)
