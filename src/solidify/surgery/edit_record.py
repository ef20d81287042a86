"""The record of what one operation did at one module name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True, repr=False)
class Edit:
    """What one operation did at one module name.

    `declares` are properties that the change does not keep on purpose, `control` is how the model behaved before, by
    probe, and `records` says that transformers records what stands here (hidden states, attentions, router logits).
    `operation` is the `recorded` name of a type in `catalogue.py`; `settings` is what doing it again needs besides
    (an order, the configuration, what is read). `tensors` maps every tensor of the module, by its new name, to the
    tensor that it equals bit for bit, by its old one, or to None where it is new; `dropped` names old tensors that
    live on nowhere. On the meta device, `unknown` names those of which only a build can tell whether they are new.
    Names are full. `frozen` names, relative to the module, the parameters that it froze itself while it left others
    trainable. `further` are classes and functions that the arguments speak of, by their numbers.
    """

    name: str
    old_class: str
    module_class: type[nn.Module] | None
    arguments: dict[str, Any]
    supplied: tuple[str, ...]
    tensors: dict[str, str | None]
    dropped: tuple[str, ...]
    frozen: tuple[str, ...]
    parameters_before: int
    parameters_after: int
    probed: bool
    identical: bool
    bypass: bool
    operation: str = "replace"
    settings: dict[str, Any] = field(default_factory=dict)
    declares: dict[str, bool] = field(default_factory=dict)
    records: bool = False
    control: dict[str, float] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    further: tuple[Any, ...] = ()

    @property
    def new_class(self) -> str:
        """The class name of what stands there now."""
        return self.module_class.__name__ if self.module_class is not None else self.old_class

    def __repr__(self) -> str:
        new = sum(origin is None for origin in self.tensors.values())
        same = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        change = f"{self.old_class} -> {self.new_class}" if self.module_class else f"{self.old_class}({same})"
        return f"Edit({self.operation} {self.name}: {change}, {new} tensors new, {len(self.dropped)} dropped)"

    def document(self) -> dict[str, Any]:
        """Returns the record as plain values for a manifest or a report."""
        return {
            "operation": self.operation,
            "name": self.name,
            "old_class": self.old_class,
            "new_class": self.new_class,
            "arguments": self.arguments,
            "settings": self.settings,
            "new": sorted(n for n, origin in self.tensors.items() if origin is None),
            "kept": {n: origin for n, origin in self.tensors.items() if origin is not None},
            "dropped": sorted(self.dropped),
            "frozen": list(self.frozen),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "declares": dict(self.declares),
            "control": dict(self.control),
            "probed": self.probed,
            "identical": self.identical,
            "bypass": self.bypass,
        }
