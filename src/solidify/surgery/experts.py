"""Chooses, repeats and reorders the experts of MoE blocks by their numbers, experts and router together.

The whole operation: its type and its functions. Which tensors belong to the experts is found by their shapes
(`expert_parts.py`) and then proved (`expert_proof.py`): with all experts renumbered, a block must compute what it
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from operator import index
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from solidify.errors import SurgeryError, refuse
from solidify.surgery.expert_scores import By, ExpertChoice, best_of_each, find_uncountable
from solidify.surgery.operation import Context, Operation, Record, broken_rule

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.model.extent import Extent
    from solidify.surgery.edit_record import Edit

_ORDERS = ("order", "keep", "copies")
_REFUSED = "the experts cannot be rearranged as asked"


class RearrangeExperts(Operation):
    """One step of surgery: the blocks that `rearrange_experts` names have other experts, or choose more or fewer.

    Which ones, `order` lists (a number that is left out goes, one that comes twice is copied); or the `keep` best of
    each block stay, as `by` scores them on the first `rows` rows of the recipe's data; or all are there `copies` times,
    and each token gets so many times as many, which keeps the function. `experts_per_token` is how many a token gets.
    """

    asked = recorded = "rearrange_experts"
    shapes = runs = True

    rearrange_experts: str | list[str]
    expect: str
    order: list[Annotated[int, Field(ge=0)]] | None = Field(default=None, min_length=1)
    keep: int | None = Field(default=None, ge=1)
    by: By = "reap"
    rows: int = Field(default=128, ge=1)
    copies: int | None = Field(default=None, ge=2)
    experts_per_token: int | None = Field(default=None, ge=1)
    count: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check_together(self) -> RearrangeExperts:
        given = [key for key in _ORDERS if getattr(self, key) is not None]
        if len(given) > 1:
            raise broken_rule(f"{' and '.join(given)} say each which experts there are; give one of them")
        if not given and self.experts_per_token is None:
            raise broken_rule("give `order`, `keep` or `copies`, or `experts_per_token`")
        if self.keep is None and {"by", "rows"} & self.model_fields_set:
            raise broken_rule("`by` and `rows` say how the experts that `keep` counts are chosen: give `keep`")
        if self.copies is not None and self.experts_per_token is not None:
            raise broken_rule("`copies` says how many experts a token gets too; leave `experts_per_token` out")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the step needs data."""
        return self.keep is not None

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Rearranges the experts, which are scored first where `keep` asks for it."""
        where = self.rearrange_experts
        common: dict[str, Any] = {"expect": self.expect, "count": self.count, "extent": context.extent}
        if self.copies is not None:
            return duplicate_experts(model, where, self.copies, **common)
        order: Any = self.order if self.keep is None else self._choose(model, context)
        return rearrange_experts(model, where, order, experts_per_token=self.experts_per_token, **common)

    def _choose(self, model: PreTrainedModel, context: Context) -> ExpertChoice:
        """Scores the experts; on the meta device, where nothing can be, the first ones stand for the chosen."""
        from solidify.model import anatomy
        from solidify.surgery import expert_parts, selection

        assert self.keep is not None
        names = selection.targets(model, self.rearrange_experts, self.expect, self.count)
        sizes = {name: int(expert_parts.plan_block(model, name, [])["size"]) for name in names}
        faults = expert_parts.find_missing(model, sizes)
        groups = {name: expert_parts.count_groups(model, name) for name in names}
        refuse(SurgeryError, _REFUSED, faults or find_uncountable(self.keep, sizes, groups))
        if anatomy.is_meta(model):
            first = {n: best_of_each(range(sizes[n]), self.keep, groups[n]) for n in names}
            return ExpertChoice(first, self.by, {"rows": self.rows}, planned=True)
        return context.scores(model, names, self.by, self.rows).keep(self.keep)

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Measures the tensors and lists that have one row or item per expert."""
        from solidify.surgery.expert_parts import get_path

        settings = edit["settings"]
        size = len(settings["order"])
        further = settings.get("further", {})
        found = {p: get_path(module, p).shape[dim] - further.get(p, 0) for p, dim in settings["tensors"].items()}
        found |= {path: len(get_path(module, path)) for path in settings["lists"]}
        wrong = [f"{path} has {rows} experts, not {size}" for path, rows in found.items() if rows != size]
        named = {p: (get_path(module, p).shape[1], width) for p, width in settings.get("tables", {}).items()}
        wrong += [
            f"{path} names {now} experts a row, not {width}" for path, (now, width) in named.items() if now != width
        ]
        numbers = settings.get("chosen", {}) | settings.get("groups", {})
        chosen = {path: (get_path(module, path), number) for path, number in numbers.items()}
        wrong += [f"{path} is {now}, not {number}" for path, (now, number) in chosen.items() if now != number]
        return f"has {size} experts", wrong

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what an artifact does when its constructor has built the blocks as they were."""
        from solidify.surgery.expert_taking import take_experts

        return take_experts


def rearrange_experts(
    model: PreTrainedModel,
    target: str | Sequence[str],
    order: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    *,
    experts_per_token: int | None = None,
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Gives the MoE blocks that `target` names the experts that `order` lists, and returns the edits.

    Expert `order[i]` (counted from 0) becomes expert `i`, with its column of the router: a number that is left out goes
    with the tokens that it would have had, one that comes twice is copied, and both copies are chosen among. A mapping
    has an order for each block, by its name, as `ExpertScores.keep` chooses them. With `experts_per_token`, a token
    gets so many; without an order, the experts then stay as they are. Once all blocks of a configuration have as many
    experts, in one call or in several, the configuration and the modules that count them say so too, and the family's
    own class can hold the result. Until then router logits are not recorded.

    Raises:
        SurgeryError: what is named has no experts or others than its router chooses from; `order` names an expert that
            is not there, or fewer than a token gets; the changed model does not run, or behaves otherwise than before
            (with and without a cache, beside other rows). The model is then as it was.
    """
    from solidify.surgery import expert_change, selection

    names = selection.targets(model, target, expect, count)
    if order is None and experts_per_token is None:
        raise SurgeryError(f"{_REFUSED}: nothing is asked for; give an order, experts_per_token, or both")
    orders = _read_orders(order, names) if order is not None else expert_change.present_orders(model, names)
    chosen = None if experts_per_token is None else dict.fromkeys(names, experts_per_token)
    choice = order if isinstance(order, ExpertChoice) else None
    return expert_change.change(model, orders, chosen, choice=choice, extent=extent)


