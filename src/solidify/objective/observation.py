"""What a loss term may see of one micro-batch: a record with a field for every word that a term can ask for.

Shapes: B rows of T positions, hidden states of D numbers, a vocabulary of V words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from solidify.errors import ObjectiveError

# What a term may ask for by naming a parameter so.
REFERENCE = ("reference_logits", "reference_hidden_states", "reference_head")
OF_DATA = ("inputs", "labels", "attention_mask", "outputs", "logits", "hidden_states", "head", *REFERENCE, "mask")
WORDS = ("model", *OF_DATA)

_OF_THE_BATCH = ("labels", "attention_mask", "mask")  # these are None where the batch has none

# By term and by the term's own word: what each module returned (or was given), by the module's name.
Captured = Mapping[tuple[str, str], Mapping[str, Any]]
MakesLogits = Callable[[torch.Tensor], torch.Tensor]  # (n, D) -> (n, V), for any n rows of hidden states


class NotShown(ObjectiveError):
    """This pass does not show what a term asks for."""


@dataclass(frozen=True)
class ReferenceObservation:
    """The same of the reference: in evaluation mode, without a graph. What no term asks for is None."""

    captured: Captured
    logits: torch.Tensor | None = None  # (B, T, V)
    hidden_states: torch.Tensor | None = None  # (B, T, D)
    head: MakesLogits | None = None


@dataclass(frozen=True)
class Observation:
    """What one forward pass shows to terms. What no term asks for is None; the reference runs when it is asked for.

    `labels` stand one position after the one that predicts them where `shifts`, else at it.
    """

    model: nn.Module
    inputs: Mapping[str, Any]  # what the model was given, and the labels
    labels: torch.Tensor | None  # (B, T), integers; -100 where nothing is to be predicted
    attention_mask: torch.Tensor | None  # (B, T), boolean; as it was given where it has other dimensions
    mask: torch.Tensor | None  # (B * T,), boolean: the attended tokens
    captured: Captured = field(default_factory=dict)
    outputs: Any = None  # what the model returned
    hidden_states: torch.Tensor | None = None  # (B, T, D), the decoder's last
    head: MakesLogits | None = None
    shifts: bool = True
    decoder_masks: Mapping[str, torch.Tensor] = field(default_factory=dict)  # `mask` of terms that see a decoder
    make_logits: Callable[[], torch.Tensor | None] = lambda: None
    make_reference: Callable[[], ReferenceObservation] | None = None

    @cached_property
    def logits(self) -> torch.Tensor | None:
        """The logits (B, T, V), made when they are first asked for."""
        return self.make_logits()

    @cached_property
    def reference(self) -> ReferenceObservation:
        """What the reference shows; it runs when this is first asked for.

        Raises:
            NotShown: there is none.
        """
        if self.make_reference is None:
            raise NotShown("a term asks for the reference, which this pass does not run")
        return self.make_reference()

    def give(self, word: str) -> Any:
        """Returns what a term asks for by one of `WORDS`.

        Raises:
            NotShown: this pass cannot show it.
        """
        of, name = (self.reference, word.removeprefix("reference_")) if word in REFERENCE else (self, word)
        found = getattr(of, name)
        if found is None and word not in _OF_THE_BATCH:
            raise NotShown(f"a term asks for {word!r}, which this forward pass does not give")
        return found

    def give_captured(self, term: str, word: str, *, reference: bool = False) -> Mapping[str, Any]:
        """Returns what a term's own word means: what was captured, by the names of modules.

        Raises:
            NotShown: the pass was cut short before.
        """
        captured = self.reference.captured if reference else self.captured
        if (term, word) not in captured:
            raise NotShown(f"the term {term} asks for {word!r}, which was not captured")
        return captured[term, word]
