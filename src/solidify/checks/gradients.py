"""Do gradients reach what is trained and nothing else, do they depend on how a batch is split, do the parts sum up?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from solidify.adapter import lookup, readback
from solidify.checks import chance
from solidify.findings import Finding
from solidify.merging import rounding
from solidify.model import anatomy
from solidify.objective.sanity import Sanity
from solidify.system import processes

REACHED = "gradients reach what is trained"
ACCUMULATION = "gradient does not depend on accumulation"
TERMS = "every term has a gradient"
PARTS = "loss parts sum to the total"
_MOST, _ROUNDING = 10, 1e-3  # times the tolerance, and in all: more is never rounding
_HALF, _HALF_ROUNDING = 1e-2, 0.2  # tolerances of half precision are above; there so much may be rounding, unproved
_DRAWS = 3
FEW = 3  # looks in which a gradient may still be held back by what starts at zero


class GradientWitness(TrainerCallback):  # type: ignore[misc]
    """Looks at gradients where they exist: after the backward passes, before the optimizer takes them.

    (In `on_step_end` they are gone.) What counts is whether a parameter ever got a gradient that is not zero: LoRA's A
    has none in the first step, because B is zero, and a sleeping gate has none until it wakes.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.seen: dict[str, float] = {}
        self.stray: set[str] = set()
        self.steps = 0
        self.looks_beside = 0
        self.hidden = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Records the largest gradient of every parameter."""
        self.steps += 1
        self.hidden = bool(args.deepspeed)
        if self.hidden:
            return
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                if parameter.grad is not None:
                    self.stray.add(name)
            elif not self.seen.get(name):
                self.seen[name] = _find_largest(parameter.grad) if parameter.grad is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns what was seen so far, for a checkpoint: a resumed training goes on looking."""
        return {"seen": dict(self.seen), "stray": sorted(self.stray), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.seen, self.stray, self.steps = dict(state["seen"]), set(state["stray"]), int(state["steps"])

    def look_again(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Takes gradients that were computed after the last step for one more look, by parameter path."""
        if gradients:
            self.looks_beside += 1
        for path, gradient in gradients.items():
            if not self.seen.get(path):
                self.seen[path] = float(gradient.abs().max())

    def finding(self) -> Finding:
        """Returns whether every trainable parameter got a gradient in some step, and no frozen one did.

        What starts at zero holds back the gradient of what stands behind it (LoRA's B that of A) until it has moved:
        with fewer than `FEW` looks, a parameter that had none yet is no fault, and no proof either.
        """
        if self.hidden:
            return Finding.unseen(REACHED, "DeepSpeed does not show the gradients")
        if not self.steps:
            return Finding.unseen(REACHED, "no step was taken")
        names = {id(p): name for _, name, p in lookup.named_parameters(self.model)}
        paths = dict(self.model.named_parameters())
        dead = [names[id(paths[path])] for path, largest in self.seen.items() if not largest]
        broken = [path for path, largest in self.seen.items() if not math.isfinite(largest)]
        faults = [f"frozen, but has a gradient: {name}" for name in sorted(self.stray)]
        faults += [f"not finite: {name}" for name in broken]
        few = self.steps + self.looks_beside < FEW
        never = [f"never has a gradient: {name}" for name in anatomy.fold(dead)]
        faults += [] if few else never
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''}"
        if faults or not dead:
            got = f"{len(self.seen)} trainable tensors got non-zero gradients in {steps}, frozen ones none"
            each = [*dict.fromkeys([*never, *faults])]
            more = [f"and {len(each) - 4} more"] if len(each) > 4 else []
            return Finding(REACHED, not faults, "; ".join([*each[:4], *more] if faults else [got]))
        counted = f"{len(self.seen) - len(dead)} of {len(self.seen)} trainable tensors got gradients in {steps}"
        return Finding(REACHED, None, f"{counted}, too few to judge {', '.join(dead[:4])}")


def accumulation(
    trainer: Any,
    examples: Sequence[Mapping[str, Any]],
    *,
    tolerance: float = 1e-4,
    witness: GradientWitness | None = None,
) -> Finding:
    """Computes one step's gradient for several splits of the same ragged examples, through the trainer itself.

    The model is in training mode, with chance taken out (see `chance.py`); its buffers are put back after each
    split. The largest difference of any tensor, relative to that tensor's largest gradient, must stay under `tolerance`
    (sums in another order; a wrong scale is off by a factor) or, where a gradient cancels so far that rounding shows in
    it, under what rounding is measured to do to this model, which may be ten times as much at most (in half precision,
    where losses that compare answers cancel, up to a fifth: then it is measured, and not proved). Where splits differ
    by more, one of them is repeated on other random numbers: if it differs from itself, chance is left, and nothing can
    be said. With several processes, all of them take part: one more split deals the examples out to them. `witness`
    gets one more look at the gradients.
    """
    if trainer.is_deepspeed_enabled:
        return Finding.unseen(ACCUMULATION, "DeepSpeed does not show the gradients")
    n, ranks = len(examples), processes.count()
    sizes = [size for size in (n, max(1, n // 2), max(1, n // 4), 1) if size and n % size == 0]
    splits = [(size, 1) for size in dict.fromkeys(sizes)]
    if ranks > 1 and n % ranks == 0:
        splits.append((1, ranks))
    if len(splits) < 2:
        return Finding.unseen(ACCUMULATION, f"{n} example{'s' if n != 1 else ''} cannot be split in two ways")
    with chance.without(trainer.model, everywhere=not trainer.args.torch_compile) as mode:
        reference = _compute_gradient(trainer, examples, *splits[0])
        if witness is not None:
            witness.look_again(reference)
        if lost := [name for name, gradient in reference.items() if not bool(gradient.isfinite().all())]:
            return Finding(ACCUMULATION, False, f"the gradient of {', '.join(lost[:4])} is NaN or infinite")
        if not any(bool(gradient.any()) for gradient in reference.values()):
            return Finding.unseen(ACCUMULATION, "no gradient is left to compare, all are zero")
        far = [_find_furthest(reference, _compute_gradient(trainer, examples, *split)) for split in splits[1:]]
        worst, culprit = max(far)
        shown = ", ".join(
            f"{n // size}x{size}" if spread == 1 else f"{n // spread}x1 on each of {spread} processes"
            for size, spread in splits
        )
        evidence = f"splits {shown} of {n} ragged sequences differ by at most {worst:.1e}"
        if worst <= tolerance:
            return _state_agreement(evidence, mode)
        half = tolerance > _HALF
        if worst <= _bound_rounding(tolerance) and ranks == 1 and not trainer.args.torch_compile:
            rounded = _measure_rounding(trainer, examples, splits[0], reference)
            if worst <= rounded:
                explained = (
                    f"{evidence}; moved by a unit in the last place, what modules return makes {rounded:.1e} of it"
                )
                return Finding(ACCUMULATION, None, explained) if half else _state_agreement(explained, mode)
        if (repeated := _measure_repeat(trainer, examples, splits[0], reference)) > tolerance:
            return Finding.unseen(
                ACCUMULATION,
                f"the same split, run again, differs by {repeated:.1e}: it uses random numbers that torch does not "
                "draw, so they could not be switched off",
            )
    return Finding(ACCUMULATION, False, f"{evidence} ({culprit})")


def _bound_rounding(tolerance: float) -> float:
    return _HALF_ROUNDING if tolerance > _HALF else min(_MOST * tolerance, _ROUNDING)


def _state_agreement(evidence: str, mode: chance.Chanceless) -> Finding:
    """Splits agree; where a mean stood for numbers that decide what is in the loss, that is measured and not proved."""
    if not mode.replaced:
        return Finding(ACCUMULATION, True, evidence)
    drawn = ", ".join(sorted(mode.replaced))
    return Finding(ACCUMULATION, None, f"{evidence}; the random numbers of {drawn} were set to their mean")


def _measure_rounding(
    trainer: Any, examples: Sequence[Mapping[str, Any]], split: tuple[int, int], reference: Mapping[str, torch.Tensor]
) -> float:
    """Returns how far a split's gradient is from itself at most when what modules return is rounded otherwise."""
    distances = []
    for draw in range(_DRAWS):
        with rounding.moved(trainer.model, draw):
            distances.append(_find_furthest(reference, _compute_gradient(trainer, examples, *split))[0])
    return max(distances)


def _measure_repeat(
    trainer: Any, examples: Sequence[Mapping[str, Any]], split: tuple[int, int], reference: Mapping[str, torch.Tensor]
) -> float:
    """Returns how far a split's gradient is from itself when it is computed on other random numbers."""
    distances = []
    for seed in (1, 2):
        with chance.other_numbers(seed):
            distances.append(_find_furthest(reference, _compute_gradient(trainer, examples, *split))[0])
    return max(distances)


def _find_furthest(reference: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """Returns how far two gradients are apart at most, relative to each tensor's largest, and in which tensor."""
    scales = {name: float(gradient.abs().max()) for name, gradient in reference.items()}
    largest = max(scales.values(), default=0.0)
    worst, culprit = 0.0, ""
    for name in {**reference, **found}:
        if name in reference and name in found:
            distance = float((found[name] - reference[name]).abs().max())
        else:  # in one of the two nothing reached it
            distance = float((found.get(name, reference.get(name))).abs().max())  # type: ignore[union-attr]
        # A tensor whose gradient is rounding itself (it cancels) is judged by the largest of all.
        scale = max(scales.get(name, 0.0), 1e-3 * largest)
        off = distance / scale if scale else (math.inf if distance else 0.0)
        off = off if math.isfinite(off) else math.inf
        if off >= worst:
            worst, culprit = off, name
    return worst, culprit


def _compute_gradient(
    trainer: Any, examples: Sequence[Mapping[str, Any]], size: int, spread: int
) -> dict[str, torch.Tensor]:
    """Runs one window in micro-batches of `size` and returns the gradients, leaving none behind.

    With a `spread` every process runs its share of the examples, and the gradients are averaged as data parallel
    training does it; without, every process runs all of them, and each has the whole gradient.
    """
    model = trainer.model
    model.zero_grad()
    examples = examples[processes.rank() :: spread] if spread > 1 else examples
    batches = [trainer.data_collator([dict(e) for e in examples[i : i + size]]) for i in range(0, len(examples), size)]
    window, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(window)
    with readback.buffers_kept(model):  # they move in training mode, and the next split begins where this one did
        for batch in window:
            trainer.training_step(model, batch, items)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if spread > 1:  # all processes must have the same tensors to reduce, whatever their share of the data reached
        for _, parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    found = {name: processes.whole(p.grad).detach().clone() for name, p in trained if p.grad is not None}
    if spread > 1 and not processes.is_spread(model):  # else they were averaged on the way
        found = {name: trainer.accelerator.reduce(gradient, "mean") for name, gradient in found.items()}
    model.zero_grad()
    trainer.forget_window()
    return found


def terms(sanity: Sanity, *, steps: int = FEW) -> Finding:
    """Says whether every term of the objective has moved what is trained, in some step in which it was looked at.

    In fewer than `FEW` of `steps` a term may have none yet (a divergence from the model itself).
    """
    if not sanity.reached:
        hidden = "a compiled or sharded model does not show the gradient of a single term"
        why = hidden if sanity.rows else "no term was looked at"
        return Finding.unseen(TERMS, why)
    faults = [f"{name} never had a gradient" for name in sanity.silent]
    if faults and steps < FEW:
        return Finding(TERMS, None, f"{'; '.join(faults)}, in too few steps to tell")
    evidence = f"{len(sanity.reached)} terms with a gradient of their own"
    return Finding(TERMS, not faults, "; ".join(faults) or evidence)


def _find_largest(gradient: torch.Tensor) -> float:
    return float(processes.whole(gradient).abs().max())


def parts_sum(history: Sequence[Mapping[str, float]], *, tolerance: float = 1e-5) -> Finding:
    """Compares every logged loss with the sum of its logged weighted parts."""
    if not history:
        return Finding.unseen(PARTS, "nothing was logged")
    distances = []
    for logs in history:
        total = sum(value for key, value in logs.items() if key.startswith("weighted/"))
        apart = abs(logs["loss"] - total) / max(1.0, abs(logs["loss"]))
        distances.append(apart if math.isfinite(apart) else math.inf)
    counted = f"{len(history)} log{'s' if len(history) > 1 else ''}"
    evidence = f"over {counted} the weighted parts sum to the loss within {max(distances):.1e}"
    return Finding(PARTS, max(distances) <= tolerance, evidence)
