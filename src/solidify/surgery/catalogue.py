"""Every operation there is. A new one is a file with its type, and one line in `OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from solidify.errors import ArtifactError
from solidify.surgery.expert_merging import MergeExperts
from solidify.surgery.experts import RearrangeExperts
from solidify.surgery.masks import Mask
from solidify.surgery.operation import Context, Operation, Record
from solidify.surgery.vocabulary import AddTokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from solidify.surgery.edit_record import Edit


class Replace(Operation):
    """One step of surgery: every module that `replace` names becomes a `with`.

    `declares` says which properties of the contract the change does not keep on purpose (`{cache: false}`).
    """

    asked = recorded = "replace"
    puts = runs = switches = matched = True

    replace: str | list[str]
    expect: str
    module: str = Field(alias="with")
    count: int | None = Field(default=None, ge=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    shared: bool = False
    declares: dict[str, bool] = Field(default_factory=dict)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Replaces, or puts one new module everywhere if it is `shared`."""
        from solidify.surgery import replacing

        put = replacing.share if self.shared else replacing.replace
        return put(
            model,
            self.replace,
            context.module(self.module),
            arguments=self.arguments,
            expect=self.expect,
            count=self.count,
            weights=context.file(self.weights) if self.weights else None,
            declares=self.declares,
            extent=context.extent,
        )

    def references(self) -> list[str]:
        """Returns the class that is put in."""
        return [self.module]

    def files(self) -> list[str]:
        """Returns the file of initial weights."""
        return [self.weights] if self.weights else []


class Share(Replace):
    """What `replace` with `shared: true` has done: one new module stands at several names."""

    asked = ""
    recorded = "share"
    spread = True
    switches = False


class _Rearrange(Operation):
    """Lists of layers in another order: `settings.order` names, for each new layer, the old one that comes there."""

    recorded = "rearrange"
    shapes = True
    folds = False

    @classmethod
    def follow(cls, edit: Record, now: dict[str, Record]) -> dict[str, Record]:
        """Moves what stands within the layers: a layer that is gone takes it along, a copied one has it twice."""
        order = edit["settings"]["order"]
        return {new: record for old, record in now.items() for new in _map_name(old, edit["name"], order)}

    @classmethod
    def inspect(cls, module: nn.Module, edit: Record) -> tuple[str, list[str]]:
        """Counts the layers."""
        found, size = len(list(module.children())), len(edit["settings"]["order"])
        return f"has {size} layers", [] if found == size else [f"holds {found} layers, not {size}"]


def _map_name(name: str, layers: str, order: Sequence[int]) -> list[str]:
    """Returns the names that a module has once a list of layers has another order: none, one or several."""
    if not name.startswith(layers + "."):
        return [name]
    number, _, rest = name.removeprefix(layers + ".").partition(".")
    tail = f".{rest}" if rest else ""
    return [f"{layers}.{new}{tail}" for new, old in enumerate(order) if old == int(number)]


class Insert(_Rearrange):
    """One step of surgery: after every layer that `insert` names comes a copy of it, with `zero` parts."""

    asked = "insert"

    insert: str | list[str]
    expect: str
    zero: list[str] = Field(default_factory=list)
    count: int | None = Field(default=None, ge=1)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Inserts the copies."""
        from solidify.surgery import depth

        return depth.insert(
            model, self.insert, zero=self.zero, expect=self.expect, count=self.count, extent=context.extent
        )


class Remove(_Rearrange):
    """One step of surgery: every layer that `remove` names goes."""

    asked = "remove"

    remove: str | list[str]
    expect: str
    count: int | None = Field(default=None, ge=1)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Removes the layers."""
        from solidify.surgery import depth

        return depth.remove(model, self.remove, expect=self.expect, count=self.count, extent=context.extent)


class Add(Operation):
    """One step of surgery: a new module called `add`, a `with`, is called with what one or several modules return."""

    asked = recorded = "add"
    adds = True

    add: str
    module: str = Field(alias="with")
    reads: str | list[str]
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    declares: dict[str, bool] = Field(default_factory=dict)

    def apply(self, model: PreTrainedModel, context: Context) -> list[Edit]:
        """Adds the module."""
        from solidify.surgery import heads

        return heads.add(
            model,
            self.add,
            context.module(self.module),
            reads=self.reads,
            arguments=self.arguments,
            weights=context.file(self.weights) if self.weights else None,
            declares=self.declares,
            extent=context.extent,
        )

    def references(self) -> list[str]:
        """Returns the class that is added."""
        return [self.module]

    def files(self) -> list[str]:
        """Returns the file of initial weights."""
        return [self.weights] if self.weights else []


class Wrap(Operation):
    """What `solidify.wrap` has done: a module of plain torch stands in a model of transformers."""

    recorded = "wrap"
    puts = builds = True
    folds = False

    @classmethod
    def carried(cls) -> Callable[..., list[str] | None]:
        """Returns what builds the module, and those that it is made with."""
        from solidify.surgery.describing import assemble

        return assemble


class Patch(Wrap):
    """What was done by hand, and `solidify.from_patched` found: a module, or its methods, attributes and hooks."""

    recorded = "patch"
    runs = folds = True


OPERATIONS: tuple[type[Operation], ...] = (
    Replace,
    Share,
    Insert,
    Remove,
    Add,
    RearrangeExperts,
    MergeExperts,
    Mask,
    AddTokens,
    Wrap,
    Patch,
)
ASKED: dict[str, type[Operation]] = {each.asked: each for each in OPERATIONS if each.asked}
_RECORDED: dict[str, type[Operation]] = {each.recorded: each for each in OPERATIONS}


def of(record: Record) -> type[Operation]:
    """Returns the type of the operation that a record, or an entry of config.surgery, names.

    Raises:
        ArtifactError: no operation is recorded by that name; the record was made by another version.
    """
    name = record["operation"]
    if name not in _RECORDED:
        raise ArtifactError(
            f"the record of {record.get('name', record.get('modules'))} names the operation {name!r}, which this "
            f"version does not know (it knows: {', '.join(_RECORDED)}); install the version of solidify that made it"
        )
    return _RECORDED[name]
