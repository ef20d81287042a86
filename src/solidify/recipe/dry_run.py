"""What a recipe would do: resolved on the meta device, written nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from solidify.adapter import adapters, lookup, tokens
from solidify.adapter import plan as planning
from solidify.adapter.plan import AdapterPlan
from solidify.artifact import inspection, quantizing, sources, vocabulary
from solidify.artifact.inspection import Branch
from solidify.errors import ModelError, ObjectiveError, RecipeError, raised_as, refuse
from solidify.losses.compute import TrashController
from solidify.losses.ramps import Ramp
from solidify.model import anatomy
from solidify.model.cost import cost
from solidify.modules.trashcan_moe import ASLEEP, TrashCanMoE
from solidify.objective.objective import Objective
from solidify.objective.rehearsal import rehearse
from solidify.objective.term import Term
from solidify.recipe import (
    datasets,
    evidence,
    first_batch,
    heal_plan,
    models,
    objectives,
    prefix_plan,
    trainers,
    trl_rows,
)
from solidify.recipe.schema import Recipe, given
from solidify.surgery import catalogue, ledger
from solidify.surgery.constructing import Bypassing
from solidify.surgery.edit_record import Edit
from solidify.system import console, foreign, markup
from solidify.training import data, formats, groups, kernels
from solidify.training import sources as sources_of_rows
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
    `quantization` what the artifact takes in memory when it is trained quantised, and what is not quantised, and why.
    `modules` holds the trees of modules `before` and `after`, `data` how the rows are read: their format, the longest
    example, on what the loss is. `notes` are sentences on what will have no effect. `prefix` says which layers
    `cache_prefix` has computed once, and about how many bytes that takes on disk.
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
    refuse(RecipeError, "the recipe cannot be healed as asked", heal_plan.faults(recipe))
    edits = models.operate(recipe, base.model, preparing=preparing)
    records = [edit.document() for edit in edits]
    vocabulary.refuse_unfit(base.model, preparing, RecipeError, records)
    read: dict[str, Any] | None = None
    if recipe.heal is not None or any(step.calibrates for step in recipe.surgery):
        read = _rehearse_text(recipe, base.model, preparing)
    notes: list[str] = []
    if read is None and evidence.measures_surgery(recipe):
        looked = foreign.attempt(_rehearse_text, recipe, base.model, preparing)
        notes = [f"data.eval is not measured: {looked.error}"] if looked.error is not None else []
        read = looked.value
    healed = heal_plan.plan(recipe, base.model, edits)
    code = sources.compile_sources(base.model, edits) if edits else None
    after = cost(base.model).document()
    modules["after"] = inspection.tree(base.model)
    counts = ledger.counts(base.model.state_dict(), records)
    wanted, trainer, trainable, terms, forecast = None, None, dict[str, int](), list[Term](), None
    prefix: dict[str, Any] | None = None
    if recipe.adapter is not None:
        read = trainers.refuse_unteachable(recipe, base.model, preparing)
        surgery = vars(base.model.config).get("surgery") or []  # of a base that is an artifact
        lora = tokens.with_ids(recipe.adapter.lora, vocabulary.added_tokens([*surgery, *records]))
        wanted = planning.plan(base.model, lora, recipe.adapter.train)
        arguments = trainers.training_arguments(recipe, Path("nowhere"))
        trainers.refuse_unspreadable(arguments, here=False)
        terms = objectives.make_terms(recipe)
        kernels.refuse_unusable(arguments, base.model, Objective(terms))
        forecast = _forecast(recipe, base.model, records)
        _refuse_sequences(recipe, terms)
        trainer = trainers.trainer_class(recipe).__name__
        trainable, peft_model = _count_trainable(recipe, base.model, lora)
        refuse_half_precision(arguments, peft_model)
        prefix = prefix_plan.plan(recipe, peft_model, Objective(terms), read)
        _rehearse_objective(recipe, edits, peft_model, arguments.max_steps)
    if read is not None:
        read.pop("tokens", None)  # which the size of the prefix is about
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
        files=code.files if code is not None else {},
        generated=sorted({f"{r.rpartition('.')[0]}.py" for r in code.auto_map.values()}) if code is not None else [],
        requirements=code.requirements if code is not None else {},
        heal=healed,
        quantization=forecast.document() if forecast is not None else None,
        modules=modules,
        data=read,
        notes=[*notes, *(_find_sleepers(edits, terms) if recipe.adapter is not None else [])],
        prefix=prefix,
    )


def _find_sleepers(edits: Sequence[Edit], terms: Sequence[Term]) -> list[str]:
    """Says of new trash cans that skip nothing when they are built that nothing in the training wakes them."""
    asleep = [
        edit.name
        for edit in edits
        if edit.module_class is TrashCanMoE and edit.arguments.get("threshold", ASLEEP) <= ASLEEP / 2
    ]
    ramps = [pattern for term in terms if isinstance(term.subject, Ramp) for pattern in term.subject.patterns]
    moved = {name for name in asleep for each in ramps if anatomy.match_within(each, [f"{name}.trash.bias"])}
    left = [name for name in asleep if name not in moved]
    if not left or any(isinstance(term.subject, TrashController) for term in terms):
        return []
    return [
        f"{', '.join(anatomy.fold(left))}: the trash can is asleep (its threshold is {ASLEEP:g}, no expert is "
        "skipped), and nothing in the objective wakes it: add the term solidify.losses:trash_controller, or give the "
        "module a threshold (`arguments: {threshold: -4}`)"
    ]


def _rehearse_text(recipe: Recipe, model: PreTrainedModel, preparing: Any) -> dict[str, Any]:
    """Looks at the rows that healing learns from, and surgery calibrates on, which are those of the trainer.

    Raises:
        RecipeError: they are no text: healing learns the next token, whatever the trainer learns.
    """
    way = "heal: healing" if recipe.heal is not None else "surgery: calibration"
    way = "data.eval: measuring" if evidence.measures_surgery(recipe) else way
    data.refuse_untaught(model)
    assert recipe.data is not None
    if not datasets.is_multimodal(recipe, model):
        rows = datasets.read_rows(recipe)
        columns = sources_of_rows.columns(rows[0])
        asked = [recipe.data.format] if recipe.data.format is not None else formats.fitting(columns)
        if asked and not set(asked) & set(formats.NEXT_TOKEN):
            raise RecipeError(
                f"{way} reads the rows of `data` as text, as trainer: {recipe.trainer} reads them too, and it cannot "
                f"learn from {' or '.join(asked)}; {'heal' if recipe.heal is not None else 'do it'} in a recipe with "
                "data of text, and take the model that it leaves as the base of this one"
            )
    return first_batch.rehearse(recipe, preparing, model)


def _forecast(recipe: Recipe, model: PreTrainedModel, edits: Sequence[dict[str, Any]]) -> quantizing.Forecast | None:
    """Says what the artifact would be when it is loaded quantised; None where the recipe does not ask for it."""
    asked = models.quantization(recipe)
    if not asked:
        return None
    with raised_as(RecipeError, of=ModelError):
        found = quantizing.forecast(asked["quantization"], model, edits, asked["keep"])
    assert recipe.adapter is not None
    fault = planning.dora_fault(recipe.adapter.lora, found.word)
    refuse(RecipeError, "the adapter does not go with base.quantization", [fault] if fault is not None else [])
    return found


def _refuse_sequences(recipe: Recipe, terms: Sequence[Term]) -> None:
    """Raises RecipeError for a term that is a mean over sequences, where a window holds several."""
    alike = [term.name for term in terms if term.reduction == "sequence_mean"]
    way = trl_rows.find_sharing(recipe)
    if way is not None and alike:
        raise RecipeError(
            f"{way}: the term {alike[0]} is a mean over sequences, and a packed window, which holds several, "
            f"would count as one; leave {way.partition('.')[2]} out"
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


def _count_trainable(
    recipe: Recipe, model: PreTrainedModel, lora: Mapping[str, Any] | None
) -> tuple[dict[str, int], PeftModel]:
    """Attaches the adapter to a model on the meta device and counts what PEFT makes trainable."""
    assert recipe.adapter is not None
    # How low-rank factors start changes no shape, and some starts need the weights.
    shapes = {**lora, "init_lora_weights": True} if lora is not None else None
    with console.silence():
        peft_model = adapters.attach(model, lora=shapes, train=recipe.adapter.train)
    with raised_as(RecipeError, of=ObjectiveError):
        groups.resolve(peft_model, trainers.parameter_groups(recipe))
    counts: dict[str, int] = {}
    for kind, name, parameter in lookup.named_parameters(peft_model):
        if parameter.requires_grad:
            counts[f"{kind} {name}"] = counts.get(f"{kind} {name}", 0) + parameter.numel()
    return counts, peft_model
