"""Do gradients reach what is trained and nothing else, do they depend on how a batch is split, do the parts sum up?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from solidify import processes
from solidify.adapter import standing
from solidify.findings import Finding
from solidify.objective.sanity import Sanity

REACHED = "gradients reach what is trained"
ACCUMULATION = "gradient does not depend on accumulation"
TERMS = "every term has a gradient"


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
                self.seen[name] = _largest(parameter.grad) if parameter.grad is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns what was seen so far, for a checkpoint: a resumed training goes on looking."""
        return {"seen": dict(self.seen), "stray": sorted(self.stray), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.seen, self.stray, self.steps = dict(state["seen"]), set(state["stray"]), int(state["steps"])

    def finding(self) -> Finding:
        """Returns whether every trainable parameter got a gradient in some step, and no frozen one did."""
        if self.hidden:
            return Finding(REACHED, None, "not looked at: DeepSpeed keeps the gradients to itself")
        names = {id(p): name for _, name, p in standing.named_parameters(self.model)}
        paths = dict(self.model.named_parameters())
        dead = [names[id(paths[path])] for path, largest in self.seen.items() if not largest]
        broken = [path for path, largest in self.seen.items() if largest != largest or largest == float("inf")]
        faults = [f"never a gradient: {name}" for name in dead]
        faults += [f"a gradient though frozen: {name}" for name in sorted(self.stray)]
        faults += [f"not finite: {name}" for name in broken]
        if not self.steps:
            faults.append("no step was taken")
        evidence = f"{len(self.seen)} trainable tensors got non-zero gradients in {self.steps} steps, frozen ones none"
        return Finding(REACHED, not faults, "; ".join(faults[:4]) or evidence)


def accumulation(trainer: Any, examples: Sequence[Mapping[str, Any]], *, tolerance: float = 1e-4) -> Finding:
    """Computes one step's gradient for several splits of the same ragged examples, through the trainer itself.

    The largest difference of any tensor, relative to that tensor's largest gradient, must stay under `tolerance`:
    float32 sums in another order; a wrong scale is off by a factor. With several processes, all of them take part: one
    more split deals the examples out to them.
    """
    if trainer.is_deepspeed_enabled:
        return Finding(ACCUMULATION, None, "not looked at: DeepSpeed keeps the gradients to itself")
    n, ranks = len(examples), processes.count()
    sizes = [size for size in (n, max(1, n // 2), max(1, n // 4), 1) if n % size == 0]
    splits = [(size, 1) for size in dict.fromkeys(sizes)]
    if ranks > 1 and n % ranks == 0:
        splits.append((1, ranks))
    with _without_dropout(trainer.model):
        reference = _gradient(trainer, examples, *splits[0])
        scales = {name: float(gradient.abs().max()) for name, gradient in reference.items()}
        largest = max(scales.values(), default=0.0)
        worst, culprit = 0.0, ""
        for split in splits[1:]:
            for name, gradient in _gradient(trainer, examples, *split).items():
                # A tensor whose gradient is rounding itself (it cancels) is judged by the largest of all.
                scale = max(scales[name], 1e-3 * largest)
                distance = float((gradient - reference[name]).abs().max())
                if scale and distance / scale >= worst:
                    worst, culprit = distance / scale, name
    shown = ", ".join(
        f"{n // size}x{size}" if spread == 1 else f"{n // spread}x1 on each of {spread} processes"
        for size, spread in splits
    )
    evidence = f"splits {shown} of {n} ragged sequences differ by at most {worst:.1e}"
    passed = worst <= tolerance and largest > 0 and len(splits) > 1
    return Finding(ACCUMULATION, passed, evidence + ("" if passed else f" ({culprit})"))


def _gradient(trainer: Any, examples: Sequence[Mapping[str, Any]], size: int, spread: int) -> dict[str, torch.Tensor]:
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


def terms(sanity: Sanity) -> Finding:
    """Says whether every term of the objective has moved what is trained, in some step in which it was looked at."""
    if not sanity.reached:
        return Finding(TERMS, None, "not looked at: a compiled or sharded model does not give one term's gradient")
    evidence = f"{len(sanity.reached)} terms with a gradient of their own"
    faults = [f"{name} never had a gradient" for name in sanity.silent]
    return Finding(TERMS, not faults, "; ".join(faults) or evidence)


def _largest(gradient: torch.Tensor) -> float:
    return float(processes.whole(gradient).abs().max())


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Sets every dropout to zero, because random masks differ between splits."""
    before = [(m, m.p) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    for module, _ in before:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in before:
            module.p = p


def parts_sum(history: Sequence[Mapping[str, float]], *, tolerance: float = 1e-5) -> Finding:
    """Compares every logged loss with the sum of its logged weighted parts."""
    worst = 0.0
    for logs in history:
        total = sum(value for key, value in logs.items() if key.startswith("weighted/"))
        worst = max(worst, abs(logs["loss"] - total) / max(1.0, abs(logs["loss"])))
    evidence = f"over {len(history)} logs the weighted parts sum to the loss within {worst:.1e}"
    return Finding("loss parts sum to the total", bool(history) and worst <= tolerance, evidence)
