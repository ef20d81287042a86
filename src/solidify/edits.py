"""Surgery from Python: the edits of one model, selected before they are made, collected, shown and built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.artifact import loading, solidify
from solidify.artifact import vocabulary as vocabularies
from solidify.artifact.conversion import Scratch
from solidify.artifact.loading import BaseModel
from solidify.artifact.solidify import Artifact, Saveable
from solidify.builtin import bases
from solidify.errors import SurgeryError
from solidify.model import anatomy
from solidify.surgery import depth, expert_merging, experts, heads, masks, replacing, selection, vocabulary
from solidify.surgery.edit_record import Edit
from solidify.surgery.masks import Kind
from solidify.surgery.selection import Selection, Where
from solidify.system import markup
from solidify.weights import spilling


class Surgery:
    """The changes of one model, in the order in which they are made; every verb is the function of its name.

    Each verb takes what `select` takes, or a selection; it changes the model in place, all or nothing, and returns the
    records of what it did. `edits` are those of all verbs, and `build` writes the artifact.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Begins without an edit; a model is not touched.

        A hub id, `builtin:NAME`, the directory of a model or of an artifact is loaded as a recipe's `base` is, with
        these options: a large one stays mapped from its files, in another layout than theirs too, and its tokenizer
        goes with it.

        Raises:
            SurgeryError: it is no model of transformers, or one in memory is given options of loading.
            ModelError: there is no such model, or not all of it.
            ArtifactError: it is an artifact that was changed since it was written.
        """
        self.edits: list[Edit] = []
        self._base: BaseModel | None = None
        if isinstance(model, PreTrainedModel):
            if revision is not None or dtype is not None or trust_remote_code:
                raise SurgeryError(
                    "revision, dtype and trust_remote_code say how to load a model, and this one is loaded already; "
                    "leave them out"
                )
            self.model = model
            return
        if not isinstance(model, (str, Path)):
            kind = type(model).__name__
            raise SurgeryError(f"surgery is done on a transformers model, a hub id or a directory, not on a {kind}")
        scratch = spilling.directory_for(self)
        self._base = loading.load_base(
            str(bases.directory(str(model)) or model),
            revision=revision,
            dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
            trust_remote_code=trust_remote_code,
            scratch=Scratch(scratch, lambda _: ()),
        )
        self.model = self._base.model

    def select(self, where: Where) -> Selection:
        """Finds modules, and changes nothing: print what is returned, or leave it to the notebook, to see them.

        Raises:
            SurgeryError: nothing is found.
        """
        return selection.select(self.model, where)

    def replace(self, where: Where | Selection, module: type[nn.Module], **options: Any) -> list[Edit]:
        """Replaces the modules, as `solidify.replace` does with the same options."""
        return self._keep_edits(replacing.replace(self.model, self._pass_patterns(where), module, **options))

    def share(self, where: Where | Selection, module: type[nn.Module], **options: Any) -> list[Edit]:
        """Puts one new module at all of the module names, as `solidify.share` does with the same options."""
        return self._keep_edits(replacing.share(self.model, self._pass_patterns(where), module, **options))

    def insert(self, where: Where | Selection, **options: Any) -> list[Edit]:
        """Inserts a copy after each of the layers, as `solidify.insert` does with the same options."""
        return self._keep_edits(depth.insert(self.model, self._pass_patterns(where), **options))

    def remove(self, where: Where | Selection, **options: Any) -> list[Edit]:
        """Removes the layers, as `solidify.remove` does with the same options."""
        return self._keep_edits(depth.remove(self.model, self._pass_patterns(where), **options))

    def rearrange_experts(
        self,
        where: Where | Selection,
        order: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        **options: Any,
    ) -> list[Edit]:
        """Chooses, repeats and reorders the experts of the blocks, as `solidify.rearrange_experts` does."""
        return self._keep_edits(experts.rearrange_experts(self.model, self._pass_patterns(where), order, **options))

    def duplicate_experts(self, where: Where | Selection, copies: int = 2, **options: Any) -> list[Edit]:
        """Repeats every expert of the blocks, and keeps what they compute, as `solidify.duplicate_experts` does."""
        return self._keep_edits(experts.duplicate_experts(self.model, self._pass_patterns(where), copies, **options))

    def merge_experts(
        self,
        where: Where | Selection,
        clusters: Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[int]]],
        **options: Any,
    ) -> list[Edit]:
        """Makes one expert of each cluster in the blocks, as `solidify.merge_experts` does."""
        target = self._pass_patterns(where)
        return self._keep_edits(expert_merging.merge_experts(self.model, target, clusters, **options))

    def add(self, name: str, module: type[nn.Module], *, reads: str | Sequence[str], **options: Any) -> list[Edit]:
        """Adds a module that reads what others return, as `solidify.add` does with the same options."""
        return self._keep_edits(heads.add(self.model, name, module, reads=reads, **options))

    def add_tokens(
        self, tokens: Sequence[str | Mapping[str, Any]] | Path, *, tokenizer: Any = None, **options: Any
    ) -> list[Edit]:
        """Adds tokens to the model and its tokenizer, as `solidify.add_tokens` does with the same options.

        A model that was loaded here has its own; with a model in memory give the `tokenizer`, here and to `build`.
        """
        own = None if self._base is None else self._base.processor or self._base.tokenizer
        found = tokenizer if tokenizer is not None else vocabularies.tokenizer_of(own)
        return self._keep_edits(vocabulary.add_tokens(self.model, found, tokens, **options))

    def mask(self, kind: Kind, where: Where | Selection | None = None, **options: Any) -> list[Edit]:
        """Gives the model, or the layers, another mask, as `solidify.mask` does with the same options."""
        target = None if where is None else self._pass_patterns(where)
        return self._keep_edits(masks.mask(self.model, kind, target, **options))

    def build(
        self,
        directory: str | Path,
        *,
        tokenizer: Saveable | None = None,
        base: Mapping[str, Any] | None = None,
        link: bool = True,
    ) -> Artifact:
        """Writes the artifact and verifies it in a fresh process, as `solidify.build` does.

        Raises:
            SolidifyError: as `solidify.build`; nothing is then left at the directory.
        """
        origin = dict(base) if base is not None else None
        if self._base is not None:
            tokenizer = tokenizer or self._base.processor or self._base.tokenizer
            origin = origin or self._base.origin
        return solidify.build(self.model, self.edits, directory, tokenizer=tokenizer, base=origin, link=link)

    def _pass_patterns(self, where: Where | Selection) -> str | Sequence[str]:
        """Hands patterns on as they are: what is wrong with them is said of them."""
        if isinstance(where, Selection):
            if where.model is not self.model:
                raise SurgeryError("the selection was made in another model; call select of this surgery")
            return list(where)
        return list(self.select(where)) if isinstance(where, type) or callable(where) else where

    def _keep_edits(self, edits: list[Edit]) -> list[Edit]:
        self.edits += edits
        return edits

    def __repr__(self) -> str:
        return f"Surgery({type(self.model).__name__}, {len(self.edits)} edits)"

    def __str__(self) -> str:
        """Writes what was done, alike edits of repeated layers in one line, with the parameters that it adds."""
        groups: dict[tuple[str, str, str], list[Edit]] = {}
        for edit in self.edits:
            change = " -> ".join(dict.fromkeys([edit.old_class, edit.new_class]))
            groups.setdefault((edit.operation, anatomy.fold([edit.name])[0], change), []).append(edit)
        count = f"{len(self.edits)} edit{'s' if len(self.edits) != 1 else ''}"
        lines = [f"Surgery of {type(self.model).__name__}: {count}"]
        for (operation, pattern, change), alike in groups.items():
            where = alike[0].name if len(alike) == 1 else f"{pattern} x {len(alike)}"
            grown = sum(edit.parameters_after - edit.parameters_before for edit in alike)
            lines.append(f"  {operation} {where}: {change}, {grown:+,} parameters")
        return "\n".join(lines if self.edits else [*lines, "  nothing is changed yet: select, replace, build"])

    def _repr_html_(self) -> str:
        rows = [(edit.operation, edit.name, edit.old_class, edit.new_class) for edit in self.edits]
        return markup.table(repr(self), ("operation", "module", "before", "after"), rows)
