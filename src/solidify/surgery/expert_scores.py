"""What calibration says of the experts of MoE blocks, as values: a table of scores, and the experts chosen by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from solidify.errors import SurgeryError, refuse
from solidify.system import markup

if TYPE_CHECKING:
    import torch


def _mean_gain(sums: torch.Tensor, counts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns the mean over the tokens that an expert gets of its gate times the norm of its output.

    REAP, arXiv 2510.13999, equation 9.
    """
    return sums / counts.clamp(min=1)


def _share_of_tokens(sums: torch.Tensor, counts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns the share of the tokens that an expert gets."""
    return counts.double() / tokens


# Scores by their names in recipes. Each gets, of one block, the sums over tokens of gate times norm of the output, the
# number of tokens of each expert (number of experts,), and of all.
METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "reap": _mean_gain,
    "frequency": _share_of_tokens,
}
if TYPE_CHECKING:
    By = str
else:
    By = Literal[tuple(METHODS)]


@dataclass(frozen=True)
class ExpertChoice(Mapping[str, Sequence[int]]):
    """Which experts each block keeps, in order: block -> numbers; `by` says how they were chosen.

    `evidence` is what records say of that: the digest of the table of scores and its tokens. A `planned` choice stands
    for one that is made later.
    """

    orders: Mapping[str, Sequence[int]]
    by: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = False

    def __getitem__(self, name: str) -> Sequence[int]:
        return self.orders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)


@dataclass(frozen=True, repr=False)
class ExpertScores:
    """Scores of experts, by the name of their block, each list in the order of the experts' numbers.

    `scores` are what `by` means (`METHODS`), `counts` how many of the `tokens` (padding left out) each expert got. An
    expert that got no token has the score 0. `groups` is the number of groups that a block's router chooses among
    first, where it does.
    """

    by: str
    scores: Mapping[str, Sequence[float]]
    counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tokens: int = 0
    groups: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> ExpertScores:
        """Returns the table that `document` has written as plain values."""
        blocks = document["blocks"]
        return cls(
            document["by"],
            {name: list(block["scores"]) for name, block in blocks.items()},
            {name: list(block["counts"]) for name, block in blocks.items()},
            document["tokens"],
            {name: block["groups"] for name, block in blocks.items() if "groups" in block},
        )

    def document(self) -> dict[str, Any]:
        """Returns the table as plain values, for JSON."""
        blocks = {
            name: {"scores": list(scores), "counts": list(self.counts.get(name, ())), **self._describe_groups(name)}
            for name, scores in self.scores.items()
        }
        return {"by": self.by, "tokens": self.tokens, "blocks": blocks}

    def digest(self) -> str:
        """Returns the digest of the table."""
        from solidify.weights import hashing

        return hashing.digest_values(self.document())

    def keep(self, count: int) -> ExpertChoice:
        """Chooses, in every block, the `count` experts with the highest scores, in the order of their numbers.

        Where a router chooses among groups first, they are the best of each group, as many of each. Of equal scores
        the lower number wins.

        Raises:
            SurgeryError: a block has not so many experts, or its groups cannot keep as many each.
        """
        faults = find_uncountable(count, self._sizes(), self.groups)
        refuse(SurgeryError, "the experts cannot be chosen as asked", faults)
        orders = {
            name: best_of_each(_rank(scores), count, self.groups.get(name, 1)) for name, scores in self.scores.items()
        }
        return ExpertChoice(orders, self.by, {"scores": self.digest(), "tokens": self.tokens})

    def _describe_groups(self, name: str) -> dict[str, int]:
        return {"groups": self.groups[name]} if self.groups.get(name, 1) > 1 else {}

    def _sizes(self) -> dict[str, int]:
        return {name: len(scores) for name, scores in self.scores.items()}

    def __repr__(self) -> str:
        return f"ExpertScores(by {self.by}; {len(self.scores)} blocks; {self.tokens:,} tokens)"

    def __str__(self) -> str:
        lines = [repr(self)]
        for name, scores in self.scores.items():
            ranked = _rank(scores)
            lines.append(f"  {name}: " + ", ".join(f"{expert} ({scores[expert]:.4g})" for expert in ranked))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        unknown: list[Any] = [""]
        rows = [
            (name, expert, f"{score:.6g}", count)
            for name, scores in self.scores.items()
            for expert, (score, count) in enumerate(
                zip(scores, self.counts.get(name) or unknown * len(scores), strict=True)
            )
        ]
        return markup.table(repr(self), ("block", "expert", self.by, "tokens"), rows)


def find_uncountable(count: Any, sizes: Mapping[str, int], groups: Mapping[str, int] | None = None) -> list[str]:
    """Says in which blocks so many experts cannot be kept, as many in each of their `groups`."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return [f"the number of experts to keep is a whole number of at least 1, but {count!r} was given"]
    faults = [f"{name} has {size} experts, so {count} cannot be kept" for name, size in sizes.items() if count > size]
    faults += [
        f"the router of {name} has {number} groups of {sizes[name] // number} experts, all to keep as many, so {count} "
        f"cannot be kept: keep N in each group of {sizes[name] // number}, {number} N in all"
        for name, number in (groups or {}).items()
        if count <= sizes[name] and count % number
    ]
    return faults


def best_of_each(ranked: Sequence[int], count: int, groups: int) -> list[int]:
    """Returns the first `count` of ranked experts, as many of each of so many groups, in the order of their numbers."""
    size = len(ranked) // groups
    return sorted(
        expert
        for group in range(groups)
        for expert in [each for each in ranked if each // size == group][: count // groups]
    )


def _rank(scores: Sequence[float]) -> list[int]:
    """Returns the experts' numbers, the best first."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
