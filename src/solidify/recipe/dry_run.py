"""What a recipe would do: resolved on the meta device, written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from solidify.adapter import adapters, lookup
from solidify.adapter import plan as planning
from solidify.adapter.plan import AdapterPlan
from solidify.artifact import sources, vocabulary
from solidify.errors import ObjectiveError, RecipeError, raised_as, refuse
from solidify.model.cost import cost
from solidify.objective.objective import Objective
from solidify.objective.rehearsal import rehearse
from solidify.objective.term import Term
from solidify.recipe import first_batch, healing, models, objectives, trainers
from solidify.recipe.schema import Recipe, given
from solidify.surgery import catalogue, ledger
from solidify.surgery.constructing import Bypassing
from solidify.surgery.edit_record import Edit
from solidify.system import console, markup
from solidify.training import data, groups, kernels
from solidify.training.trainer import refuse_half_precision


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
    `data` how the rows are read: their format, the longest example, on what the loss is.
    """

    edits: list[Edit]
    adapter: AdapterPlan | None
    before: dict[str, Any]
    after: dict[str, Any]
    trainer: str | None
    trainable: dict[str, int]
    objective: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    tensors: dict[str, list[str]]
    counts: dict[str, int]
    files: dict[str, str]
    generated: list[str]
    requirements: dict[str, str]
    heal: dict[str, Any] | None = None
    data: dict[str, Any] | None = None

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
            **({"data": self.data} if self.data is not None else {}),
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
    vocabulary.refuse_unfit(base.model, base.processor or base.tokenizer, RecipeError)
    refuse(RecipeError, "the recipe cannot be healed as asked", healing.faults(recipe))
    edits = models.operate(recipe, base.model)
    read: dict[str, Any] | None = None
    if recipe.heal is not None:
        data.refuse_untaught(base.model)
        read = first_batch.rehearse(recipe, base.processor or base.tokenizer, base.model)
    healed = healing.plan(recipe, base.model, edits)
    code = sources.compile_sources(base.model, edits)
    after, records = cost(base.model).document(), [edit.document() for edit in edits]
    counts = ledger.counts(base.model.state_dict(), records)
    wanted, trainer, trainable, terms = None, None, dict[str, int](), list[Term]()
    if recipe.adapter is not None:
        read = trainers.refuse_unteachable(recipe, base.model, base.processor or base.tokenizer)
        wanted = planning.plan(base.model, recipe.adapter.lora, recipe.adapter.train)
        arguments = trainers.training_arguments(recipe, Path("nowhere"))
        trainers.refuse_unspreadable(arguments, here=False)
        terms = objectives.make_terms(recipe)
        kernels.refuse_unusable(arguments, base.model, Objective(terms))
        _refuse_sequences(recipe, terms)
        trainer = trainers.trainer_class(recipe).__name__
        trainable, peft_model = _count_trainable(recipe, base.model)
        refuse_half_precision(arguments, peft_model)
        _rehearse_objective(recipe, edits, peft_model, arguments.max_steps)
    return Plan(
        edits=edits,
        adapter=wanted,
        before=before,
        after=after,
        trainer=trainer,
        trainable=trainable,
        objective=[_describe_term(term, entry.weight) for term, entry in zip(terms, recipe.objective, strict=False)],
        groups=[group.model_dump(exclude_none=True) for group in recipe.parameter_groups],
        tensors=_follow_tensors(names, edits),
        counts=counts,
        files=code.files,
        generated=sorted({f"{reference.rpartition('.')[0]}.py" for reference in code.auto_map.values()}),
        requirements=code.requirements,
        heal=healed,
        data=read,
    )


def _refuse_sequences(recipe: Recipe, terms: Sequence[Term]) -> None:
    """Raises RecipeError for a term that is a mean over sequences, where a window holds several."""
    alike = [term.name for term in terms if term.reduction == "sequence_mean"]
    if recipe.data is not None and recipe.data.packing and alike:
        raise RecipeError(
            f"data.packing: the term {alike[0]} is a mean over sequences, and a packed window, which holds several, "
            "would count as one; leave packing out"
        )


def _describe_term(term: Term, weight: Any) -> dict[str, Any]:
    """Says what a term is; `weight` is the recipe's word for it."""
    reduction = f"{term.reduction} of the window" if term.needs_prepass else term.reduction
    return {"name": term.name, "reduction": reduction, "weight": weight, "reference": term.asks_reference}


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


def _rehearse_objective(recipe: Recipe, edits: Sequence[Edit], peft_model: PeftModel, steps: int) -> None:
    """Binds a second copy of the objective to the model, with the reference that a run would have."""
    terms = objectives.make_terms(recipe)
    reference: Any = models.load_teacher(recipe, device="meta")
    if reference is None and any(term.asks_reference for term in terms):
        located = [lookup.at(peft_model, name) for name in ledger.new_modules([edit.document() for edit in edits])]
        off = all(each is not None and isinstance(each.inner, Bypassing) for each in located)
        exact = off and all(catalogue.of(edit.document()).switches for edit in edits)
        if objectives.changed_before(recipe) or not exact:
            reference = models.load_base(recipe, device="meta").model
    rehearse(Objective(terms, reference=reference), peft_model, steps=max(steps, 1))


def _count_trainable(recipe: Recipe, model: PreTrainedModel) -> tuple[dict[str, int], PeftModel]:
    """Attaches the adapter to a model on the meta device and counts what PEFT makes trainable."""
    assert recipe.adapter is not None
    # How low-rank factors start changes no shape, and some starts need the weights.
    shapes = {**recipe.adapter.lora, "init_lora_weights": True} if recipe.adapter.lora is not None else None
    with console.silence():
        peft_model = adapters.attach(model, lora=shapes, train=recipe.adapter.train)
    with raised_as(RecipeError, of=ObjectiveError):
        groups.resolve(peft_model, trainers.parameter_groups(recipe))
    counts: dict[str, int] = {}
    for kind, name, parameter in lookup.named_parameters(peft_model):
        if parameter.requires_grad:
            counts[f"{kind} {name}"] = counts.get(f"{kind} {name}", 0) + parameter.numel()
    return counts, peft_model
