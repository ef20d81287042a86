"""`solidify.from_patched`: finds what was done to a model by hand, and makes it solid.

Found are modules that the model's class does not put there, changed attributes, methods that were set on an instance or
on a class, and hooks. Each becomes an edit that builds the same again; what no file's source can say is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from solidify.artifact import loading, solidify
from solidify.artifact.loading import BaseModel
from solidify.artifact.solidify import Artifact, Saveable
from solidify.builtin import bases
from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy
from solidify.model.extent import Extent
from solidify.surgery import differing, patching
from solidify.surgery.edit_record import Edit
from solidify.system import console, foreign, markup


@dataclass(frozen=True, repr=False)
class Patched:
    """What was found in a patched model: `edits` that make it again, and why the rest cannot be made solid.

    `noticed` is what needs no edit, for it is saved anyway: settings of the configuration, and weights.
    """

    model: PreTrainedModel
    edits: list[Edit]
    unexplained: list[str]
    noticed: list[str]
    base: BaseModel | None = None

    def build(self, directory: str | Path, *, tokenizer: Saveable | None = None, link: bool = True) -> Artifact:
        """Writes the artifact; a fresh process loads it, and compares all it holds and returns with this model.

        Raises:
            SurgeryError: something is unexplained, or there is nothing to build.
            ArtifactError: as `solidify.build`; nothing is then left at the directory.
        """
        refuse(SurgeryError, "the patched model cannot be made solid", self.unexplained)
        if not self.edits:
            raise SurgeryError(
                "no module was patched: save it with save_pretrained, which is a base for attach and recipes as it is"
            )
        base = self.base
        tokenizer = tokenizer or (base and (base.processor or base.tokenizer)) or None
        origin = base.origin if base is not None else None
        return solidify.build(self.model, self.edits, directory, tokenizer=tokenizer, base=origin, link=link)

    def __repr__(self) -> str:
        return f"Patched({type(self.model).__name__}, {len(self.edits)} edits, {len(self.unexplained)} unexplained)"

    def __str__(self) -> str:
        """Writes what was found, alike edits of repeated layers in one line."""
        lines = [f"Patched {type(self.model).__name__}: {len(self.edits)} edits"]
        groups: dict[tuple[str, str], list[str]] = {}
        for edit in self.edits:
            key = (anatomy.fold([edit.name])[0], f"{edit.old_class} -> {patching.describe_edit(edit)}")
            groups.setdefault(key, []).append(edit.name)
        for (pattern, change), names in groups.items():
            where = names[0] if len(names) == 1 else f"{pattern} x {len(names)}"
            lines.append(f"  {where}: {change}")
        lines += [f"  noticed: {each}" for each in self.noticed]
        lines += [f"  cannot be made solid: {each}" for each in self.unexplained]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [(edit.name, edit.old_class, patching.describe_edit(edit)) for edit in self.edits]
        rows += [("", "", f"cannot be made solid: {each}") for each in self.unexplained]
        return markup.table(repr(self), ("module", "was", "is"), rows)


def from_patched(
    base: PreTrainedModel | str | Path,
    model: PreTrainedModel,
    *,
    arguments: Mapping[str, Mapping[str, Any]] | None = None,
    declares: Mapping[str, bool] | None = None,
    trust_remote_code: bool = False,
) -> Patched:
    """Compares a model that was patched by hand with its base, and returns what differs as edits; changes neither.

    `base` is the unpatched model, or where it is loaded from. Constructor arguments of new modules are read off their
    attributes; `arguments` says, by module name or pattern, those that are not kept. `declares` is as for
    `solidify.replace`. Print the result; its `build` writes the artifact, and refuses while something is unexplained.

    Raises:
        SurgeryError: the two are not of one class, or the patched model carries an adapter.
        ModelError: the base cannot be loaded.
    """
    if isinstance(model, PeftModel) or not isinstance(model, PreTrainedModel):
        raise SurgeryError(
            f"the patched model is {type(model).__name__}, and not a model of transformers; merge or unload an "
            "adapter first, and wrap a module of plain torch with solidify.wrap"
        )
    loaded = None if isinstance(base, PreTrainedModel) else _load(base, model, trust_remote_code)
    original: Any = base if loaded is None else loaded.model
    if type(original).__name__ != type(model).__name__ or original is model:
        same = "the same object" if original is model else type(original).__name__
        raise SurgeryError(
            f"the patched model is {type(model).__name__}, and its base is {same}; give the unpatched base, or where "
            "it is loaded from"
        )
    if anatomy.is_meta(model):
        raise SurgeryError("the patched model is on the meta device: it has no weights to write")
    plain = _build_plain(model)
    found = differing.find(model, plain, original)
    edits, faults = patching.propose(model, original, found, dict(arguments or {}), declares)
    if not found.faults and not faults and edits:
        faults += patching.try_again(model, _build_plain(model), edits)
    if not found.faults and not faults and edits:
        edits, faults = patching.judge(model, original, edits, dict(declares or {}), Extent.of(model))
    return Patched(model, edits, [*found.faults, *faults], differing.noticed(model, original), loaded)


def _load(base: str | Path, model: PreTrainedModel, trust_remote_code: bool) -> BaseModel:
    with console.silence():
        return loading.load_base(
            str(bases.directory(str(base)) or base),
            dtype=str(model.dtype).removeprefix("torch."),
            trust_remote_code=trust_remote_code,
        )


def _build_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Builds what the model's class makes of its configuration, on the meta device."""
    with foreign.calling(f"{type(model).__name__} cannot be built from the patched model's configuration"):
        return loading.on_meta(type(model), deepcopy(model.config))
