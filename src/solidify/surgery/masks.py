"""Gives a model, or some of its layers, another mask, as a declaration: which positions a position sees.

The operation's type and its function. What a mask is stands in `masking.py`; `attentions.py` puts it on, and never
concludes from a flag that it holds: `influence.py` measures which positions a change moves, before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, model_validator

from solidify.errors import SurgeryError, refuse
from solidify.surgery.operation import Context, Operation, Record, broken_rule

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.model.extent import Extent
    from solidify.surgery.edit_record import Edit

Kind = Literal["causal", "bidirectional", "block_causal", "window"]


class Mask(Operation):
    """One step of surgery: the whole model, or the `layers` that are named, has another mask.

    A block has `block` tokens; a window the last `window` positions, and the first `sinks` of the text.
    """

    asked = recorded = "mask"
    shapes = runs = True

    mask: Kind
    block: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    sinks: int | None = Field(default=None, ge=0)
    layers: str | list[str] | None = None
    expect: str | None = None

    @model_validator(mode="after")
    def _check_numbers(self) -> Mask:
        faults = _find_odd_numbers(self.mask, {"block": self.block, "window": self.window, "sinks": self.sinks})
        if faults:
            raise broken_rule("; ".join(faults))
        return self

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Gives the model the mask."""
        return mask(
            model,
            self.mask,
            self.layers,
            block=self.block,
            window=self.window,
            sinks=self.sinks,
            expect=self.expect,
            extent=context.extent,
        )

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Looks for the hook, or for what the configuration says."""
        from solidify.surgery.masking import describe, find_masks

        settings = edit["settings"]
        asked = {key: settings[key] for key in ("kind", "block", "window", "sinks")}
        found = find_masks(module)
        held = found == [asked] if settings["hooked"] else not found
        ahead = getattr(getattr(module, "config", None), "is_causal", True) is False
        if not settings["hooked"] and settings["kind"] == "bidirectional":
            held = held and ahead
        return f"has the mask {describe(asked)}", [] if held else [f"has no longer the mask {describe(asked)}"]

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what an artifact does when its constructor has built the attentions as they were."""
        from solidify.surgery.masking import set_masks

        return set_masks


def mask(
    model: PreTrainedModel,
    kind: Kind,
    target: str | Sequence[str] | None = None,
    *,
    block: int | None = None,
    window: int | None = None,
    sinks: int | None = None,
    expect: str | None = None,
    extent: Extent | None = None,
) -> list[Edit]:
    """Gives the model (or the layers or attentions that `target` names) another mask, and returns the edits.

    `causal`: a position sees itself and earlier ones; `bidirectional`: all; `block_causal`: its own block of `block`
    positions whole, and all earlier blocks; `window`: the last `window` positions, its own among them, and the first
    `sinks` (0 if left out) of its text. Padding is never seen, and positions are counted from the first that is none.
    A layer that slides by itself keeps its own window within the mask, and has no sinks.

    Masks that look ahead declare `{causal: False, cache: False}`: the model then generates without a cache. Of all of a
    model, `bidirectional` is a matter of the configuration where the family obeys it (`is_causal`); everything else is
    a hook on each attention, which an artifact carries, and which needs attention by `sdpa` or `eager`.

    What is declared is measured: at each named attention, and of the whole model, a change of the input at one position
    moves exactly those positions that the mask, composed through the layers, lets see it, with and without padding on
    the left. Numbers larger than 8 (`block`), 6 (`window`) and 2 (`sinks`) are tried with these. Of a large model the
    first attention of each kind is measured. On the meta device nothing is.

    Raises:
        SurgeryError: the numbers do not fit the kind; a layer has no attention that takes a mask; a family does not
            obey it, or does not run; something else that the model did is not kept. The model is then as it was.
    """
    from solidify.surgery import attentions

    numbers = {"block": block, "window": window, "sinks": sinks}
    refuse(SurgeryError, "the mask is not one that can be given", _find_odd_numbers(kind, numbers))
    asked = {"kind": kind, **numbers, "sinks": (sinks or 0) if kind == "window" else None}
    return attentions.give_mask(model, asked, target, expect, extent)


def _find_odd_numbers(kind: str, numbers: Mapping[str, Any]) -> list[str]:
    if kind not in get_args(Kind):
        return [f"there is no mask {kind!r}; there are {', '.join(get_args(Kind))}"]
    needed = {"block_causal": "block", "window": "window"}.get(kind)
    taken = {needed, "sinks"} if kind == "window" else {needed}
    faults = [f"the mask {kind} needs {needed!r}, a number of positions"] if needed and numbers[needed] is None else []
    for key, value in numbers.items():
        least = 0 if key == "sinks" else 1
        if value is not None and key not in taken:
            faults.append(f"{key!r} is no number of the mask {kind}")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            faults.append(f"{key!r} is {value!r}, but is a whole number of at least {least}")
    return faults
