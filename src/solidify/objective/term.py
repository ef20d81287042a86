"""One term of an objective: what it asks to see, what kind of quantity it returns, and its share of a micro-batch.

- `token_sum`: a sum over the micro-batch's target tokens; divided by the window's target tokens.
- `token_mean`: their mean; weighted by the micro-batch's share of them.
- `sequence_mean`: a mean over sequences; weighted by the micro-batch's share of them.
- `statistic`: a function of means over the window's attended tokens (load balance, a budget). The means are taken over
  the whole window first, then each micro-batch contributes its part of the gradient.
- `constant`: does not depend on data (a weight penalty); counted once per step.
- `none`: no loss, only an action after each step (a controller).

`window.py` derives the shares.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

from solidify.errors import ObjectiveError, refuse
from solidify.objective import memory, weights
from solidify.objective.capture import Capture
from solidify.objective.memory import Stateful
from solidify.objective.observation import OF_DATA, REFERENCE, WORDS, Observation
from solidify.objective.weights import Weight
from solidify.objective.window import Counts, Window
from solidify.system import foreign

REDUCTIONS = ("token_sum", "token_mean", "sequence_mean", "statistic", "constant", "none")

# What has one entry for each position of a row, and what stands where a row is longer than it was.
_BY_POSITION = {"labels": -100, "logits": 0, "hidden_states": 0, "reference_logits": 0, "reference_hidden_states": 0}


@runtime_checkable
class Statistic(Protocol):
    """A term that is a function of window means: `statistics` returns sums over tokens, `value` judges their means."""

    statistics: Callable[..., torch.Tensor]

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the loss, a scalar, for means of the shape that `statistics` returns."""


@runtime_checkable
class Acting(Protocol):
    """A term that does something after each optimizer step."""

    statistics: Callable[..., torch.Tensor]

    def after_step(self, model: nn.Module, means: torch.Tensor, step: int, steps: int) -> None:
        """Acts on the window's means; `step` counts from 1, `steps` is the planned number."""


@runtime_checkable
class Binding(Protocol):
    """A term that judges the model that it is bound to, before anything is computed."""

    def bind(self, model: nn.Module) -> None:
        """Raises ObjectiveError when the term could not work on the model."""


@dataclass(frozen=True)
class Part:
    """What one term gave for one micro-batch: its weighted share with graph, and its share as a number without."""

    loss: torch.Tensor
    value: torch.Tensor


