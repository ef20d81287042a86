"""Which modules of a model are meant: by a pattern, a class or a question, and shown before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy
from solidify.system import markup

Where = str | Sequence[str] | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, repr=False)
class Selection:
    """Modules of a model, as they were when they were selected, in the model's order. It prints as a tree.

    `found` has name, class and number of parameters of each.
    """

    model: PreTrainedModel
    found: tuple[tuple[str, str, int], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules' names."""
        return tuple(name for name, _, _ in self.found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def classes(self) -> dict[str, int]:
        """How many of the modules are of each class, by its name."""
        kinds = [kind for _, kind, _ in self.found]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def rows(self) -> list[tuple[str, str, int, int]]:
        """Returns name, class, how many, and parameters; modules whose names differ in numbers only are one row."""
        groups: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for name, kind, parameters in self.found:
            groups.setdefault((anatomy.fold([name])[0], kind), []).append((name, parameters))
        return [
            (each[0][0] if len(each) == 1 else pattern, kind, len(each), sum(count for _, count in each))
            for (pattern, kind), each in groups.items()
        ]

    def __repr__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.classes.items())
        return f"Selection({kinds})"

    def __str__(self) -> str:
        """Draws the modules as a tree, with the class and how many stand at the end of each branch."""
        root = _Branch()
        for name, kind, times, parameters in self.rows():
            branch = root
            for part in name.split("."):
                branch = branch.branches.setdefault(part, _Branch())
            branch.ends.append(f"{kind}{f' x {times}' if times > 1 else ''}, {parameters:,} parameters")
        return "\n".join([type(self.model).__name__, *_draw_branches(root)])

    def _repr_html_(self) -> str:
        rows = [(name, kind, times, f"{parameters:,}") for name, kind, times, parameters in self.rows()]
        return markup.table(type(self.model).__name__, ("module", "class", "how many", "parameters"), rows)


def select(model: PreTrainedModel, where: Where) -> Selection:
    """Finds the modules that a pattern (`*` is one dotted part, `**` any number), or a list of them, names, all modules
    of a class, or all of which a function of name and module is true. The model itself is none of them.

    Raises:
        SurgeryError: nothing is found, or one of the patterns names nothing.
    """
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    faults: list[str] = []
    if isinstance(where, nn.Module) or not (callable(where) or isinstance(where, Sequence)):
        faults, names = [f"{type(where).__name__} is not a pattern, class or function; give a name or a class"], []
    elif isinstance(where, type):
        names = [name for name, module in modules.items() if isinstance(module, where)]
        faults = (
            []
            if names
            else [
                f"no module is of class {where.__name__}; the model's classes: "
                f"{', '.join(_list_kinds(modules.values()))}"
            ]
        )
    elif callable(where):
        names = [name for name, module in modules.items() if where(name, module)]
        faults = [] if names else [f"the function is true for none of {len(modules)} modules"]
    else:
        hits = anatomy.match(where, list(modules))
        names = [name for name in modules if any(name in found for found in hits.values())]
        faults = [
            f"{pattern!r} names no module; {anatomy.suggestions(pattern, modules)}"
            for pattern, found in hits.items()
            if not found
        ]
        faults = faults or ([] if names else ["no pattern is given"])
    refuse(SurgeryError, "nothing is selected", faults)
    described = ((name, type(modules[name]).__name__, anatomy.count(modules[name].parameters())) for name in names)
    return Selection(model, tuple(described))


def targets(model: PreTrainedModel, target: str | Sequence[str], expect: str | None, count: int | None) -> list[str]:
    """Resolves the target patterns and refuses every way in which they can mean something else."""
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"surgery is done on a transformers model, and not on {type(model).__name__}")
    modules = {name: m for name, m in model.named_modules() if name}
    everywhere = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    hits = anatomy.match(target, list(everywhere))
    faults = [
        f"{pattern!r} names no module; {anatomy.suggestions(pattern, modules)}"
        for pattern, found in hits.items()
        if not found
    ]
    names = [name for found in hits.values() for name in found]
    faults += [f"{name} is hit by two patterns" for name, times in sorted(Counter(names).items()) if times > 1]
    names = list(dict.fromkeys(names))
    names_by_module: dict[int, list[str]] = {}
    for name, module in everywhere.items():
        names_by_module.setdefault(id(module), []).append(name)
    hit = set(names)
    for name in names:
        module = everywhere[name]
        twins = [twin for twin in names_by_module[id(module)] if twin != name]
        if twins:
            faults.append(
                f"{name} is the same module as {', '.join(twins)}, and a replacement of one would separate them; give "
                "each name a module of its own first (copy.deepcopy)"
            )
        parts = name.split(".")
        inside = next((outer for end in range(1, len(parts)) if (outer := ".".join(parts[:end])) in hit), None)
        if inside:
            faults.append(f"{name} lies inside {inside}, which is replaced too; name one of them")
        if expect is not None and type(module).__name__ != expect:
            faults.append(f"{name} is {type(module).__name__}, but {expect} was expected")
    if count is not None and names and len(names) != count:
        faults.append(f"{len(names)} modules are hit, but {count} were expected: {', '.join(names[:8])}")
    refuse(SurgeryError, "the surgery's target does not fit the model", faults)
    return names


def _list_kinds(modules: Iterable[nn.Module]) -> list[str]:
    return sorted({type(module).__name__ for module in modules})[:12]


@dataclass(frozen=True)
class _Branch:
    """A part of module names: what is selected under exactly this name, and the parts that follow."""

    ends: list[str] = field(default_factory=list)
    branches: dict[str, _Branch] = field(default_factory=dict)


def _draw_branches(branch: _Branch, indent: str = "") -> Iterator[str]:
    for left, (part, inner) in zip(reversed(range(len(branch.branches))), branch.branches.items(), strict=True):
        yield f"{indent}{'├' if left else '└'} {part}{''.join(f'  ● {end}' for end in inner.ends)}"
        yield from _draw_branches(inner, indent + ("│ " if left else "  "))
