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

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import nn

from solidify.behaviour.calling import chance_kept
from solidify.errors import ObjectiveError, refuse
from solidify.objective import window as windowing
from solidify.objective.capture import Recorder
from solidify.objective.internals import Head, Reference, decoder_captures, decoder_output, is_decoder, shifts_labels
from solidify.objective.objective import Objective
from solidify.objective.observation import Observation
from solidify.objective.runner import Runner
from solidify.objective.sanity import Sanity
from solidify.objective.sides import Sides
from solidify.objective.term import Binding, Part
from solidify.objective.window import Window

_HIDDEN = {"hidden_states", "head"}


class ObjectiveEngine:
    """An objective bound to a model; `steps` is the planned number of optimizer steps, for weights that move with it.

    `model` may be wrapped by PEFT, by DistributedDataParallel and by torch.compile. `sanity` holds what was found of
    each term in the first step.

    Raises:
        ObjectiveError: the model does not have what a term looks at.
    """

    def __init__(self, objective: Objective, model: nn.Module, *, steps: int = 0, runner: Runner | None = None) -> None:
        self.objective = objective
        self.model = model
        self.steps = steps
        self.step = 0
        self.sanity = Sanity(objective)
        self.runner = runner or Runner(model)
        self._shifts = shifts_labels(model)
        if not self._shifts:
            refuse(
                ObjectiveError,
                "this model predicts each label at the label's own position",
                _find_unshifted(objective),
            )
        self._reference = Reference(objective, model) if objective.asks_reference else None
        wanted: dict[Any, Any] = dict(objective.captures)
        if objective.asks_for(*_HIDDEN) or (objective.asks_for("logits") and not self.runner.builds_logits):
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
        self._window = windowing.measure([self.runner.count(batch) for batch in batches], device)
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
        self._sides.learn(self._for_model(self.runner.inputs(self.runner.prepare(batch))))
        if self._unmeasured:  # as late as this: a resumed training restores its random numbers after the fetching
            batches, self._unmeasured = self._unmeasured, []
            self._take_means(batches)
        batch = self.runner.prepare(batch)
        counts = self.runner.count(batch)
        window = self._window or windowing.of_one(counts)
        needs = self._find_needs(outputs)
        with self._recorder.recording(graded=torch.is_grad_enabled()) as seen:
            model_loss, output = self.runner.run(self._for_model(batch), needs, counts, window)
        shown = self._build_observation(batch, needs, output, seen)
        zero = model_loss if model_loss is not None else torch.zeros((), device=next(self.model.parameters()).device)
        parts: dict[str, Part] = {}
        for term in self.objective.terms:
            counted, over = self._sides.counted(term, counts), self._sides.counted(term, window)
            part = term.part(shown, counted, over, zero, term.weight.at(self.step + 1, self.steps))
            if part is not None:
                parts[term.name] = part
            if term.acts:
                self._add_sum(self._sums, term.name, term.call(shown).detach())
        total = self._sum_parts(parts)
        self.sanity.look(parts, self.model, counts, self.step, self.steps)
        return (total, output) if outputs else total

    def _sum_parts(self, parts: Mapping[str, Part]) -> torch.Tensor:
        total = torch.stack([part.loss.float() for part in parts.values()]).sum()
        if not torch.isfinite(total.detach()):
            broken = [f"{name} is {p.loss.item()}" for name, p in parts.items() if not torch.isfinite(p.loss)]
            raise ObjectiveError(
                f"the objective is not finite in step {self.step + 1}: {', '.join(broken) or 'the sum overflows'}; the "
                "optimizer has not taken this step"
            )
        for name, part in parts.items():
            self._add_sum(self._values, name, part.value.float())
            self._add_sum(self._weighted, name, part.loss.detach().float())
        return total

    def end(self) -> dict[str, float]:
        """Ends an optimizer step: controllers act, weights learn what was measured. Returns this step's numbers.

        Those are `loss`, and for every term `term/name` as it is and `weighted/name` (which sum to `loss`),
        `weight/name` of weights that move, and what a term shows of the window's means (`kept/name`); all over the
        whole window and all ranks.
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
                logs |= _show_means(term, means)
            elif window is not None and term.name in window.means:
                logs |= _show_means(term, window.means[term.name])
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
    def _add_sum(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    def _find_needs(self, outputs: bool) -> frozenset[str]:
        asked = {"outputs"} if outputs else set()
        asked |= {"loss"} if self.objective.has_model_term else set()
        return frozenset(asked | {word for word in ("outputs", "logits") if self.objective.asks_for(word)})

    def _for_model(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves out the columns that only terms read."""
        return {key: value for key, value in batch.items() if key not in self.objective.columns}

    def _take_means(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Takes the window's means without a graph, on the same random numbers that the real pass will draw."""
        terms = [term for term in self.objective.terms if term.needs_prepass]
        needs = frozenset(word for word in ("outputs", "logits") if any(word in term.asks for term in terms))
        sums: dict[str, torch.Tensor] = {}
        assert self._window is not None
        with chance_kept(), torch.no_grad():
            for batch in batches:
                batch = self.runner.prepare(batch)
                with self._recorder.recording() as seen:
                    _, output = self.runner.run(self._for_model(batch), needs, self.runner.count(batch), self._window)
                shown = self._build_observation(batch, needs, output, seen)
                for term in terms:
                    self._add_sum(sums, term.name, term.call(shown).detach())
        for term in terms:
            over = self._sides.counted(term, self._window)
            self._window.means[term.name] = windowing.over_ranks(sums[term.name]) / max(over.attended_tokens, 1)

    def _build_observation(
        self, batch: Mapping[str, Any], needs: Set[str], output: Any, seen: Mapping[Any, Any]
    ) -> Observation:
        """Gathers what terms may ask for."""
        inputs = self.runner.inputs(batch)
        attention = inputs.get("attention_mask")
        tokens = inputs.get("input_ids", inputs.get("labels"))
        mask = torch.ones_like(tokens) if tokens is not None else None
        if attention is not None and attention.ndim == 2:
            mask = attention = attention.bool()
        states, head = None, None
        if (decoded := decoder_output(self.model, seen)) is not None:
            part, returned = decoded
            states, head = returned[0], Head(self.model, part, returned, self._recorder)

        def logits() -> torch.Tensor | None:
            """Takes those that the pass built, or makes them of its hidden states."""
            if output is not None and "logits" in output and (head is None or self.runner.leaves_logits(needs)):
                return torch.as_tensor(output["logits"])
            return _over_rows(head, states) if head is not None and states is not None else None

        plain = {k: v for k, v in self._for_model(inputs).items() if k != "num_items_in_batch"}
        return Observation(
            model=self.model,
            inputs=inputs,
            labels=inputs.get("labels"),
            attention_mask=attention,
            mask=mask.reshape(-1).bool() if mask is not None else None,
            captured={key: value for key, value in seen.items() if not is_decoder(key)},
            outputs=output,
            hidden_states=states,
            head=head,
            shifts=self._shifts,
            decoder_masks=self._sides.masks(inputs),
            make_logits=logits,
            make_reference=partial(self._reference.run, plain, self._recorder) if self._reference else None,
        )


def _find_unshifted(objective: Objective) -> list[str]:
    """Names the terms that know only labels that stand one position later."""
    return [
        f"{term.name} needs a decoder-only model, which predicts a label one position earlier; leave the term out"
        for term in objective.terms
        if getattr(term.subject, "decoders_only", False)
    ]


def _over_rows(head: Head, states: torch.Tensor) -> torch.Tensor:
    return head(states.reshape(-1, states.shape[-1])).reshape(*states.shape[:-1], -1)


def _show_means(term: Any, means: torch.Tensor) -> dict[str, float]:
    """Returns what a term with a method `shown` says of the window's means, by `what/name`."""
    shown = getattr(term.subject, "shown", None)
    return {f"{what}/{term.name}": value for what, value in shown(means).items()} if shown is not None else {}
