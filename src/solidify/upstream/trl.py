"""The private names of TRL that the package uses, each under a name of ours, and those without documentation.

`TESTED` is the minor version that they were read and tried in; `tests/upstream/` compares each with the one installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer
from trl.chat_template_utils import has_generation_markers as has_generation_markers
from trl.data_utils import common_prefix_length as common_prefix_length
from trl.import_utils import suppress_experimental_warning as suppress_experimental_warning
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import RepeatSampler as RepeatSampler
from trl.trainer.utils import use_adapter as use_adapter

TESTED = "1.16"
UNDOCUMENTED = {
    "chat_template_utils.has_generation_markers": "whether a template marks it",
    "data_utils.common_prefix_length": "where a completion begins among the tokens of prompt and completion",
    "import_utils.suppress_experimental_warning": "GKD's home is `trl.experimental`, which the class that we give says",
    "trainer.utils.RepeatSampler": "the order of prompts, which a training that goes on takes up again",
    "trainer.utils.use_adapter": "KTO's reference is the model with another adapter, or none, as TRL switches it",
}


class _Redirection(_ForwardRedirection):  # type: ignore[misc]
    """TRL's way of running its loss inside the model's call, where the model's hooks see what the loss returns.

    A hook that adds to outputs (`solidify.add`) would add to the numbers that TRL takes apart; it adds to a dictionary.
    """

    def __call__(self, wrapper: Any, model: Any, method: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Calls a method in place of the model's forward."""
        kept = super().__call__(wrapper, model, lambda *a, **k: {"returned": method(*a, **k)}, *args, **more)
        return kept["returned"]


class AnsweringSeams:
    """Stands before a trainer whose rows are prompts among the bases: micro-batches are not answered a second time.

    TRL has no public method between the writing of answers and the loss.
    """

    def _prepare_inputs(self, inputs: Any) -> Any:
        if isinstance(inputs, Mapping):  # TRL's own batches of prompts are lists
            return Trainer._prepare_inputs(self, inputs)
        return super()._prepare_inputs(inputs)  # type: ignore[misc]


class DistillationSeams(AnsweringSeams):
    """Stands before TRL's DistillationTrainer among the bases, and lets hooks of the model see its loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forward_redirection = _Redirection()


def count_micro_batches(trainer: Any, number: int) -> None:
    """Tells a trainer whose rows are prompts how many micro-batches it has trained on before it went on.

    By that TRL finds the one that is next among those that it answers at once; a checkpoint does not hold it.
    """
    trainer._step = number


def write_answers(trainer: Any, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """Has a DistillationTrainer in training mode answer a step's prompts; returns its micro-batches."""
    trainer._buffered_inputs = None
    trainer._prepare_inputs(prompts)
    return list(trainer._buffered_inputs)


def score_answers(trainer: Any, prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """Has a GRPOTrainer in training mode answer and score a step's prompts; returns its micro-batches.

    TRL answers when the number of micro-batches so far says so, and reads answers again as often as it says.
    """
    first, answered = trainer._step, []
    try:
        for number, batch in enumerate(prompts):
            trainer._step = first + number
            answered.append(trainer._prepare_inputs(batch))
    finally:
        trainer._step = first
    return answered


class DivergenceSeams:
    """Stands before TRL's KTOTrainer among the bases: its estimate of the divergence is that of the whole step.

    TRL takes `mean(log π(y'|x) - log π⁰(y'|x))` over each micro-batch, from two calls of one private method: with a
    graph for π, without for π⁰. While `step_divergence` is a number, the calls return what has that number as mean.
    """

    step_divergence: float | None = None

    def mismatched_log_probs(self, model: Any, batch: Mapping[str, Any]) -> Any:
        """Returns the log-probabilities (rows,) of the answers that stand with another row's prompt."""
        return super()._compute_kl_logps(model, batch)  # type: ignore[misc]

    def _compute_kl_logps(self, model: Any, batch: Mapping[str, Any]) -> Any:
        if self.step_divergence is None:
            return self.mismatched_log_probs(model, batch)
        zero = torch.zeros(len(batch["label"]), device=batch["input_ids"].device)
        if not torch.is_grad_enabled():
            return zero
        return batch.get("ref_KL_logps", zero) + self.step_divergence
