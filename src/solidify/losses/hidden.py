"""Loss terms on what modules inside return: near a teacher's, or sparse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from solidify.errors import ObjectiveError
from solidify.losses.arguments import number
from solidify.losses.precision import wide
from solidify.objective.capture import Capture


class HiddenMatch:
    """`‖h_S - h_T‖² / (‖h_T‖² + ε)` per attended token, averaged over layers: hidden states against the reference's.

    Relative to the reference's norm, so that tokens with massive activations do not stand for all others. `layers`
    names the model's modules by one pattern or several, `reference_layers` the reference's (default: the same), in the
    same order or by `pairs` (name in the model to name in the reference). `cosine` times `1 - cos(h_S, h_T)` is added.
    Without a gradient to the reference. Mean over attended tokens (statistic, linear).

    Widths must agree. Where they do not, add a projection that is trained with the model (`solidify.add(model,
    "projection", ..., reads="model.layers.3")`) and name it in `layers`.
    """

    linear = True

    def __init__(
        self,
        layers: str | Sequence[str],
        reference_layers: str | Sequence[str] | None = None,
        pairs: Mapping[str, str] | None = None,
        cosine: float = 0.0,
        epsilon: float = 1e-6,
    ) -> None:
        if pairs is not None and not isinstance(pairs, Mapping):
            raise ObjectiveError(f"hidden_match: pairs must map names to names, but are {pairs!r}")
        if not epsilon >= 0:
            raise ObjectiveError(f"hidden_match: epsilon must not be negative, but is {epsilon}")
        self.captures = {"hidden": Capture(modules=layers, element=0)}
        self.reference_captures = {"reference_hidden": Capture(modules=reference_layers or layers, element=0)}
        self.pairs = dict(pairs) if pairs is not None else None
        self.cosine = number("hidden_match", "cosine", cosine)
        self.epsilon = epsilon

    def statistics(
        self, hidden: Mapping[str, Any], reference_hidden: Mapping[str, Any], mask: torch.Tensor
    ) -> torch.Tensor:
        """Returns, per layer, the sum over attended tokens (layers,)."""
        sums = []
        for name, other in self._pair_names(hidden, reference_hidden).items():
            ours, theirs = flat(name, hidden[name], mask), flat(other, reference_hidden[other], mask).detach()
            if ours.shape[-1] != theirs.shape[-1]:
                raise ObjectiveError(
                    f"hidden_match: {name} is {ours.shape[-1]} wide and the reference's {other} {theirs.shape[-1]}; "
                    "add a projection to the model (solidify.add with `reads`), train it, and name it in `layers`"
                )
            distance = (ours - theirs).square().sum(-1) / (theirs.square().sum(-1) + self.epsilon)
            if self.cosine:
                distance = distance + self.cosine * (1 - F.cosine_similarity(ours, theirs, dim=-1))
            sums.append(_sum_over(distance, mask))
        return torch.stack(sums)

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the mean over layers."""
        return means.mean()

    def _pair_names(self, hidden: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, str]:
        if self.pairs is not None:
            odd = [n for n in self.pairs if n not in hidden] + [n for n in self.pairs.values() if n not in reference]
            if odd or set(self.pairs) != set(hidden):
                odd += [name for name in hidden if name not in self.pairs]
                raise ObjectiveError(
                    f"hidden_match: `pairs` and the layers do not agree on {', '.join(dict.fromkeys(odd))}"
                )
            return self.pairs
        if len(hidden) != len(reference):
            raise ObjectiveError(
                f"hidden_match: {len(hidden)} layers of the model, {len(reference)} of the reference; say in `pairs` "
                "which belong together"
            )
        return dict(zip(hidden, reference, strict=True))


class ActivationSparsity:
    """How spread the activations of some modules are, per attended token, averaged over the modules.

    `kind`: `l1` is `mean|a|`; `hoyer` is `(Σ|a|)² / (d Σa²)`, which no scale changes: 1 where all are equal, 1/d where
    one is alone (arXiv 1908.09979, Hoyer-square, over the width d); `zeros` is the share with `|a| <= threshold`, which
    has no gradient: a figure to watch, at weight 0. A positive weight makes activations sparser. Mean over attended
    tokens (statistic, linear).
    """

    linear = True
    KINDS: ClassVar[tuple[str, ...]] = ("l1", "hoyer", "zeros")

    def __init__(self, modules: str | Sequence[str], kind: str = "l1", threshold: float = 0.0) -> None:
        if kind not in self.KINDS:
            raise ObjectiveError(f"activation_sparsity: kind must be one of {', '.join(self.KINDS)}, but is {kind!r}")
        self.captures = {"activations": Capture(modules=modules, element=0)}
        self.kind = kind
        self.threshold = number("activation_sparsity", "threshold", threshold)

    def statistics(self, activations: Mapping[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """Returns, per module, the sum over attended tokens (modules,)."""
        return torch.stack([_sum_over(self._measure_sparsity(flat(n, a, mask)), mask) for n, a in activations.items()])

    def value(self, means: torch.Tensor) -> torch.Tensor:
        """Returns the mean over modules."""
        return means.mean()

    def _measure_sparsity(self, activations: torch.Tensor) -> torch.Tensor:
        size = activations.abs()
        if self.kind == "l1":
            return size.mean(-1)
        if self.kind == "zeros":
            return (size <= self.threshold).float().mean(-1)
        squares = activations.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return size.sum(-1).square() / squares / activations.shape[-1]


def flat(name: str, output: Any, mask: torch.Tensor) -> torch.Tensor:
    """Returns what a module returned as float32 rows (tokens, width).

    Raises:
        ObjectiveError: it is no tensor, or has not one row for each position of the batch.
    """
    if not isinstance(output, torch.Tensor):
        raise ObjectiveError(f"{name} returned {type(output).__name__}, not a tensor")
    rows = output.reshape(-1, output.shape[-1])
    if len(rows) != len(mask):
        raise ObjectiveError(
            f"{name} returned {list(output.shape)}, which is not one row for each of the batch's {len(mask)} positions"
        )
    return wide(rows)


def _sum_over(per_token: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the sum over attended tokens; what stands at padding (also NaN) does not reach it."""
    return per_token[mask.bool()].sum()
