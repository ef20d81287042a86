"""Lets a loss term see inside the model, during one forward pass, by name and through PEFT's and parallel wrappers.

What is of interest inside a module is what it returns or what it is given; a forward hook on what stands at that name
reads it. A module that computes something which no submodule of it returns declares it with a tap, a submodule
`self.gate_probe = nn.Identity()` that it passes the tensor through. Hooks count in one forward pass only, so that a
recomputation during the backward pass (gradient checkpointing) counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.model import anatomy
from solidify.upstream.transformers import OutputRecorder, recorded_outputs

_ROUTERS = "router_logits"  # how transformers calls what routers return
_DECLARED = "routers"  # the class attribute by which a module of the user's says which of its parts are routers


@dataclass(frozen=True)
class Capture:
    """Which modules a term looks at: by name pattern (or several), by class name, or as the model itself records them.

    Exactly one of `modules`, `class_name` and `records` is given. `records` is a key of the model's
    `_can_record_outputs` (`router_logits`, `attentions`); to the routers belong those that a class of your own declares
    by an attribute `routers`, a name inside the module (or several). `of` says whether their `output` or their `input`
    (the first argument) is wanted, and `element` which one where it is a tuple; `element=0` also takes a value that is
    none.
    `optional` allows that there are no such modules; `count` says how many there must be.
    """

    modules: str | Sequence[str] | None = None
    class_name: str | None = None
    records: str | None = None
    of: str = "output"
    element: int | None = None
    count: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        """Refuses anything but exactly one way of naming."""
        if self.of not in ("output", "input"):
            raise ObjectiveError(f"the `of` of a Capture must be 'output' or 'input', but is {self.of!r}")
        if sum(way is not None for way in (self.modules, self.class_name, self.records)) != 1:
            raise ObjectiveError("a Capture names modules in exactly one way: modules, class_name or records")
        patterns = self._list_patterns()
        if self.modules is not None and not (patterns and all(isinstance(each, str) for each in patterns)):
            raise ObjectiveError(
                f"a Capture names modules by one pattern or a list of them, but not by {self.modules!r}"
            )

    def _list_patterns(self) -> list[Any]:
        if isinstance(self.modules, (list, tuple)):
            return list(self.modules)
        return [self.modules]

    def find(self, model: nn.Module) -> dict[str, nn.Module]:
        """Returns the modules that are meant, by name.

        Raises:
            ObjectiveError: there are none, or not as many as `count` says.
        """
        by_name = {located.name: located for located in lookup.modules(model)}
        if self.modules is not None:
            hits = anatomy.match(self._list_patterns(), by_name)
            names = list(dict.fromkeys(name for found in hits.values() for name in found))
            missed = [pattern for pattern, found in hits.items() if not found]
            if missed and not self.optional:
                raise ObjectiveError(
                    f"a loss term looks into {', '.join(missed)}, but the model has none; "
                    f"{anatomy.suggestions(missed[0], by_name)}"
                )
        elif self.records is not None:
            classes = tuple(recorded(model, self.records))
            names = [name for name, located in by_name.items() if isinstance(located.inner, classes)]
            names += _find_declared(by_name) if self.records == _ROUTERS else []
            names = list(dict.fromkeys(names))
        else:
            names = [name for name, located in by_name.items() if type(located.inner).__name__ == self.class_name]
        found = {name: by_name[name].called for name in names}
        what = (
            ", ".join(self._list_patterns())
            if self.modules
            else self.class_name or f"modules that record {self.records}"
        )
        if not found and not self.optional:
            raise ObjectiveError(f"a loss term looks into {what}, but the model has none{self._suggest_remedy()}")
        if self.count is not None and len(found) != self.count:
            raise ObjectiveError(
                f"a loss term expects {self.count} of {what}, but the model has {len(found)}: "
                f"{', '.join(list(found)[:8])}"
            )
        return found

    def _suggest_remedy(self) -> str:
        if self.records is None:
            return ""
        return (
            "; name the modules that return them (routers: `modules` in the term's arguments, or an attribute "
            "`routers` of the class that holds them), because transformers records only classes of its own without that"
        )


def _find_declared(by_name: Mapping[str, lookup.Located]) -> list[str]:
    """Returns the routers that classes declare by an attribute `routers`, a name inside the module or several.

    Raises:
        ObjectiveError: a class declares one that is not there.
    """
    found: list[str] = []
    for name, located in by_name.items():
        declared = getattr(type(located.inner), _DECLARED, None)
        patterns = [declared] if isinstance(declared, str) else declared
        if not (isinstance(patterns, (list, tuple)) and all(isinstance(each, str) for each in patterns)):
            continue
        for inside, hits in anatomy.match([f"{name}.{each}" if name else each for each in patterns], by_name).items():
            if not hits:
                raise ObjectiveError(
                    f"{type(located.inner).__name__} declares {_DECLARED} = {declared!r}, but there is no {inside}; "
                    f"{anatomy.suggestions(inside, by_name)}"
                )
            found += hits
    return found


def recorded(model: nn.Module, key: str) -> dict[type[nn.Module], int]:
    """Returns the classes whose outputs the model's parts record under `key`, and which element of them."""
    found: dict[type[nn.Module], int] = {}
    for module in lookup.plain_model(model).modules():
        declared = recorded_outputs(module) if isinstance(module, PreTrainedModel) else {}
        specs = declared.get(key, [])
        for spec in specs if isinstance(specs, list) else [specs]:
            cls, index = (spec.target_class, int(spec.index)) if isinstance(spec, OutputRecorder) else (spec, 0)
            if isinstance(cls, type):
                found.setdefault(cls, index)
    return found


