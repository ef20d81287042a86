"""Loss terms on what the model predicts: next tokens, how sure it is of them, and tokens that a head drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.losses.arguments import count, number, positive
from solidify.losses.chunking import CHUNK, Head, chunked
from solidify.losses.precision import wide
from solidify.objective.capture import Capture


def targets(labels: torch.Tensor, length: int) -> torch.Tensor:
    """Returns which positions predict a target: (batch_size, length - 1), True where the next label is not -100.

    Raises:
        ObjectiveError: what was returned has another length than the labels, so that rows cannot be told apart,
            or there is one label a row.
    """
    if labels.ndim != 2:
        raise ObjectiveError(
            f"a term on target tokens needs a label for each of them, but labels are {list(labels.shape)}"
        )
    if labels.shape[1] != length:
        raise ObjectiveError(
            f"the labels have {labels.shape[1]} positions a row, but the model returned {length}; a term on target "
            "tokens needs one for one"
        )
    return labels[:, 1:] != -100


class NextToken:
    """`-Σ log p(next token)` over target tokens: the model's own loss, computed without ever building its logits.

    Rows without a target are dropped before the head runs, the others go through it `chunk` at a time, and gradients
    are computed with each chunk (see `chunking.py`). The softmax is in float32. Sum over target tokens (`token_sum`).
    Equal to cross-entropy to float32 rounding; with an objective of this term alone the forward pass needs no logits.
    """

    reduction = "token_sum"
    shifts = True

    def __init__(self, chunk: int = CHUNK, label_smoothing: float = 0.0) -> None:
        if not 0 <= number("next_token", "label_smoothing", label_smoothing) < 1:
            raise ObjectiveError(f"next_token: label_smoothing must be from 0 to below 1, but is {label_smoothing}")
        self.chunk = count("next_token", "chunk", chunk)
        self.label_smoothing = label_smoothing

    def __call__(self, hidden_states: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        """Takes hidden_states (batch_size, sequence_length, hidden_size), the model's head, and labels."""
        where = targets(labels, hidden_states.shape[1])
        return chunked(hidden_states[:, :-1][where], head, self._sum_losses, [labels[:, 1:][where]], size=self.chunk)

    def _sum_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)


class OutputEntropy:
    """`-Σ H(p)` over target tokens, `H(p) = -Σ_v p_v log p_v`: the confidence penalty of arXiv 1701.06548 (section 3).

    A positive weight makes the outputs more diverse, a negative one sharper. Sum over target tokens (`token_sum`).
    """

    reduction = "token_sum"
    shifts = True

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Takes logits (batch_size, sequence_length, vocab_size) and labels with -100 where nothing is predicted."""
        where = targets(labels, logits.shape[1])
        log_p = F.log_softmax(wide(logits[:, :-1][where]), dim=-1)
        return (log_p.exp() * log_p).sum()


class Draft:
    """`Σ_s decay^s · (-log p_s(x_{t+2+s}))` over target tokens: what a head drafts, against the text that follows.

    `module` names a head that was added to the model and can `unroll` (`solidify.modules.draft_head`): step s gives
    hidden states that predict, through the model's own output head, the token two and s more after the one at hand. A
    token is a target that has a label, and is drafted from an attended one. With `soft`, the target is what the model
    itself says there, without a gradient: `-Σ_v q_v log p_v` (EAGLE-3, arXiv 2503.01840; Medusa-2 takes decay 0.8,
    arXiv 2401.10774). Logits exist `chunk` rows at a time. Sum over target tokens (`token_sum`).
    """

    reduction = "token_sum"
    shifts = True
    decoders_only = True  # the tokens that it drafts are those that the model reads

    def __init__(self, module: str, decay: float = 0.8, soft: bool = False, chunk: int = CHUNK) -> None:
        self.captures = {"drafted": Capture(modules=module, count=1)}
        self.module = module
        self.decay = positive("draft", "decay", decay)
        self.soft = soft
        self.chunk = count("draft", "chunk", chunk)

    def bind(self, model: nn.Module) -> None:
        """Refuses a module that drafts nothing.

        Raises:
            ObjectiveError: it has no method `unroll`.
        """
        (found,) = self.captures["drafted"].find(model)
        located = lookup.at(model, found)
        if located is None or not callable(getattr(located.inner, "unroll", None)):
            raise ObjectiveError(
                f"draft: {found} drafts nothing, because it has no method `unroll`; add a head of "
                "solidify.modules.draft_head (solidify.add), and name it in `module`"
            )

    def __call__(
        self,
        drafted: Mapping[str, Any],
        model: nn.Module,
        inputs: Mapping[str, Any],
        attention_mask: torch.Tensor | None,
        hidden_states: torch.Tensor,
        head: Head,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Takes what the head returned, and what it needs to go on: the text, and the model's output head."""
        targets(labels, hidden_states.shape[1])
        ((name, features),) = drafted.items()
        located, tokens = lookup.at(model, name), inputs.get("input_ids")
        mask = attention_mask if attention_mask is not None else torch.ones_like(labels, dtype=torch.bool)
        positions = inputs.get("position_ids")
        is_packed = mask.ndim != 2 or (positions is not None and bool((positions.diff(dim=-1) < 0).any()))
        if located is None or tokens is None or is_packed:
            raise ObjectiveError("draft: a row is one text, given as input_ids: not as embeddings, nor several packed")
        plain, unrolling = cast(Any, lookup.plain_model(model)), cast(Any, located.inner)
        steps = unrolling.unroll(features, plain.get_input_embeddings()(tokens), mask)
        total = wide(hidden_states).new_zeros(())
        for step, states in enumerate(steps):
            ahead = step + 2
            where = (labels[:, ahead:] != -100) & mask[:, :-ahead]
            rows, theirs = states[:, :-ahead][where], hidden_states[:, ahead - 1 : -1][where].detach()
            beside = theirs if self.soft else labels[:, ahead:][where]
            compare: Callable[..., torch.Tensor] = partial(_compare_with, head) if self.soft else _sum_cross_entropy
            total = total + self.decay**step * chunked(rows, head, compare, [beside], size=self.chunk)
        return total


def _compare_with(head: Head, logits: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of one chunk's logits with what the model's head says of other rows."""
    with torch.no_grad():
        wanted = F.softmax(wide(head(theirs)), dim=-1)
    return -(wanted * F.log_softmax(logits, dim=-1)).sum()


def _sum_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")