def duplicate_experts(
    model: PreTrainedModel,
    target: str | Sequence[str],
    copies: int = 2,
    *,
    expect: str | None = None,
    count: int | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Gives the MoE blocks every expert `copies` times, side by side, and each token so many times as many experts.

    A token then gets all copies of the experts that it had. Where the router divides their weights by their sum, or
    takes a softmax over all experts, each copy has an equal part of the weight, and the model computes what it
    computed, up to rounding; that it does is measured.

    Raises:
        SurgeryError: as `rearrange_experts`; or the model computes something else, as with a router whose weights do
            not depend on how many are chosen. It is then as it was.
    """
    from solidify.surgery import expert_change, selection

    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 2:
        raise SurgeryError(f"{_REFUSED}: copies is a whole number of at least 2, but {copies!r} was given")
    names = selection.targets(model, target, expect, count)
    present = expert_change.present_orders(model, names)
    refuse(SurgeryError, _REFUSED, expert_change.find_moved_groups(model, present))
    orders = {name: [expert for expert in order for _ in range(copies)] for name, order in present.items()}
    chosen = {name: copies * number for name, number in expert_change.present_choices(model, names).items()}
    return expert_change.change(model, orders, chosen, extent=extent, same=f"{copies} copies of each expert")


def _read_orders(order: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Returns the order of every block, from one for all or one for each."""
    if not isinstance(order, Mapping) or not all(isinstance(key, str) for key in order):
        return dict.fromkeys(names, _read_order(order))
    faults = [f"there is no order for {name}" for name in names if name not in order]
    faults += [f"there is an order for {name!r}, which is none of the blocks" for name in order if name not in names]
    refuse(SurgeryError, _REFUSED, faults)
    return {name: _read_order(order[name]) for name in names}


def _read_order(order: Any) -> list[int]:
    """Returns the numbers as plain ones, whatever holds them (a range, numpy, torch)."""
    listed = order.tolist() if hasattr(order, "tolist") else order
    if isinstance(listed, Iterable) and not isinstance(listed, (str, bytes, Mapping, Set)):
        listed = list(listed)
    if not isinstance(listed, list):
        raise SurgeryError(f"`order` lists experts by their numbers, as in [5, 2, 0], but it is {listed!r}")
    wrong = [each for each in listed if isinstance(each, bool) or not hasattr(each, "__index__")]
    if wrong:
        raise SurgeryError(f"`order` lists experts by their numbers, as in [5, 2, 0], but holds {wrong[0]!r}")
    return [index(each) for each in listed]
