"""Lets a loss term see what modules return, during one forward pass, by name and through PEFT's wrappers.

What is of interest inside a module is the output of a submodule of it (a router, a trash can, a layer); a forward hook
on what stands at that name reads it. The hooks live for one forward pass only, so that a recomputation during the
backward pass (gradient checkpointing) counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from solidify.adapter import standing
from solidify.errors import ObjectiveError
from solidify.model import anatomy


@dataclass(frozen=True)
class Capture:
    """Which modules' outputs a term wants: by name pattern, by class name, or as the model itself records them.

    Exactly one of `modules`, `class_name` and `records` is given. `records` is a key of the model's
    `_can_record_outputs` (`router_logits`, `attentions`). `optional` allows that there are none; `count` says how many
    there must be.
    """

    modules: str | None = None
    class_name: str | None = None
    records: str | None = None
    count: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        """Refuses anything but exactly one way of naming."""
        if sum(way is not None for way in (self.modules, self.class_name, self.records)) != 1:
            raise ObjectiveError("a Capture names modules in exactly one way: modules, class_name or records")

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns what stands at the places meant, by name.

        Raises:
            ObjectiveError: there are none, or not as many as `count` says.
        """
        places = {place.name: place for place in standing.modules(model)}
        if self.modules is not None:
            names = anatomy.match(self.modules, places)[self.modules]
        elif self.records is not None:
            classes = _recorded(model, self.records)
            names = [name for name, place in places.items() if isinstance(place.inner, classes)]
        else:
            names = [name for name, place in places.items() if type(place.inner).__name__ == self.class_name]
        found = {name: places[name].called for name in names}
        what = self.modules or self.class_name or f"modules that record {self.records}"
        if not found and not self.optional:
            raise ObjectiveError(f"a loss term looks into {what}, but the model has none")
        if self.count is not None and len(found) != self.count:
            raise ObjectiveError(
                f"a loss term was promised {self.count} of {what}, but the model has {len(found)}: "
                f"{', '.join(list(found)[:8])}"
            )
        return found


def _recorded(model: nn.Module, key: str) -> tuple[type[nn.Module], ...]:
    """Returns the classes whose outputs the model's parts record under `key`.

    `_can_record_outputs` is transformers' own declaration (5.23, `utils/output_capturing.py`); it has no public name.
    """
    classes: list[type[nn.Module]] = []
    for module in standing.plain_model(model).modules():
        declared = module._can_record_outputs if isinstance(module, PreTrainedModel) else None
        specs = (declared or {}).get(key, [])
        for spec in specs if isinstance(specs, list) else [specs]:
            cls = spec.target_class if isinstance(spec, OutputRecorder) else spec
            if isinstance(cls, type):
                classes.append(cls)
    return tuple(classes)


Key = TypeVar("Key", bound=Hashable)


@contextmanager
def capture(model: nn.Module, wanted: Mapping[Key, Capture]) -> Iterator[dict[Key, dict[str, Any]]]:
    """Yields a mapping that a forward pass inside the block fills: for every key, output by module name.

    Raises:
        ObjectiveError: a module is not there, or is called twice in one pass.
    """
    captured: dict[Key, dict[str, Any]] = {key: {} for key in wanted}
    handles = []
    for key, spec in wanted.items():
        for name, module in spec.find(model).items():
            handles.append(module.register_forward_hook(_hook(captured[key], name)))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _hook(store: dict[str, Any], name: str) -> Any:
    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        """Stores what the module returned."""
        if name in store:
            raise ObjectiveError(f"{name} ran twice in one forward pass; a loss term cannot tell which one counts")
        store[name] = output

    return keep