Key = TypeVar("Key", bound=Hashable)


_UNSEEN = ContextVar("passes that no recorder sees", default=False)


@contextmanager
def unseen() -> Iterator[None]:
    """Lets passes inside the block go unseen by every recorder: they repeat one that was seen."""
    before = _UNSEEN.set(True)
    try:
        yield
    finally:
        _UNSEEN.reset(before)


class Recorder(Generic[Key]):
    """Hooks on the modules that terms look at. They stand as long as the recorder does, and record while it is open.

    They are not put there anew for each pass, because torch.compile traces the hooks that it finds the first time.

    Raises:
        ObjectiveError: a module is not there, or (in a pass) is called twice, or does not return what was asked for.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[Key, Capture]) -> None:
        self._captured: dict[Key, dict[str, Any]] = {key: {} for key in wanted}
        self._open = False
        self._graded = False
        self._handles = [
            module.register_forward_hook(self._make_hook(key, name, spec), with_kwargs=True)
            for key, spec in wanted.items()
            for name, module in spec.find(model).items()
        ]

    @contextmanager
    def recording(self, *, graded: bool = False) -> Iterator[dict[Key, dict[str, Any]]]:
        """Yields a mapping that forward passes inside the block fill: for every key, what was seen by module name.

        With `graded` only passes that build a graph count: a trainer may run a reference in between, without one.
        """
        for seen in self._captured.values():
            seen.clear()
        self._open, self._graded = True, graded
        result = dict(self._captured)
        try:
            yield result
        finally:
            self._open = False
            result.update({key: dict(seen) for key, seen in self._captured.items()})
            for seen in self._captured.values():
                seen.clear()  # no graph is kept alive by it

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Lets passes inside the block go unseen."""
        before, self._open = self._open, False
        try:
            yield
        finally:
            self._open = before

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _make_hook(self, key: Key, name: str, spec: Capture) -> Any:
        store = self._captured[key]

        def keep(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            """Stores what the module returned, or was given."""
            if not self._open or _UNSEEN.get() or (self._graded and not torch.is_grad_enabled()):
                return
            if name in store:
                raise ObjectiveError(f"{name} ran twice in one forward pass; a loss term cannot tell which one counts")
            seen = output if spec.of == "output" else args[0] if args else next(iter(kwargs.values()))
            store[name] = seen if spec.element is None else _take_element(name, seen, spec.element)

        return keep


def _take_element(name: str, seen: Any, index: int) -> Any:
    if not isinstance(seen, (tuple, list)):
        if index == 0:
            return seen
        raise ObjectiveError(f"a loss term wants element {index} of what {name} returns, which is a single value")
    if index >= len(seen):
        raise ObjectiveError(f"a loss term wants element {index} of what {name} returns, which has {len(seen)}")
    if seen[index] is None:
        raise ObjectiveError(
            f"element {index} of what {name} returns is None; attention weights exist with "
            'attn_implementation="eager" only'
        )
    return seen[index]


@contextmanager
def capture(model: nn.Module, wanted: Mapping[Key, Capture]) -> Iterator[dict[Key, dict[str, Any]]]:
    """Yields a mapping that a forward pass inside the block fills: for every key, what was seen by module name.

    Raises:
        ObjectiveError: a module is not there, or is called twice in one pass.
    """
    recorder = Recorder(model, wanted)
    try:
        with recorder.recording() as captured:
            yield captured
    finally:
        recorder.remove()