class Term:
    """One part of an objective: `"model"` (the model's own loss), a function, a class or an instance; and its weight.

    A function's parameters that are named like one of these are supplied; all others come from `arguments`.

    - `model`; `inputs`, `labels` of the micro-batch; `attention_mask`, boolean where it has two dimensions; `mask`, the
      attended tokens, boolean and flattened (batch_size * sequence_length,): those of the decoder for a term whose
      captures run along the decoder of an encoder-decoder;
    - `outputs`, `logits` (batch_size, sequence_length, vocab_size);
    - `hidden_states` (batch_size, sequence_length, hidden_size), the decoder's last, and `head`, which makes logits of
      any rows of them: then no logits are built that nobody asks for;
    - `reference_logits`, `reference_hidden_states`, `reference_head`: the same of the unmodified base, or of the second
      model that the objective names;
    - a word of its `captures` (outputs of modules by name), or of its `reference_captures` (those of the reference).

    A class is built with `arguments` first. A `reduction` attribute says what kind of quantity is returned; without
    one, a term that asks for no data is `constant`, any other `token_mean`. A subject that compares each position with
    the next label says `shifts = True`: of a model whose labels stand where they are predicted (an encoder-decoder, a
    masked model) it gets them one position later, and everything else one position longer. `weight` is a number, or
    moves (`solidify.objective.weights`). With `statistics="micro_batch"` a statistic is taken over each micro-batch by
    itself: cheaper, and then it does depend on the split.
    """

    def __init__(
        self,
        loss: Any,
        weight: float | Weight | Mapping[str, Any] = 1.0,
        *,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        statistics: str = "window",
    ) -> None:
        arguments = dict(arguments or {})
        self.weight = weights.make(weight)
        self.name = name or (loss if isinstance(loss, str) else _name_loss(loss))
        self.is_model = loss == "model" if isinstance(loss, str) else False
        if isinstance(loss, str) and not self.is_model:
            raise ObjectiveError(f"a term's loss must be 'model', a function or a class, but is the string {loss!r}")
        if statistics not in ("window", "micro_batch"):
            raise ObjectiveError(
                f"the term {self.name}: `statistics` must be 'window' or 'micro_batch', but is {statistics!r}"
            )
        self.statistics = statistics
        self.subject: Any = None if self.is_model else self._build_subject(loss, arguments)
        self.arguments = {} if self.is_model or inspect.isclass(loss) else arguments
        self.captures: dict[str, Capture] = dict(getattr(self.subject, "captures", None) or {})
        self.reference_captures: dict[str, Capture] = dict(getattr(self.subject, "reference_captures", None) or {})
        self.is_statistic = isinstance(self.subject, Statistic)
        self.acts = isinstance(self.subject, Acting)
        looks: Any = self.subject
        self.function: Any = looks.statistics if self.is_statistic or self.acts else looks
        self.asks = set() if self.is_model else self._bind_parameters(loss, arguments)
        self.reduction = self._find_reduction()
        self._start = memory.memory(self.subject)
        self._weight_at_start = memory.memory(self.weight)

    def _build_subject(self, loss: Any, arguments: dict[str, Any]) -> Any:
        if not inspect.isclass(loss):
            if not callable(loss):
                raise ObjectiveError(f"the term {self.name} is of type {type(loss).__name__}, which cannot be called")
            return loss
        with foreign.calling(f"the term {self.name} cannot be built", ObjectiveError):
            return loss(**arguments)

    def _bind_parameters(self, loss: Any, arguments: dict[str, Any]) -> set[str]:
        """Returns what the term asks to be supplied with; refuses parameters that nobody gives."""
        parameters = inspect.signature(self.function).parameters
        supplied = {*WORDS, *self.captures, *self.reference_captures}
        own = {} if inspect.isclass(loss) else arguments
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        named = {
            n: p
            for n, p in parameters.items()
            if p.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        }
        faults = [f"it has no parameter {key!r}" for key in own if key not in named and not open_ended]
        faults += [
            f"its parameter {key!r} is neither in `arguments` nor one of those supplied ({', '.join(sorted(supplied))})"
            for key, p in named.items()
            if p.default is inspect.Parameter.empty and key not in supplied and key not in own
        ]
        refuse(ObjectiveError, f"the term {self.name} cannot be called", faults)
        return {key for key in named if key in supplied and key not in own}

    def _find_reduction(self) -> str:
        if self.is_model:
            return "token_sum"
        if self.is_statistic:
            return "statistic"
        if self.acts:
            return "none"
        declared = getattr(self.subject, "reduction", None)
        if declared is None:
            data = {*OF_DATA, *self.captures, *self.reference_captures}
            return "token_mean" if self.asks & data else "constant"
        if declared not in (*REDUCTIONS[:3], "constant"):
            raise ObjectiveError(
                f"the term {self.name} declares the reduction {declared!r}; known: {', '.join(REDUCTIONS)}"
            )
        return str(declared)

    @property
    def needs_prepass(self) -> bool:
        """Whether the window's means must be known before the first backward pass."""
        return self.is_statistic and self.statistics == "window" and not getattr(self.subject, "linear", False)

    @property
    def moves(self) -> bool:
        """Whether the weight is no constant."""
        return not isinstance(self.weight, weights.Constant)

    @property
    def asks_reference(self) -> bool:
        """Whether the reference must run."""
        return bool(self.asks & {*REFERENCE, *self.reference_captures})

    def state_dict(self) -> dict[str, Any]:
        """Returns what the term and its weight remember from step to step.

        That is their own `state_dict`, else the attributes that changed since they were made (plain values, tensors,
        lists and dicts of them).
        """
        return {
            "subject": _read_state(self.subject, self._start),
            "weight": _read_state(self.weight, self._weight_at_start),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what was remembered."""
        for thing, remembered in ((self.subject, state.get("subject")), (self.weight, state.get("weight"))):
            if isinstance(thing, Stateful):
                if remembered is not None:
                    thing.load_state_dict(remembered)
            elif remembered:
                vars(thing).update(remembered)

    def call(self, observation: Observation) -> torch.Tensor:
        """Calls the term (or its `statistics`) with what it asks for.

        Raises:
            ObjectiveError: the pass does not show it, or the term returns no scalar.
        """
        given = {word: self._find_shown(observation, word) for word in self.asks}
        if getattr(self.subject, "shifts", False) and not observation.shifts:
            given = {key: _one_later(key, value) for key, value in given.items()}
        result = self.function(**given, **self.arguments)
        if not isinstance(result, torch.Tensor):
            raise ObjectiveError(f"the term {self.name} returned {type(result).__name__}, not a tensor")
        if self.reduction not in ("statistic", "none") and result.numel() != 1:
            raise ObjectiveError(f"the term {self.name} returned a tensor of shape {list(result.shape)}, not a scalar")
        return result

    def _find_shown(self, observation: Observation, word: str) -> Any:
        if word in self.captures or word in self.reference_captures:
            return observation.give_captured(self.name, word, reference=word in self.reference_captures)
        found = observation.give(word)
        return observation.decoder_masks.get(self.name, found) if word == "mask" else found

    def part(
        self, observation: Observation, counts: Counts, window: Window, model_loss: torch.Tensor, weight: float
    ) -> Part | None:
        """Returns this micro-batch's share of the term, at this step's weight; None for terms that are no loss."""
        if self.reduction == "none":
            return None
        if self.is_model:
            loss = model_loss
        elif self.reduction == "statistic":
            loss = self._compute_statistic(observation, counts, window)
        else:
            share = self._compute_share(counts, window)
            # Without a single token there is nothing to average; 0/0 must not reach the sum.
            loss = self.call(observation).reshape(()) * share if share else model_loss.new_zeros(())
        return Part(weight * loss, loss.detach())

    def _compute_share(self, counts: Counts, window: Window) -> float:
        if self.reduction == "constant":
            return 1 / window.micro_batches
        if self.reduction == "sequence_mean":
            return window.ranks * counts.sequences / max(window.sequences, 1)
        tokens = window.ranks / max(window.target_tokens, 1)
        return tokens * (counts.target_tokens if self.reduction == "token_mean" else float(counts.target_tokens > 0))

    def _compute_statistic(self, observation: Observation, counts: Counts, window: Window) -> torch.Tensor:
        sums = self.call(observation)
        means = window.means.get(self.name)
        share = window.ranks * counts.attended_tokens / max(window.attended_tokens, 1)
        if means is None:  # this micro-batch is the whole window, or the term is linear
            local: torch.Tensor = self.subject.value(sums / max(counts.attended_tokens, 1))
            return local * share
        moved = means.to(sums) + (sums - sums.detach()) / window.attended_tokens
        total: torch.Tensor = self.subject.value(moved)
        return window.ranks * (total - total.detach()) + share * total.detach()


def _one_later(key: str, value: Any) -> Any:
    """Lays out what is supplied so that labels stand one position later, for a term that shifts them itself."""
    if key not in _BY_POSITION or value is None:
        return value
    width = (1, 0) if key == "labels" else (0, 0, 0, 1)
    return F.pad(value, width, value=_BY_POSITION[key])


def _name_loss(loss: Any) -> str:
    named = loss if inspect.isclass(loss) or inspect.isroutine(loss) else type(loss)
    return str(named.__name__)


def _read_state(thing: Any, start: dict[str, Any]) -> dict[str, Any]:
    if isinstance(thing, Stateful):
        return thing.state_dict()
    return memory.changed(start, memory.memory(thing))
