"""`solidify.place`: which layers to change, under a budget, so that the model stays as near its base as it can.

Each candidate is scored alone: the divergence of the base with only this module changed, after a short alignment. The
sum of such scores is a guess (Puzzle, arXiv 2411.19146, replace-one-block scores); how far it was off is measured on
the set that is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.artifact import loading
from solidify.behaviour import properties
from solidify.errors import HealingError, refuse
from solidify.healing.align import align, refuse_types
from solidify.healing.learning import Alignment
from solidify.healing.measuring import distance
from solidify.healing.sources import Batch
from solidify.model import anatomy, operations
from solidify.model.cost import flops
from solidify.surgery import catalogue, contract
from solidify.surgery.edit_record import Edit
from solidify.system import console, foreign

METHODS = {
    "additive": "the set with the smallest sum of scores, exactly",
    "greedy": "one module after the other, each time the one that costs least beside those that are chosen",
}
SHORT = Alignment(max_steps=40)


@dataclass(frozen=True)
class Budget:
    """What the changed model may cost; exactly one is given.

    Args:
        layers: how many of the candidates are changed.
        cache_bytes: bytes of the cache of one row of `length` tokens, at most.
        flops: FLOPs of one token through all matrices, at most.
        length: tokens for `cache_bytes`.
        method: how the set is chosen, one of `METHODS`; `greedy` measures every step anew.
    """

    layers: int | None = None
    cache_bytes: int | None = None
    flops: int | None = None
    length: int = 1024
    method: str = "additive"

    def faults(self) -> list[str]:
        """Says what cannot be."""
        named = {"layers": self.layers, "cache_bytes": self.cache_bytes, "flops": self.flops}
        set_ = [key for key, value in named.items() if value is not None]
        found = []
        if self.method not in METHODS:
            found.append(f"method is one of {', '.join(METHODS)}, but {self.method!r} was given")
        if len(set_) != 1:
            return [f"a budget is one of {', '.join(named)}, but {', '.join(set_) or 'none'} was given", *found]
        return [
            *found,
            *(f"{key} is at least 0, but {value} was given" for key, value in named.items() if (value or 0) < 0),
            *([f"length is at least 1, but {self.length} was given"] if self.length < 1 else []),
        ]


@dataclass(frozen=True)
class Placement:
    """Which modules to change. `scores` are divergences in nats a token, by candidate; `savings` what each saves of
    what the budget counts; `curve` the smallest sum of scores for every number of changed modules; `predicted` the sum
    of those chosen, `measured` the divergence of the base with all of them changed."""

    chosen: tuple[str, ...]
    method: str
    scores: Mapping[str, float]
    savings: Mapping[str, float]
    curve: Sequence[float]
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """How far the sum of scores was from the divergence: `(measured - predicted) / measured`."""
        return (self.measured - self.predicted) / self.measured if self.measured else 0.0


def place(
    model: PreTrainedModel,
    base: PreTrainedModel | str | Path,
    batches: Sequence[Batch],
    budget: Budget,
    *,
    edits: Iterable[Edit | Mapping[str, Any]],
    settings: Alignment = SHORT,
    held_out: Sequence[Batch] = (),
) -> Placement:
    """Chooses which of the replaced modules of a model are to stay replaced.

    Args:
        model: the base with every candidate replaced; the candidates are aligned in place, and all stay replaced.
        base: the model before the change, or where it stands.
        batches: what the candidates are aligned on.
        budget: what the result may cost.
        edits: what was replaced.
        settings: how candidates are aligned before they are scored.
        held_out: batches on which divergences are measured; without them, the first of `batches`.

    Raises:
        HealingError: the budget cannot be met, or the model differs from its base in more than the candidates.
    """
    if not isinstance(budget, Budget):
        raise HealingError(f"the budget is a solidify.Budget, but is of type {type(budget).__name__}")
    refuse(HealingError, "the layers cannot be chosen as asked", budget.faults())
    refuse_types(model, settings, edits := list(edits))
    if not isinstance(base, PreTrainedModel):
        base = loading.load_base(str(base)).model
    records = [edit.document() if isinstance(edit, Edit) else dict(edit) for edit in edits]
    candidates = [record["name"] for record in records if (kind := catalogue.of(record)).matched and not kind.spread]
    seen = list(held_out or batches[:4])
    savings, needed = _find_savings(model, base, candidates, budget)
    align(model, base, batches, edits=records, settings=settings, held_out=seen)
    choice = Choice(model, base, candidates, seen)
    choice.refuse_other_changes()
    scores = {}
    with console.progress("Scoring each layer alone", len(candidates)) as advance:
        for name in candidates:
            scores[name] = choice.divergence([name])
            advance(f"{name} {scores[name]:.3g}")
    chosen = _choose_greedily(choice, savings, needed) if budget.method == "greedy" else choose(scores, savings, needed)
    ranked = sorted(scores.values())
    return Placement(
        tuple(name for name in candidates if name in chosen),
        budget.method,
        scores,
        savings,
        [sum(ranked[:count]) for count in range(len(ranked) + 1)],
        sum(scores[name] for name in chosen),
        choice.divergence(chosen),
    )


class Choice:
    """A changed model and its base, and the divergence of the base with some of the candidates changed."""

    def __init__(
        self, model: PreTrainedModel, base: PreTrainedModel, candidates: Sequence[str], batches: Sequence[Batch]
    ) -> None:
        self.model, self.base, self.candidates, self.batches = model, base, candidates, batches

    def divergence(self, changed: Iterable[str]) -> float:
        """Returns `KL(base ‖ base with these changed)` in nats a token.

        Raises:
            HealingError: it is NaN or infinite.
        """
        with self.only(names := list(changed)):
            found = distance(self.model, self.base, self.batches).kl
        if not math.isfinite(found):
            raise HealingError(
                f"the divergence from the base with {', '.join(names)} changed is {found}, so no layers can be chosen; "
                "a smaller learning rate of the alignment may keep it finite"
            )
        return found

    @contextmanager
    def only(self, changed: Iterable[str]) -> Iterator[None]:
        """While the block lasts, the modules of the base stand in the model everywhere but at the changed names."""
        kept = set(changed)
        before = {name: self.model.get_submodule(name) for name in self.candidates if name not in kept}
        for name in before:
            self.model.set_submodule(name, self.base.get_submodule(name), strict=True)
        try:
            yield
        finally:
            for name, module in before.items():
                self.model.set_submodule(name, module, strict=True)

    def refuse_other_changes(self) -> None:
        """Raises HealingError when the model is not its base once the base's modules stand at all candidates."""
        inputs = {key: tensor[:1] for key, tensor in self.batches[0].items()}
        with self.only(()):
            ours, theirs = (anatomy.run(model, inputs) for model in (self.model, self.base))
        if ours.shape != theirs.shape or not _is_rounding(ours, theirs):
            raise HealingError(
                "with the base's own modules at all candidates the model is not its base, so something else was "
                "changed too; choose layers before other changes are made"
            )


