"""Tries an objective on a model that has no weights: what a training would refuse in its first step is refused here.

The model is on the meta device. What terms look into is found by name, the forward pass gives shapes where it can run
there, and every term is called once with made-up values of these shapes. Nothing is learned about the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.errors import ObjectiveError, refuse
from solidify.model import anatomy
from solidify.objective.capture import Capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.internals import decoder_output, encodes_and_decodes
from solidify.objective.objective import Objective
from solidify.objective.observation import NotShown, Observation, ReferenceObservation
from solidify.objective.term import Term
from solidify.objective.window import Counts, Window
from solidify.system import foreign

ROWS, LENGTH, WORDS = 2, 8, 8  # of the made-up batch; the words are those of a made-up head
TARGETS = 6  # how many positions a decoder reads that has an encoder beside it


def rehearse(objective: Objective, model: nn.Module, *, steps: int = 0) -> None:
    """Binds an objective to a model on the meta device and calls each term once; `steps` are those planned.

    Objects of the terms remember this call: rehearse an objective that is not trained afterwards.

    Raises:
        ObjectiveError: the model has not what a term looks into, a weight cannot be computed, or a term refuses what it
            would be given. All terms' faults are listed.
    """
    engine = ObjectiveEngine(objective, model, steps=steps)
    try:
        shown = _Made(engine, model).observation()
    finally:
        engine.close()
    found = [fault for term in objective.terms for fault in _find_faults(term, shown, steps)]
    refuse(ObjectiveError, "the objective does not fit the model", list(dict.fromkeys(found)))


def _find_faults(term: Term, shown: Observation, steps: int) -> list[str]:
    called = foreign.attempt(term.weight.at, 1, steps)
    errors: list[Exception | None] = [called.error] if isinstance(called.error, ObjectiveError) else []
    if not term.is_model:
        given = foreign.attempt(term.call, shown)
        errors += [given.error] if _is_recipe_fault(term, given.error) else []
        if term.is_statistic and given.value is not None:
            judged = foreign.attempt(term.subject.value, given.value / (ROWS * LENGTH))
            errors += [judged.error] if _is_recipe_fault(term, judged.error) else []
    return [
        str(e) if isinstance(e, ObjectiveError) else f"the term {term.name}: {foreign.said(e)}" for e in errors if e
    ]


def _is_ours(term: Term) -> bool:
    return type(term.subject).__module__.startswith("solidify.losses.")


def _is_recipe_fault(term: Term, error: Exception | None) -> bool:
    """Returns whether an error is the recipe's fault: made-up values may be no values for a term of the user's."""
    if error is None or isinstance(error, NotShown):
        return False
    if isinstance(error, ObjectiveError):
        return True
    impossible = isinstance(error, NotImplementedError) or "meta" in str(error)
    return _is_ours(term) and not impossible


class _Made:
    """What a pass over a made-up batch on the meta device showed, made into values."""

    def __init__(self, engine: ObjectiveEngine, model: nn.Module) -> None:
        self._engine, self._model = engine, model
        self._generator = torch.Generator().manual_seed(0)
        self._ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
        self._labels = torch.zeros(ROWS, TARGETS, dtype=torch.long) if encodes_and_decodes(model) else self._ids

    def observation(self) -> Observation:
        """Returns what terms may ask for, as far as it could be made."""
        engine = self._engine
        mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
        inputs = {"input_ids": self._ids, "attention_mask": mask.long(), "labels": self._labels}
        logits, seen = self._run_pass()
        decoded = decoder_output(self._model, seen)
        return Observation(
            model=self._model,
            inputs=inputs,
            labels=self._labels,
            attention_mask=mask,
            mask=mask.reshape(-1),
            captured=self._make_values(seen, engine.objective.captures, self._model),
            hidden_states=self._make_value(decoded[1][0]) if decoded is not None else None,
            head=_make_logits if decoded is not None else None,
            shifts=engine._shifts,
            decoder_masks=engine._sides.masks(inputs),
            make_logits=lambda: self._make_value(logits),
            make_reference=self._observe_reference if engine._reference is not None else None,
        )

    def _observe_reference(self) -> ReferenceObservation:
        engine = self._engine
        assert engine._reference is not None
        with _experts_in_batches(engine._reference.model):
            shown = foreign.attempt(engine._reference.run, self._make_batch(), engine._recorder).value
        if shown is None:
            return ReferenceObservation({})
        return ReferenceObservation(
            self._make_values(shown.captured, engine.objective.reference_captures, engine._reference.model),
            logits=self._make_value(shown.logits),
            hidden_states=self._make_value(shown.hidden_states),
            head=_make_logits if shown.head is not None else None,
        )

    def _run_pass(self) -> tuple[torch.Tensor | None, Mapping[Any, Any]]:
        """Runs the model, and returns its logits and what was seen until it could not go on."""
        engine = self._engine
        needs = frozenset(word for word in ("outputs", "logits") if engine.objective.asks_for(word))
        batch, nothing = self._make_batch(), Counts(1, 1, 1)
        learned = foreign.attempt(engine._sides.learn, batch)
        if isinstance(learned.error, ObjectiveError):
            raise learned.error
        with (
            torch.no_grad(),
            anatomy.evaluation(self._model),
            _experts_in_batches(self._model),
            engine._recorder.recording() as seen,
        ):
            outcome = foreign.attempt(engine.runner.run, batch, needs, nothing, Window(1, 1, 1, 1))
        output = outcome.value[1] if outcome.value is not None else None
        return (output["logits"] if output is not None and "logits" in output else None), seen

    def _make_batch(self) -> dict[str, torch.Tensor]:
        """Returns what the model reads; of an encoder-decoder also what its decoder reads, which is shorter."""
        batch = {"input_ids": self._ids.to("meta")}
        return {**batch, "decoder_input_ids": self._labels.to("meta")} if self._labels is not self._ids else batch

    def _make_values(self, seen: Mapping[Any, Any], wanted: Mapping[Any, Capture], model: nn.Module) -> dict[Any, Any]:
        """Makes values of captures; of one that was cut short, none."""
        return {
            key: {name: self._make_value(each) for name, each in seen[key].items()}
            for key, spec in wanted.items()
            if key in seen and len(seen[key]) == len(spec.find(model))
        }

    def _make_value(self, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            parts = [self._make_value(each) for each in value]
            shapes: list[torch.Size] = []
            for index, part in enumerate(parts):
                if isinstance(part, torch.Tensor) and part.is_floating_point():
                    if part.shape in shapes:  # beside a router's logits: the weights of the experts that were chosen
                        parts[index] = part.abs() * (part == part.amax(-1, keepdim=True))
                    shapes.append(part.shape)
            return tuple(parts)
        if not isinstance(value, torch.Tensor):
            return value
        if not value.is_floating_point():
            return torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)
        made = torch.rand(value.shape, generator=self._generator) - 0.5
        return made.to(value.dtype).requires_grad_()


@contextmanager
def _experts_in_batches(model: nn.Module) -> Iterator[None]:
    """Has experts compute by batched products: grouped ones take no float32 on the meta device (torch 2.13)."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    held = (value for module in model.modules() for value in vars(module).values())
    configs = {id(value): value for value in held if isinstance(value, PreTrainedConfig)}
    before = [(config, dict(vars(config))) for config in configs.values()]
    foreign.attempt(lambda: [module.set_experts_implementation("batched_mm") for module in inner[:1]])
    try:
        yield
    finally:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)


def _make_logits(rows: torch.Tensor) -> torch.Tensor:
    """Stands for a model's head, which has no weights here."""
    return rows[:, :1].expand(-1, WORDS)
