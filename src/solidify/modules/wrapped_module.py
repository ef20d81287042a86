"""A module of plain torch as a model of transformers: one input, one tensor returned, a loss by labels.

`module` is what was wrapped; the configuration says what it takes (`example_inputs`) and how many labels there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput


class WrappedConfig(PreTrainedConfig):  # type: ignore[misc]  # untyped upstream
    """What a wrapped module takes: `{"name": ..., "shape": [...], "dtype": ..., "below": ...}`, without the batch."""

    model_type = "wrapped"

    def __init__(self, example_inputs: dict[str, Any] | None = None, **values: Any) -> None:
        self.example_inputs = example_inputs or {}
        super().__init__(**values)


class Wrapped(PreTrainedModel):  # type: ignore[misc]  # untyped upstream
    """Holds the module; the kinds of input each have a class, whose `forward` names it."""

    config_class = WrappedConfig
    base_model_prefix = ""

    def __init__(self, config: WrappedConfig) -> None:
        super().__init__(config)
        self.module: nn.Module = nn.Identity()
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """Returns the floating dtype that most numbers have; transformers takes that of the first parameter."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32

    def _init_weights(self, module: nn.Module) -> None:
        """Leaves all as the module's own constructor made it."""

    def answer(self, given: torch.Tensor, labels: torch.Tensor | None) -> SequenceClassifierOutput:
        """Calls the module; with `labels` (batch_size,), or (batch_size, num_labels) for several, also their loss."""
        logits = self.module(given)
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if logits.ndim != 2:
            raise ValueError(
                f"labels are for a module that returns (batch_size, num_labels), and this one returns "
                f"{list(logits.shape)}: leave them out, and train with a loss term of your own"
            )
        loss = ForSequenceClassificationLoss(labels, logits, self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class WrappedForImageClassification(Wrapped):
    """Takes `pixel_values` (batch_size, channels, height, width)."""

    main_input_name = "pixel_values"

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """Returns `logits`, and `loss` where there are labels."""
        return self.answer(pixel_values, labels)


class WrappedForSequenceClassification(Wrapped):
    """Takes `input_ids` (batch_size, sequence_length)."""

    main_input_name = "input_ids"

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """Returns `logits`, and `loss` where there are labels."""
        return self.answer(input_ids, labels)


class WrappedModel(Wrapped):
    """Takes `inputs` of any shape, the batch first."""

    main_input_name = "inputs"

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> SequenceClassifierOutput:
        """Returns `logits`, and `loss` where there are labels."""
        return self.answer(inputs, labels)
