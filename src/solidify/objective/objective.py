"""The objective: a weighted sum of loss terms, whose gradient does not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from solidify.errors import ObjectiveError, refuse
from solidify.objective.capture import Capture
from solidify.objective.term import Term as Term
from solidify.objective.weights import Constraint


class Objective:
    """A weighted sum of terms. `reference` is a second model: a teacher, or a model to use as the unmodified base.

    Raises:
        ObjectiveError: two terms have one name, none is a loss, or a weight follows a term that is not there.
    """

    def __init__(self, terms: Sequence[Term], *, reference: nn.Module | None = None) -> None:
        if not terms:
            raise ObjectiveError("an objective has at least one term")
        names = [term.name for term in terms]
        faults = [
            f"two terms are called {n!r}; give one a `name`" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        losses = {term.name for term in terms if term.reduction != "none"}
        for term in terms:
            follows = term.weight.measure if isinstance(term.weight, Constraint) else None
            if follows is not None and follows not in losses:
                faults.append(
                    f"the weight of {term.name} follows {follows!r}, which is not a loss term of this objective"
                )
        refuse(ObjectiveError, "terms are known by their names", faults)
        if not losses:
            raise ObjectiveError("no term of the objective is a loss; add {loss: model}")
        self.terms = list(terms)
        self.reference = reference

    @property
    def captures(self) -> dict[tuple[str, str], Capture]:
        """What all terms want to see, by term and by the term's own word for it."""
        return {(term.name, key): spec for term in self.terms for key, spec in term.captures.items()}

    @property
    def reference_captures(self) -> dict[tuple[str, str], Capture]:
        """What all terms want to see inside the reference, likewise."""
        return {(term.name, key): spec for term in self.terms for key, spec in term.reference_captures.items()}

    @property
    def columns(self) -> set[str]:
        """Columns of a batch that terms read and the model does not take, as their `columns` attribute says."""
        return {column for term in self.terms for column in getattr(term.subject, "columns", ())}

    @property
    def asks_reference(self) -> bool:
        """Whether any term needs the reference to run."""
        return any(term.asks_reference for term in self.terms)

    def asks_for(self, *names: str) -> bool:
        """Returns whether any term asks for one of `names`."""
        return any(term.asks & set(names) for term in self.terms)

    @property
    def has_model_term(self) -> bool:
        """Whether the model's own loss is part of the sum."""
        return any(term.is_model for term in self.terms)
