"""What the objective costs by itself, and what cross-entropy in chunks saves; for `make bench`.

objective.py step      the engine's own time in a step, with the model's loss alone
objective.py head      the head and its loss on 4096 x 2048 hidden states and 50 304 tokens: time and peak memory
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pairs import write
from processes import measure
from training_step import WORK, collate, examples, model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from solidify.builtin import tiny_olmoe
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.objective import Objective, Term
from solidify.training.runner import TrainerRunner
from solidify.training.trainer import ObjectiveTrainer

STEP_BAR = 1.01
STEPS = 22
ROWS, WIDTH, VOCABULARY = 4096, 2048, 50_304  # OLMoE-1B-7B's head, on 4096 tokens


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes how long each step took, from its beginning to that of the next, without the first step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self._begun: float | None = None

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Ends one step and begins the next."""
        now = time.perf_counter()
        if self._begun is not None and state.global_step > 1:
            self.steps.append(now - self._begun)
        self._begun = now


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Adds up how long the engine's methods take, and what they only pass on: the model's run."""
    methods = [(ObjectiveEngine, "begin"), (ObjectiveEngine, "loss"), (ObjectiveEngine, "end"), (TrainerRunner, "run")]
    before = [(owner, name, getattr(owner, name)) for owner, name in methods]

    def counted(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return call

    for owner, name, method in before:
        setattr(owner, name, counted(name, method))
    try:
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


class FromSecond(TrainerCallback):  # type: ignore[misc]
    """Forgets what the first step took."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Begins to count anew with the second step."""
        if state.global_step == 1:
            self.seconds.clear()


def step(rounds: int) -> dict[str, float]:
    """Trains the embedded model in turn with transformers' Trainer and with ours; returns the ratio of the medians.

    The machine's noise is larger than what is looked for, so the engine's own time (its methods, without the model's
    run that they pass on) is measured too, and is what the bar holds for. What happens once in a training, in its first
    step (how the model scales its loss, each term's gradient), is left out.
    """
    work = WORK["tiny"]
    times: dict[str, list[float]] = {"Trainer": [], "ObjectiveTrainer": []}
    own: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=work.size,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=4,
            dataloader_pin_memory=False,
        )
        subject = model(str(tiny_olmoe.directory()))
        for turn in range(rounds):
            for kind in (Trainer, ObjectiveTrainer)[:: 1 if turn % 2 else -1]:
                more = {"objective": Objective([Term("model")])} if kind is ObjectiveTrainer else {}
                clock, seconds = Clock(), dict[str, float]()
                trainer = kind(
                    model=subject,
                    args=arguments,
                    train_dataset=examples(work),
                    data_collator=collate,
                    callbacks=[clock, FromSecond(seconds)],
                    **more,
                )
                trainer.remove_callback(PrinterCallback)
                with timed(seconds):
                    trainer.train()
                if kind is ObjectiveTrainer:
                    own.append(
                        (seconds["begin"] + seconds["loss"] - seconds["run"] + seconds["end"]) / len(clock.steps)
                    )
                times[kind.__name__] += clock.steps
    ratio = median(times["ObjectiveTrainer"]) / median(times["Trainer"])
    print(
        f"  {ratio:.4f}  ObjectiveTrainer with the model's loss alone over Trainer, {len(times['Trainer'])} steps each"
    )
    share = median(own) / median(times["Trainer"])
    print(
        f"  {share:.4f}  of a step, {median(times['Trainer']) * 1e3:.0f} ms, is the engine: {median(own) * 1e3:.2f} ms"
    )
    print(f"  bar: at most {STEP_BAR}: {'met' if 1 + share <= STEP_BAR else 'NOT MET'}")
    return {"step": ratio, "engine": share}


def one_head(way: str, share: float) -> None:
    """Computes the loss and the gradient of the hidden states in one way; prints seconds, memory and the gradient."""
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        for rows in head.weight.split(1024):  # little at a time: what is measured is how far memory grows from here
            rows.copy_(0.02 * torch.randn(rows.shape))
    states = torch.randn(1, ROWS + 1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (1, ROWS + 1))
    labels[torch.rand(1, ROWS + 1) > share] = -100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if way == "logits":  # what transformers' ForCausalLMLoss does
        logits = head(states).float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    elif way == "ours":
        from solidify import losses

        loss = losses.next_token()(hidden_states=states, head=head, labels=labels)
    else:
        from trl.trainer import utils  # TRL 1.16: the function behind SFTTrainer's loss has no public name

        rows, targets = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
        given = (rows, head.weight, None, targets.clamp(min=0), 1.0, size, None, 1.0, ("log_probs",))
        Chunked = utils._ChunkedLogProbFunction
        loss = -Chunked.apply(*given)[0].masked_fill(targets == -100, 0).sum()
    loss.backward()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    assert states.grad is not None
    print(f"{seconds:.3f} {grown:.3f} {float(loss):.6g} {float(states.grad.float().norm()):.6g}")


def heads(rounds: int) -> dict[str, float]:
    """Runs every way in a process of its own, in turn; returns medians."""
    found: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(rounds):
        for share in (1.0, 0.4):
            for way in ("logits", "TRL", "ours"):
                with tempfile.TemporaryDirectory() as directory:
                    note = Path(directory) / "note"
                    command = f"{sys.executable} {__file__} --way {way} --share {share} > {note}"
                    measure(["sh", "-c", command])
                    numbers = tuple(map(float, note.read_text().split()))
                found.setdefault(f"{way}, {share:.0%} of the rows are targets", []).append(numbers)
    results = {}
    for name, rows in found.items():
        seconds, grown = median(r[0] for r in rows), median(r[1] for r in rows)
        print(f"  {seconds:6.2f} s  {grown:6.2f} GB more  loss {rows[0][2]:.6g}  gradient {rows[0][3]:.6g}  {name}")
        results |= {f"{name}, seconds": seconds, f"{name}, GB": grown}
    return results


def main() -> None:
    """Measures; writes build/benchmarks/objective.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("step", "head"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", help="measure one way of the head, in this process")
    parser.add_argument("--share", type=float, default=1.0)
    given = parser.parse_args()
    logging.set_verbosity_error()
    if given.way:
        one_head(given.way, given.share)
        return
    results: dict[str, dict[str, float]] = {}
    if given.what in (None, "step"):
        results["step"] = step(given.rounds)
    if given.what in (None, "head"):
        results["head"] = heads(given.rounds)
    write("objective", results)


if __name__ == "__main__":
    main()
