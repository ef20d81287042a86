"""Along which positions the modules of an encoder-decoder run: those of the encoder, or those of the decoder.

Names do not tell: keys and values of a decoder's cross-attention run along the encoder. It is found by running the
model with decoders' inputs of two lengths and looking at whose rows follow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from solidify.behaviour.calling import chance_kept
from solidify.errors import ObjectiveError, refuse
from solidify.model import anatomy
from solidify.objective.capture import Recorder
from solidify.objective.internals import encodes_and_decodes, without_loss
from solidify.objective.objective import Objective
from solidify.objective.term import Term
from solidify.objective.window import DECODED, decoder_mask

OfTokens = Any  # Counts or Window


class Sides:
    """Which terms look along the decoder of an encoder-decoder; they get its mask, and its tokens are what they count.

    Only terms that capture modules and ask for `mask` are looked at; without such a term nothing is run.
    """

    def __init__(self, objective: Objective, model: nn.Module, recorder: Recorder[Any]) -> None:
        self._model, self._recorder = model, recorder
        both = encodes_and_decodes(model)
        self._terms = [term for term in objective.terms if both and term.captures and "mask" in term.asks]
        self._decoded: set[str] = set()
        self._known = not self._terms

    def learn(self, inputs: Mapping[str, Any]) -> None:
        """Runs the model on a batch, twice and without a graph, the first time that there is something to learn.

        Raises:
            ObjectiveError: a term looks at modules of both sides, whose tokens cannot be one mean.
        """
        if self._known or not any(inputs.get(key) is not None for key in DECODED):
            return
        whole, shorter = (self._count_rows(_cut_decoder(inputs, by)) for by in (0, 1))
        faults = []
        for term in self._terms:
            sides: dict[bool, list[str]] = {True: [], False: []}
            for key in term.captures:
                for name, rows in whole.get((term.name, key), {}).items():
                    sides[rows != shorter[term.name, key].get(name)].append(name)
            if sides[True] and sides[False]:
                faults.append(
                    f"the term {term.name} looks at modules along the decoder ({sides[True][0]}) and along the encoder "
                    f"({sides[False][0]}), whose tokens are not the same; write one term for each"
                )
            if sides[True]:
                self._decoded.add(term.name)
        self._known = True
        refuse(ObjectiveError, "the objective does not fit an encoder-decoder", faults)

    def masks(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Returns the masks of terms that look along the decoder, by the term's name: boolean and flattened."""
        mask = decoder_mask(inputs) if self._decoded else None
        return dict.fromkeys(self._decoded, mask.reshape(-1)) if mask is not None else {}

    def counted(self, term: Term, tokens: OfTokens) -> OfTokens:
        """Returns counts, or a window, with those tokens as attended ones that the term looks at."""
        return replace(tokens, attended_tokens=tokens.decoder_tokens) if term.name in self._decoded else tokens

    def _count_rows(self, inputs: Mapping[str, Any]) -> dict[Any, dict[str, int]]:
        with (
            torch.no_grad(),
            chance_kept(),
            anatomy.evaluation(self._model),
            self._recorder.recording() as seen,
        ):
            self._model(**without_loss(self._model, inputs))
        return {key: {name: _count_rows(value) for name, value in values.items()} for key, values in seen.items()}


def _cut_decoder(inputs: Mapping[str, Any], by: int) -> dict[str, Any]:
    """Returns inputs whose decoder reads so many positions less; of a single position, as many more."""

    def cut(value: torch.Tensor) -> torch.Tensor:
        """Cuts or repeats along the positions (axis 1)."""
        if value.shape[1] > by:
            return value[:, : value.shape[1] - by].contiguous()
        return value.repeat_interleave(1 + by, dim=1)

    return {key: cut(value) if key in DECODED and value is not None else value for key, value in inputs.items()}


def _count_rows(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return next((rows for each in value if (rows := _count_rows(each))), 0)
    return math.prod(value.shape[:-1]) if isinstance(value, torch.Tensor) and value.ndim > 1 else 0
