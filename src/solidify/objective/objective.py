"""The objective: a weighted sum of loss terms, whose gradient does not depend on how a batch is split.

One optimizer step sees a window of micro-batches on all ranks. Every term declares what kind of quantity it is:

- `token_sum`: a sum over the micro-batch's target tokens; divided by the window's target tokens.
- `token_mean`: their mean; weighted by the micro-batch's share of them.
- `sequence_mean`: a mean over sequences; weighted by the micro-batch's share of them.
- `statistic`: a function of means over the window's attended tokens (load balance, a budget). The means are taken over
  the whole window first, then each micro-batch contributes its part of the gradient.
- `constant`: does not depend on data (a weight penalty); counted once per step.
- `none`: no loss, only an action after each step (a controller).

Derivation: for L = F(m) with m = (1/N) Σ_b s_b, the gradient is Σ_b F'(m) ∂s_b/N, so micro-batch b contributes the
gradient of F(m + (s_b - stop(s_b))/N), which needs m but no other micro-batch's graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from solidify.errors import ObjectiveError, refuse
from solidify.objective import memory
from solidify.objective.capture import Capture
from solidify.objective.memory import Stateful

REDUCTIONS = ("token_sum", "token_mean", "sequence_mean", "statistic", "constant", "none")

# What a term may ask for by naming a parameter so.
_OF_DATA = ("inputs", "labels", "attention_mask", "outputs", "logits", "reference_logits", "mask")
SUPPLIED = ("model", *_OF_DATA)


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


@dataclass(frozen=True)
class Window:
    """Counts over one optimizer step: all its micro-batches, all ranks. `means` holds statistics by term name."""

    micro_batches: int
    target_tokens: float
    attended_tokens: float
    sequences: float
    ranks: int = 1
    means: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """The same counts of one micro-batch."""

    target_tokens: float
    attended_tokens: float
    sequences: float


@dataclass(frozen=True)
class Part:
    """What one term gave for one micro-batch: its scaled share with graph, the same times its weight as numbers."""

    loss: torch.Tensor
    value: float
    weighted: float


class Term:
    """One part of an objective: `"model"` (the model's own loss), a function, a class or an instance; and its weight.

    A function's parameters called `model`, `inputs`, `labels`, `attention_mask`, `outputs`, `logits`,
    `reference_logits` (of the unmodified base), `mask` (attended tokens, flattened) or like one of its `captures` are
    supplied; all others come from `arguments`. A class is built with `arguments` first. A `reduction` attribute says
    what kind of quantity it returns; without one, a term that asks for no data is `constant`, any other `token_mean`.
    """

    def __init__(
        self,
        loss: Any,
        weight: float = 1.0,
        *,
        name: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = dict(arguments or {})
        self.weight = float(weight)
        self.name = name or (loss if isinstance(loss, str) else _name(loss))
        self.is_model = loss == "model" if isinstance(loss, str) else False
        if isinstance(loss, str) and not self.is_model:
            raise ObjectiveError(f"a term's loss is 'model', a function or a class, but not the text {loss!r}")
        self.subject: Any = None if self.is_model else self._build(loss, arguments)
        self.arguments = {} if self.is_model or inspect.isclass(loss) else arguments
        self.captures: dict[str, Capture] = dict(getattr(self.subject, "captures", None) or {})
        self.is_statistic = isinstance(self.subject, Statistic)
        self.acts = isinstance(self.subject, Acting)
        looks: Any = self.subject
        self.function: Any = looks.statistics if self.is_statistic or self.acts else looks
        self.asks = set() if self.is_model else self._bind(loss, arguments)
        self.reduction = self._reduction()
        self._start = memory.memory(self.subject)

    def _build(self, loss: Any, arguments: dict[str, Any]) -> Any:
        if not inspect.isclass(loss):
            if not callable(loss):
                raise ObjectiveError(f"the term {self.name} is a {type(loss).__name__}, which cannot be called")
            return loss
        try:
            return loss(**arguments)
        except (TypeError, ValueError) as error:
            raise ObjectiveError(f"the term {self.name} cannot be built: {error}") from error

    def _bind(self, loss: Any, arguments: dict[str, Any]) -> set[str]:
        """Returns what the term asks to be supplied with; refuses parameters that nobody gives."""
        parameters = inspect.signature(self.function).parameters
        supplied = {*SUPPLIED, *self.captures}
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

    def _reduction(self) -> str:
        if self.is_model:
            return "token_sum"
        if self.is_statistic:
            return "statistic"
        if self.acts:
            return "none"
        declared = getattr(self.subject, "reduction", None)
        if declared is None:
            return "token_mean" if self.asks & {*_OF_DATA, *self.captures} else "constant"
        if declared not in (*REDUCTIONS[:3], "constant"):
            raise ObjectiveError(
                f"the term {self.name} declares the reduction {declared!r}; known: {', '.join(REDUCTIONS)}"
            )
        return str(declared)

    @property
    def needs_prepass(self) -> bool:
        """Whether the window's means must be known before the first backward pass."""
        return self.is_statistic and not getattr(self.subject, "linear", False)

    def state_dict(self) -> dict[str, Any]:
        """Returns what the term remembers from step to step: its own `state_dict`, else the attributes that it changed
        since it was made (plain values, tensors, lists and dicts of them)."""
        if isinstance(self.subject, Stateful):
            return self.subject.state_dict()
        return memory.changed(self._start, memory.memory(self.subject))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what the term remembered."""
        if isinstance(self.subject, Stateful):
            self.subject.load_state_dict(state)
        elif state:
            vars(self.subject).update(state)

    def call(self, supply: Mapping[Any, Any]) -> torch.Tensor:
        """Calls the term (or its `statistics`) with what it asks for; `supply` holds captures by (term, word)."""
        given = {key: supply[(self.name, key)] if key in self.captures else supply[key] for key in self.asks}
        result = self.function(**given, **self.arguments)
        if not isinstance(result, torch.Tensor):
            raise ObjectiveError(f"the term {self.name} returned a {type(result).__name__}, not a tensor")
        if self.reduction not in ("statistic", "none") and result.numel() != 1:
            raise ObjectiveError(f"the term {self.name} returned a tensor of shape {list(result.shape)}, not a scalar")
        return result

    def part(self, supply: Mapping[Any, Any], counts: Counts, window: Window, model_loss: torch.Tensor) -> Part | None:
        """Returns this micro-batch's share of the term; None for terms that are no loss."""
        if self.reduction == "none":
            return None
        if self.is_model:
            loss = model_loss
        elif self.reduction == "statistic":
            loss = self._statistic(supply, counts, window)
        else:
            share = self._share(counts, window)
            # Without a single token there is nothing to average; 0/0 must not reach the sum.
            loss = self.call(supply).reshape(()) * share if share else model_loss.new_zeros(())
        value = float(loss.detach())
        return Part(self.weight * loss, value, self.weight * value)

    def _share(self, counts: Counts, window: Window) -> float:
        if self.reduction == "constant":
            return 1 / window.micro_batches
        if self.reduction == "sequence_mean":
            return window.ranks * counts.sequences / max(window.sequences, 1)
        tokens = window.ranks / max(window.target_tokens, 1)
        return tokens * (counts.target_tokens if self.reduction == "token_mean" else float(counts.target_tokens > 0))

    def _statistic(self, supply: Mapping[Any, Any], counts: Counts, window: Window) -> torch.Tensor:
        sums = self.call(supply)
        means = window.means.get(self.name)
        share = window.ranks * counts.attended_tokens / max(window.attended_tokens, 1)
        if means is None:  # this micro-batch is the whole window, or the term is linear
            local: torch.Tensor = self.subject.value(sums / max(counts.attended_tokens, 1))
            return local * share
        moved = means.to(sums) + (sums - sums.detach()) / window.attended_tokens
        total: torch.Tensor = self.subject.value(moved)
        return window.ranks * (total - total.detach()) + share * total.detach()


class Objective:
    """Several terms. `reference` is a second model that stands for the unmodified base, where one is needed."""

    def __init__(self, terms: Sequence[Term], *, reference: nn.Module | None = None) -> None:
        if not terms:
            raise ObjectiveError("an objective has at least one term")
        names = [term.name for term in terms]
        refuse(
            ObjectiveError,
            "terms are logged by name",
            [
                f"two terms are called {n!r}; give one a `name`"
                for n in sorted({n for n in names if names.count(n) > 1})
            ],
        )
        if all(term.reduction == "none" for term in terms):
            raise ObjectiveError("no term of the objective is a loss; add {loss: model}")
        self.terms = list(terms)
        self.reference = reference

    @property
    def captures(self) -> dict[tuple[str, str], Capture]:
        """What all terms want to see, by term and by the term's own word for it."""
        return {(term.name, key): spec for term in self.terms for key, spec in term.captures.items()}

    def asks_for(self, *names: str) -> bool:
        """Returns whether any term asks for one of `names`."""
        return any(term.asks & set(names) for term in self.terms)

    @property
    def has_model_term(self) -> bool:
        """Whether the model's own loss is part of the sum."""
        return any(term.is_model for term in self.terms)


def _name(loss: Any) -> str:
    named = loss if inspect.isclass(loss) or inspect.isroutine(loss) else type(loss)
    return str(named.__name__)
