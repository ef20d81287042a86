"""Loss terms on parameters: they ask for no data and count once per optimizer step."""

from __future__ import annotations

import torch
from torch import nn

from solidify.adapter import standing
from solidify.errors import ObjectiveError
from solidify.model import anatomy


class WeightPenalty:
    """`norm/2 Σ‖θ‖²` for l2, `Σ|θ|` for l1, over the parameters that `parameters` names (default: what is trained).

    Names are those of the plain model, also under PEFT; the parts of a LoRA update are named by its target. Counted
    once per optimizer step. AdamW's decoupled weight decay is something else: it is not in the loss.
    """

    reduction = "constant"

    def __init__(self, parameters: str | list[str] | None = None, norm: str = "l2") -> None:
        if norm not in ("l1", "l2"):
            raise ObjectiveError(f"weight_penalty: norm must be l1 or l2, but is {norm!r}")
        self.parameters = parameters
        self.norm = norm

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar in float32."""
        terms = [p.float().square().sum() / 2 if self.norm == "l2" else p.float().abs().sum() for p in self._of(model)]
        return torch.stack(terms).sum()

    def _of(self, model: nn.Module) -> list[nn.Parameter]:
        peft_model = standing.peft_model(model)
        named = (
            [(name, p) for _, name, p in standing.named_parameters(peft_model)]
            if peft_model is not None
            else list(model.named_parameters())
        )
        if self.parameters is None:
            chosen = [p for _, p in named if p.requires_grad]
        else:
            hits = anatomy.match(self.parameters, dict.fromkeys(name for name, _ in named))
            empty = [pattern for pattern, found in hits.items() if not found]
            if empty:
                raise ObjectiveError(f"weight_penalty: {', '.join(map(repr, empty))} names no parameter")
            names = {name for found in hits.values() for name in found}
            active = {id(p) for p in _active(model)}
            chosen = [p for name, p in named if name in names and id(p) in active]
        if not chosen:
            raise ObjectiveError("weight_penalty: there is nothing to penalise")
        return list({id(p): p for p in chosen}.values())


def _active(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that take part in the forward pass now, LoRA's included; no frozen twin of a copy."""
    parameters = []
    for place in standing.modules(model):
        parameters += list(place.inner.parameters(recurse=False))
        if place.called is not place.inner:
            inside = {id(p) for p in place.inner.parameters()}
            parameters += [p for p in place.called.parameters() if p.requires_grad and id(p) not in inside]
    return parameters
