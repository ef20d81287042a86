"""Which modules of a model are meant: by a pattern, a class or a question, and shown before anything is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from solidify import markup
from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy

Where = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, repr=False)
class Selection:
    """Modules of a model, by their names as `named_modules()` gives them, in that order. It prints as a tree."""

    model: PreTrainedModel = field(compare=False)
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def classes(self) -> dict[str, int]:
        """How many of the modules are of each class, by its name."""
        found = [type(self.model.get_submodule(name)).__name__ for name in self.names]
        return {kind: found.count(kind) for kind in dict.fromkeys(found)}

    def rows(self) -> list[tuple[str, str, int, int]]:
        """Returns name, class, how many, and parameters; modules whose names differ in numbers only are one row."""
        groups: dict[tuple[str, str], list[str]] = {}
        for name in self.names:
            kind = type(self.model.get_submodule(name)).__name__
            groups.setdefault((anatomy.fold([name])[0], kind), []).append(name)
        return [
            (names[0] if len(names) == 1 else pattern, kind, len(names), sum(map(self._parameters, names)))
            for (pattern, kind), names in groups.items()
        ]

    def _parameters(self, name: str) -> int:
        return anatomy.count(self.model.get_submodule(name).parameters())

    def __repr__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.classes.items())
        return f"Selection({kinds})"

    def __str__(self) -> str:
        """Draws the modules as a tree, with the class and how many stand at the end of each branch."""
        lines: list[str] = [type(self.model).__name__]
        seen: set[tuple[str, ...]] = set()
        for name, kind, times, parameters in self.rows():
            parts = name.split(".")
            for depth in range(1, len(parts)):
                if tuple(parts[:depth]) not in seen:
                    seen.add(tuple(parts[:depth]))
                    lines.append(f"{'│ ' * (depth - 1)}├ {parts[depth - 1]}")
            told = f"{kind}{f' x {times}' if times > 1 else ''}, {parameters:,} parameters"
            lines.append(f"{'│ ' * (len(parts) - 1)}├ {parts[-1]}  ● {told}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(name, kind, times, f"{parameters:,}") for name, kind, times, parameters in self.rows()]
        return markup.table(type(self.model).__name__, ("module", "class", "how many", "parameters"), rows)


def select(model: PreTrainedModel, where: Where) -> Selection:
    """Finds the modules that a pattern (`*` is one dotted part, `**` any number), or a list of them, names, all modules
    of a class, or all of which a function of name and module is true. The model itself is none of them.

    Raises:
        SurgeryError: nothing is found, or one of the patterns names nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(where, type):
        names = [name for name, module in modules.items() if isinstance(module, where)]
        faults = [] if names else [f"no module is a {where.__name__}; there are {', '.join(_kinds(modules.values()))}"]
    elif callable(where):
        names = [name for name, module in modules.items() if where(name, module)]
        faults = [] if names else [f"of none of {len(modules)} modules the function is true"]
    else:
        everywhere = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        hits = anatomy.match(where, everywhere)
        names = [name for name in everywhere if any(name in found for found in hits.values())]
        faults = [
            f"{pattern!r} names no module; {anatomy.suggestions(pattern, modules)}"
            for pattern, found in hits.items()
            if not found
        ]
    refuse(SurgeryError, "nothing is selected", faults)
    return Selection(model, tuple(names))


def _kinds(modules: Iterable[nn.Module]) -> list[str]:
    return sorted({type(module).__name__ for module in modules})[:12]
