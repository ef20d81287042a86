"""The engine: turns an objective and a model into losses whose backward passes give the objective's gradient.

A plain loop, a LightningModule and the trainers all go through it:

    engine = ObjectiveEngine(objective, model, steps=1000)
    for window in windows(loader, 4):          # the micro-batches of one optimizer step
        engine.begin(window)
        for batch in window:
            engine.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        logs = engine.end()                    # {"loss": ..., "term/model": ..., "weighted/model": ..., ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import nn

from solidify.errors import ObjectiveError, refuse
from solidify.objective import window as windowing
from solidify.objective.capture import Recorder
from solidify.objective.objective import Objective
from solidify.objective.passes import Passes
from solidify.objective.sanity import Sanity
from solidify.objective.sides import Sides, same_random_numbers
from solidify.objective.supply import (
    Head,
    Reference,
    Supply,
    decoder_captures,
    decoder_output,
    is_decoder,
    shifts_labels,
)
from solidify.objective.term import OWN_MASKS, REFERENCE, SHIFTS, Binding, Part
from solidify.objective.window import Counts, Window

_HIDDEN = {"hidden_states", "head"}


class Runs(Protocol):
    """What the engine needs done by whoever runs the model (see `Passes`)."""

    builds_logits: bool

    def prepare(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Puts a batch where the model is."""

    def count(self, batch: Mapping[str, Any]) -> Counts:
        """Counts a micro-batch."""

    def view(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the model takes of a batch, with `labels`."""

    def run(
        self, batch: Mapping[str, Any], needs: Set[str], counts: Counts, window: Window
    ) -> tuple[torch.Tensor | None, Any]:
        """Runs the model once; returns its own loss as the window's share, and its outputs."""


class ObjectiveEngine:
    """An objective bound to a model; `steps` is the planned number of optimizer steps, for weights that move with it.

    `model` may be wrapped by PEFT, by DistributedDataParallel and by torch.compile. `sanity` holds what was found of
    each term in the first step.

    Raises:
        ObjectiveError: the model does not have what a term looks at.
    """

    def __init__(self, objective: Objective, model: nn.Module, *, steps: int = 0, runs: Runs | None = None) -> None:
        self.objective = objective
        self.model = model
        self.steps = steps
        self.step = 0
        self.sanity = Sanity(objective)
        self._runs: Runs = runs or Passes(model)
        self._shifts = shifts_labels(model)
        if not self._shifts:
            refuse(ObjectiveError, "the labels of this model stand where they are predicted", _unshifted(objective))
        self._reference = Reference(objective, model) if objective.asks_reference else None
        wanted: dict[Any, Any] = dict(objective.captures)
        if objective.asks_for(*_HIDDEN) or (objective.asks_for("logits") and not self._runs.builds_logits):
            wanted |= decoder_captures(model)
        for term in objective.terms:
            if isinstance(term.subject, Binding):
                term.subject.bind(model)
        self._recorder: Recorder[Any] = Recorder(model, wanted)
        self._sides = Sides(objective, model, self._recorder)
        self._window: Window | None = None
        self._unmeasured: list[Mapping[str, Any]] = []
        self._values: dict[str, torch.Tensor] = {}
        self._weighted: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Counts one optimizer step's micro-batches, on all ranks, and keeps them if a term needs their means first.

        Raises:
            ObjectiveError: it is the first, and no label of it counts, though something is to be learnt from labels.
        """
        self.forget()
        device = next(self.model.parameters()).device
        self._window = windowing.measure([self._runs.count(batch) for batch in batches], device)
        if not self.step and not self._window.target_tokens and all("labels" in batch for batch in batches):
            self._refuse_masked()
        if (len(batches) > 1 or self._window.ranks > 1) and any(t.needs_prepass for t in self.objective.terms):
            self._unmeasured = list(batches)

    def _refuse_masked(self) -> None:
        if self.objective.has_model_term or self.objective.asks_for("labels"):
            raise ObjectiveError(
                "in the first step every label is -100 (masked), so there is nothing to learn from; look at what masks "
                "them: a prompt that is longer than `max_length` leaves no answer, and loss on assistant turns or "
                "completions needs such turns"
            )

    def loss(self, batch: Mapping[str, Any], *, outputs: bool = False) -> Any:
        """Returns the loss of one micro-batch: its backward pass adds its share of the objective's gradient.

        With `outputs` also what the model returned. Over the window, and averaged over the ranks, the losses sum to the
        objective's value.

        Raises:
            ObjectiveError: a term is not finite, does not depend on what is trained, or cannot be computed.
        """
        self._sides.learn(self._for_model(self._runs.view(self._runs.prepare(batch))))
        if self._unmeasured:  # as late as this: a resumed training restores its random numbers after the fetching
            batches, self._unmeasured = self._unmeasured, []
            self._prepass(batches)
        batch = self._runs.prepare(batch)
        counts = self._runs.count(batch)
        window = self._window or windowing.of_one(counts)
        with self._recorder.recording(graded=torch.is_grad_enabled()) as seen:
            model_loss, output = self._runs.run(self._for_model(batch), self._needs(outputs), counts, window)
        supply = self._supply(batch, output, seen)
        zero = model_loss if model_loss is not None else torch.zeros((), device=next(self.model.parameters()).device)
        parts: dict[str, Part] = {}
        for term in self.objective.terms:
            counted, over = self._sides.counted(term, counts), self._sides.counted(term, window)
            part = term.part(supply, counted, over, zero, term.weight.at(self.step + 1, self.steps))
            if part is not None:
                parts[term.name] = part
            if term.acts:
                self._add(self._sums, term.name, term.call(supply).detach())
        total = self._total(parts)
        self.sanity.look(parts, self.model, counts, self.step, self.steps)
        return (total, output) if outputs else total

    def _total(self, parts: Mapping[str, Part]) -> torch.Tensor:
        total = torch.stack([part.loss.float() for part in parts.values()]).sum()
        if not torch.isfinite(total.detach()):
            broken = [f"{name} is {p.loss.item()}" for name, p in parts.items() if not torch.isfinite(p.loss)]
            raise ObjectiveError(
                f"the objective is not finite in step {self.step + 1}: {', '.join(broken) or 'the sum overflows'}; the "
                "optimizer has not taken this step"
            )
        for name, part in parts.items():
            self._add(self._values, name, part.value.float())
            self._add(self._weighted, name, part.loss.detach().float())
        return total

    def end(self) -> dict[str, float]:
        """Ends an optimizer step: controllers act, weights learn what was measured. Returns this step's numbers.

        Those are `loss`, and for every term `term/name` as it is and `weighted/name` (which sum to `loss`), and
        `weight/name` of weights that move; all over the whole window and all ranks.
        """
        self.step += 1
        window, sums = self._window, self._sums
        ranks = windowing.ranks()
        names = list(self._values)
        sent = torch.stack([*self._values.values(), *self._weighted.values()]) if names else torch.zeros(0)
        numbers = (windowing.over_ranks(sent) / ranks).tolist()
        values, weighted = (
            dict(zip(names, half, strict=True)) for half in (numbers[: len(names)], numbers[len(names) :])
        )
        logs = {"loss": sum(weighted.values())}
        for name, value in values.items():
            logs |= {f"term/{name}": value, f"weighted/{name}": weighted[name]}
        for term in self.objective.terms:
            if term.acts and term.name in sums and window is not None:
                over = self._sides.counted(term, window)
                means = windowing.over_ranks(sums[term.name]) / max(over.attended_tokens, 1)
                term.subject.after_step(self.model, means, self.step, self.steps)
            if term.moves:
                logs[f"weight/{term.name}"] = term.weight.at(self.step, self.steps)
                followed = getattr(term.weight, "measure", None) or term.name
                if followed in values:
                    term.weight.observe(values[followed])
        self.forget()
        return logs

    def forget(self) -> None:
        """Drops what was counted for a step that was not taken."""
        self._window, self._unmeasured = None, []
        self._values, self._weighted, self._sums = {}, {}, {}

    @property
    def window(self) -> Window | None:
        """The window of the step that is being taken."""
        return self._window

    def close(self) -> None:
        """Takes the hooks off the model."""
        self._recorder.remove()

    def state_dict(self) -> dict[str, Any]:
        """Returns what must be saved to go on from here: the step, and what terms and weights remember."""
        return {
            "step": self.step,
            "sanity": self.sanity.state_dict(),
            "terms": {term.name: term.state_dict() for term in self.objective.terms},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it back."""
        self.step = state["step"]
        self.sanity.load_state_dict(state["sanity"])
        for term in self.objective.terms:
            term.load_state_dict(state["terms"].get(term.name, {}))

    @staticmethod
    def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def _needs(self, outputs: bool) -> frozenset[str]:
        asked = {"outputs"} if outputs else set()
        asked |= {"loss"} if self.objective.has_model_term else set()
        return frozenset(asked | {word for word in ("outputs", "logits") if self.objective.asks_for(word)})

    def _for_model(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves out the columns that only terms read."""
        return {key: value for key, value in batch.items() if key not in self.objective.columns}

    def _prepass(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Takes the window's means without a graph, on the same random numbers that the real pass will draw."""
        terms = [term for term in self.objective.terms if term.needs_prepass]
        needs = frozenset(word for word in ("outputs", "logits") if any(word in term.asks for term in terms))
        sums: dict[str, torch.Tensor] = {}
        assert self._window is not None
        with same_random_numbers(), torch.no_grad():
            for batch in batches:
                batch = self._runs.prepare(batch)
                with self._recorder.recording() as seen:
                    _, output = self._runs.run(self._for_model(batch), needs, self._runs.count(batch), self._window)
                supply = self._supply(batch, output, seen)
                for term in terms:
                    self._add(sums, term.name, term.call(supply).detach())
        for term in terms:
            over = self._sides.counted(term, self._window)
            self._window.means[term.name] = windowing.over_ranks(sums[term.name]) / max(over.attended_tokens, 1)

    def _supply(self, batch: Mapping[str, Any], output: Any, seen: Mapping[Any, Any]) -> Supply:
        """Gathers what terms may ask for; the reference runs only when one does."""
        inputs = self._runs.view(batch)
        mask = inputs.get("attention_mask")
        tokens = inputs.get("input_ids", inputs.get("labels"))
        attended = mask.bool() if mask is not None and mask.ndim == 2 else mask
        if mask is None or mask.ndim != 2:
            mask = torch.ones_like(tokens) if tokens is not None else None
        given: dict[Any, Any] = {
            "model": self.model,
            "inputs": inputs,
            "labels": inputs.get("labels"),
            "attention_mask": attended,
            "mask": mask.reshape(-1).bool() if mask is not None else None,
            SHIFTS: self._shifts,
            OWN_MASKS: self._sides.masks(inputs),
            **{key: value for key, value in seen.items() if not is_decoder(key)},
        }
        makers: dict[Any, Any] = {}
        if output is not None:
            given["outputs"] = output
        decoded = decoder_output(self.model, seen)
        if decoded is not None:
            part, states = decoded
            given |= {"hidden_states": states[0], "head": Head(self.model, part, states, self._recorder)}
        if output is not None and "logits" in output:
            given["logits"] = output["logits"]
        elif decoded is not None:
            makers["logits"] = lambda: _over_rows(given["head"], given["hidden_states"])
        if self._reference is not None:
            plain = {k: v for k, v in self._for_model(inputs).items() if k != "num_items_in_batch"}
            referred = cache(partial(self._reference.run, plain, self._recorder))
            for key in (*self.objective.reference_captures, *REFERENCE):
                makers[key] = partial(_item, referred, key)
        return Supply(given, makers)


def _unshifted(objective: Objective) -> list[str]:
    """Names the terms that know only labels that stand one position later."""
    return [
        f"{term.name} reads columns beside the labels of a decoder-only model, and nothing else"
        for term in objective.terms
        if getattr(term.subject, "decoders_only", False)
    ]


def _over_rows(head: Head, states: torch.Tensor) -> torch.Tensor:
    return head(states.reshape(-1, states.shape[-1])).reshape(*states.shape[:-1], -1)


def _item(made: Callable[[], Mapping[Any, Any]], key: Any) -> Any:
    return made()[key]
