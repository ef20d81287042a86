"""What a recipe would do: resolved on the meta device, written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solidify.artifact import inspection, sources, vocabulary
from solidify.artifact.inspection import Branch
from solidify.errors import RecipeError, refuse
from solidify.model.cost import cost
from solidify.recipe import models
from solidify.recipe.schema import Recipe, given
from solidify.surgery import ledger
from solidify.surgery.edit_record import Edit
from solidify.system import markup

if TYPE_CHECKING:
    from solidify.adapter.plan import AdapterPlan


@dataclass(frozen=True, repr=False)
class Plan:
    """What a recipe would do.

    `before` and `after` are costs. `adapter` and `trainer` are None without an adapter; `trainable` maps what would be
    trained (`lora` or `full`, and the name) to its number of parameters. `objective` has each term's name, reduction,
    weight (a number, or how it moves) and whether it needs the reference; `groups` are the parameter groups. `tensors`
    lists which of the base's are `kept` and `dropped`, which are `new`, and which are `unknown`: new, or copies of
    those listed as dropped, as only a build can tell. `counts` are the numbers that run, card and diff show (`kept`,
    `new`, `dropped`). `files` is the artifact's code by name, of which `generated` names what solidify writes, and
    `requirements` what it needs beside torch and transformers. `heal` says what each stage of healing would take, and
    `quantization` what the artifact takes in memory when it is trained quantised, and what is not quantised, and why.
    `modules` holds the trees of modules `before` and `after`, `data` how the rows are read: their format, the longest
    example, on what the loss is. `notes` are sentences on what will have no effect. `prefix` says which layers
    `cache_prefix` has computed once, and about how many bytes that takes on disk.
    """

    edits: list[Edit]
    before: dict[str, Any]
    after: dict[str, Any]
    groups: list[dict[str, Any]]
    tensors: dict[str, list[str]]
    counts: dict[str, int]
    files: dict[str, str]
    generated: list[str]
    requirements: dict[str, str]
    adapter: AdapterPlan | None = None
    trainer: str | None = None
    trainable: dict[str, int] = field(default_factory=dict)
    objective: list[dict[str, Any]] = field(default_factory=list)
    heal: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    modules: dict[str, list[Branch]] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    prefix: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        return {
            "edits": [edit.document() for edit in self.edits],
            "before": self.before,
            "after": self.after,
            "trainer": self.trainer,
            "trainable": self.trainable,
            "objective": self.objective,
            "groups": self.groups,
            "tensors": self.tensors,
            "counts": self.counts,
            "requirements": self.requirements,
            "generated": self.generated,
            "files": self.files,
            **({"heal": self.heal} if self.heal is not None else {}),
            **({"quantization": self.quantization} if self.quantization is not None else {}),
            **({"data": self.data} if self.data is not None else {}),
            **({"notes": self.notes} if self.notes else {}),
            **({"prefix": self.prefix} if self.prefix is not None else {}),
        }

    def __repr__(self) -> str:
        parts = ", ".join(f"{count:,} tensors {what}" for what, count in self.counts.items())
        return f"Plan({len(self.edits)} edits; {parts}; {sum(self.trainable.values()):,} parameters trained)"

    def _repr_html_(self) -> str:
        rows = [(edit.name, edit.old_class, edit.new_class) for edit in self.edits]
        return markup.table(repr(self), ("module", "before", "after"), rows)


def plan(recipe: Recipe | str | Path) -> Plan:
    """Resolves a recipe, or the one at a path, on the meta device: every edit, what would be trained, costs.

    Nothing is written.

    Raises:
        SolidifyError: whatever a run would refuse before it computes anything.
    """
    recipe = given(recipe)
    base = models.load_base(recipe, device="meta")
    before, names = cost(base.model).document(), list(base.model.state_dict())
    preparing = base.processor or base.tokenizer
    modules = {"before": inspection.tree(base.model)}
    if not any(step.speaks for step in recipe.surgery):  # else the surgery may give an id its embedding
        vocabulary.refuse_unfit(base.model, preparing, RecipeError)
    if recipe.heal is not None:
        from solidify.recipe import heal_plan

        refuse(RecipeError, "the recipe cannot be healed as asked", heal_plan.faults(recipe))
    edits = models.operate(recipe, base.model, preparing=preparing)
    records = [edit.document() for edit in edits]
    vocabulary.refuse_unfit(base.model, preparing, RecipeError, records)
    code = sources.compile_sources(base.model, edits) if edits else None
    after = cost(base.model).document()
    modules["after"] = inspection.tree(base.model)
    counts = ledger.counts(base.model.state_dict(), records)
    learned: dict[str, Any] = {}
    if recipe.data is not None or recipe.heal is not None or recipe.adapter is not None:
        from solidify.recipe import training_plan  # with every trainer

        learned = training_plan.plan(recipe, base.model, preparing, edits)
    return Plan(
        edits=edits,
        before=before,
        after=after,
        groups=[group.model_dump(exclude_none=True) for group in recipe.parameter_groups],
        tensors=_follow_tensors(names, edits),
        counts=counts,
        files=code.files if code is not None else {},
        generated=sorted({f"{r.rpartition('.')[0]}.py" for r in code.auto_map.values()}) if code is not None else [],
        requirements=code.requirements if code is not None else {},
        modules=modules,
        **learned,
    )


def _follow_tensors(names: Sequence[str], edits: Sequence[Edit]) -> dict[str, list[str]]:
    """Follows the base's tensors through all edits."""
    origins, _ = ledger.origins(names, [edit.document() for edit in edits])
    used = set(origins.values())
    unknown = [name for edit in edits for name in edit.unknown if name in origins]
    return {
        "kept": [name for name in names if name in used],
        "new": [name for name, origin in origins.items() if origin is None and name not in unknown],
        "dropped": [name for name in names if name not in used],
        "unknown": unknown,
    }
