"""What a recipe would train, heal and measure: its data, adapter, objective and first batch on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from solidify.adapter import adapters, lookup, start_kinds, tokens
from solidify.adapter import plan as planning
from solidify.artifact import quantizing, vocabulary
from solidify.errors import ModelError, ObjectiveError, RecipeError, raised_as, refuse
from solidify.losses.compute import TrashController
from solidify.losses.ramps import Ramp
from solidify.model import anatomy
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
from solidify.recipe.schema import Recipe
from solidify.surgery import catalogue, ledger
from solidify.surgery.constructing import Bypassing
from solidify.surgery.edit_record import Edit
from solidify.system import console, foreign
from solidify.training import data, formats, groups, kernels
from solidify.training import sources as sources_of_rows
from solidify.training.trainer import refuse_half_precision


def plan(recipe: Recipe, model: PreTrainedModel, preparing: Any, edits: Sequence[Edit]) -> dict[str, Any]:
    """Returns what a plan says of training and healing a model on the meta device, which the surgery has changed.

    `preparing` is its tokenizer or processor. The keys are names of fields of `dry_run.Plan`.

    Raises:
        SolidifyError: whatever a run would refuse before it computes anything.
    """
    found: dict[str, Any] = {"notes": []}
    read: dict[str, Any] | None = None
    if recipe.heal is not None or any(step.calibrates for step in recipe.surgery):
        read = _rehearse_text(recipe, model, preparing)
    if read is None and evidence.measures_surgery(recipe):
        looked = foreign.attempt(_rehearse_text, recipe, model, preparing)
        read = looked.value
        found["notes"] = [f"data.eval is not measured: {looked.error}"] if looked.error is not None else []
    found["heal"] = heal_plan.plan(recipe, model, edits)
    if recipe.adapter is not None:
        read = trainers.refuse_unteachable(recipe, model, preparing)
        found |= _plan_adapter(recipe, model, edits, read, found["notes"])
    return {**found, "data": read}


def _plan_adapter(
    recipe: Recipe, model: PreTrainedModel, edits: Sequence[Edit], read: Mapping[str, Any], notes: Sequence[str]
) -> dict[str, Any]:
    """Resolves the adapter, the objective and the trainer, and rehearses a step on the meta device."""
    assert recipe.adapter is not None
    records = [edit.document() for edit in edits]
    surgery = vars(model.config).get("surgery") or []  # of a base that is an artifact
    lora = tokens.with_ids(recipe.adapter.lora, vocabulary.added_tokens([*surgery, *records]))
    wanted = planning.plan(model, lora, recipe.adapter.train)
    arguments = trainers.training_arguments(recipe, Path("nowhere"))
    trainers.refuse_unspreadable(arguments, here=False)
    terms = objectives.make_terms(recipe)
    kernels.refuse_unusable(arguments, model, Objective(terms))
    forecast = _forecast(recipe, model, records)
    _refuse_sequences(recipe, terms)
    trainable, peft_model = _count_trainable(recipe, model, lora)
    refuse_half_precision(arguments, peft_model)
    prefix = prefix_plan.plan(recipe, peft_model, Objective(terms), read)
    _rehearse_objective(recipe, edits, peft_model, arguments.max_steps)
    return {
        "adapter": wanted,
        "trainer": trainers.trainer_class(recipe).__name__,
        "trainable": trainable,
        "objective": [_describe_term(term, entry.weight) for term, entry in zip(terms, recipe.objective, strict=False)],
        "quantization": forecast.document() if forecast is not None else None,
        "notes": [*notes, *_find_sleepers(edits, terms)],
        "prefix": prefix,
    }


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
    with console.silence():
        peft_model = adapters.attach(model, lora=start_kinds.without_start(lora), train=recipe.adapter.train)
    with raised_as(RecipeError, of=ObjectiveError):
        groups.resolve(peft_model, trainers.parameter_groups(recipe))
    counts: dict[str, int] = {}
    for kind, name, parameter in lookup.named_parameters(peft_model):
        if parameter.requires_grad:
            counts[f"{kind} {name}"] = counts.get(f"{kind} {name}", 0) + parameter.numel()
    return counts, peft_model