def _find_savings(
    model: PreTrainedModel, base: PreTrainedModel, candidates: Sequence[str], budget: Budget
) -> tuple[dict[str, float], float]:
    """Returns what each candidate saves when it is changed, and how much has to be saved in all.

    Raises:
        HealingError: even with all candidates changed, the model costs more than the budget.
    """
    if budget.layers is not None:
        savings, needed, unit = dict.fromkeys(candidates, 1.0), float(budget.layers), "modules to change (layers)"
    elif budget.flops is not None:
        ours, theirs = flops(model), flops(base)
        costs = [{n: _sum_within(part, n) for n in candidates} for part in (theirs, ours)]
        savings = {name: float(costs[0][name] - costs[1][name]) for name in candidates}
        needed, unit = float(sum(theirs.values()) - budget.flops), f"FLOPs a token to save (flops: {budget.flops:,})"
    else:
        before, after = (_cache_bytes(part, budget.length) for part in (base, model))
        layers = {name: operations.layer_index(model, name) for name in candidates}
        savings = {
            name: float(before.get(layer, 0) - after.get(layer, 0) if layer is not None else 0)
            for name, layer in layers.items()
        }
        needed, unit = (
            float(sum(before.values()) - (budget.cache_bytes or 0)),
            f"bytes of the cache to save (cache_bytes: {budget.cache_bytes:,})",
        )
    most = sum(value for value in savings.values() if value > 0)
    if most < needed:
        raise HealingError(f"the budget asks for {needed:g} {unit}, but all candidates together give {most:g}")
    return savings, needed


def _is_rounding(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return properties.distance(ours, theirs) <= properties.allowed("", 0.0, ours.dtype)


def _sum_within(costs: Mapping[str, int], name: str) -> int:
    return sum(value for key, value in costs.items() if key == name or key.startswith(f"{name}."))


def _cache_bytes(model: PreTrainedModel, length: int) -> dict[int, int]:
    """Returns the bytes that each layer keeps in the cache of one row of so many tokens, measured.

    Raises:
        HealingError: the model returns no cache of transformers' own kind.
    """
    tokens = torch.zeros(1, length, dtype=torch.long, device=model.device) + 3
    with torch.no_grad(), anatomy.evaluation(model), foreign.calling("the cache cannot be measured", HealingError):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
        layers = list(cache.layers)
    return {number: sum(t.nbytes for t in contract.tensors_in(vars(layer))) for number, layer in enumerate(layers)}


def choose(scores: Mapping[str, float], savings: Mapping[str, float], needed: float) -> frozenset[str]:
    """Returns the names with the smallest sum of scores whose savings reach what is needed, exactly.

    All sets that no other one beats in both sums are kept from name to name (the Pareto front of the knapsack).
    """
    front: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]
    for name, score in scores.items():
        grown = [(saved + savings[name], cost + max(score, 0.0), (*names, name)) for saved, cost, names in front]
        front = _thin_front([*front, *grown], needed)
    reaching = [entry for entry in front if entry[0] >= needed]
    return frozenset(min(reaching, key=lambda entry: entry[1])[2])


def _thin_front(
    entries: Sequence[tuple[float, float, tuple[str, ...]]], needed: float
) -> list[tuple[float, float, tuple[str, ...]]]:
    """Keeps of all sets those that save more than every cheaper one; beyond what is needed nothing is gained."""
    kept: list[tuple[float, float, tuple[str, ...]]] = []
    most = float("-inf")
    for saved, cost, names in sorted(entries, key=lambda entry: (entry[1], -entry[0])):
        if min(saved, needed) > most:
            kept.append((saved, cost, names))
            most = min(saved, needed)
    return kept


def _choose_greedily(choice: Choice, savings: Mapping[str, float], needed: float) -> frozenset[str]:
    """Adds the module that costs least a unit saved, measured beside those that are chosen, until the budget is met."""
    chosen: list[str] = []
    now = 0.0
    with console.progress("Choosing layers one by one", len(choice.candidates)) as advance:
        while sum(savings[name] for name in chosen) < needed:
            left = [name for name in choice.candidates if name not in chosen and savings[name] > 0]
            found = {name: choice.divergence([*chosen, name]) for name in left}
            best = min(left, key=lambda name: (found[name] - now) / savings[name])
            chosen.append(best)
            now = found[best]
            advance(f"{best} {now:.3g}")
    return frozenset(chosen)
