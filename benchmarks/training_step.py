"""What an objective costs: a training step against the plain Trainer's and a hand-written loop; for `make bench`.

With `--size full` (or `small`) the model is a checkpoint of `checkpoint.py` and the rivals are a hand-written loop and
ours with the model's own loss, on one and the same PEFT model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint
import torch
from pairs import compare, write
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

import solidify
from solidify import losses
from solidify.artifact.loading import load_base
from solidify.builtin import tiny_olmoe
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer

LORA = {"r": 8, "target_modules": ["**.q_proj", "**.v_proj"]}
BAR = 1.02  # ours over the hand-written loop, at size full


@dataclass(frozen=True)
class Work:
    """How much is trained on: optimizer steps, micro-batches in each, rows in those, tokens in a row; `bf16`: mixed."""

    steps: int
    accumulation: int
    size: int
    length: int
    bf16: bool = True


WORK = {"tiny": Work(15, 4, 4, 128, bf16=False), "small": Work(2, 4, 1, 128), "full": Work(1, 4, 1, 128)}


def model(directory: str) -> Any:
    """An OLMoE with trash cans, half awake, and an adapter."""
    base = load_base(directory).model
    solidify.replace(base, "model.layers.*.mlp", TrashCanMoE, arguments={"threshold": -2.5})
    return solidify.attach(base, lora=LORA, train=["**.mlp.trash"]).train()


def examples(work: Work) -> list[dict[str, torch.Tensor]]:
    """Makes rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 1000, (work.size * work.accumulation * work.steps, work.length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks rows."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trained(
    kind: type, subject: Any, work: Work, directory: str, terms: list[Term] | None = None
) -> Callable[[], object]:
    """Returns a function that takes optimizer steps with a trainer."""
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=work.size,
        gradient_accumulation_steps=work.accumulation,
        max_steps=work.steps,
        bf16=work.bf16,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        dataloader_pin_memory=False,
    )

    def run() -> None:
        options = {"objective": Objective(terms)} if terms is not None else {}
        kind(model=subject, args=arguments, train_dataset=examples(work), data_collator=collate, **options).train()

    return run


def by_hand(subject: Any, work: Work) -> Callable[[], object]:
    """Returns a function that takes the same steps in a plain loop."""
    rows = examples(work)

    def run() -> None:
        trained = [p for p in subject.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-5)
        for step in range(work.steps):
            window = rows[step * work.size * work.accumulation : (step + 1) * work.size * work.accumulation]
            tokens = len(window) * (work.length - 1)
            for start in range(0, len(window), work.size):
                batch = collate(window[start : start + work.size])
                with torch.autocast("cpu", torch.bfloat16, enabled=work.bf16):
                    loss = subject(**batch, num_items_in_batch=tokens).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return run


def tiny(work: Work, directory: str) -> dict[str, Callable[[], object]]:
    """Returns a hand-written loop, the plain Trainer, and objectives of growing ambition on the embedded model."""

    def subject() -> Any:
        return model(str(tiny_olmoe.directory()))

    def ours(*terms: Term) -> Callable[[], object]:
        return trained(ObjectiveTrainer, subject(), work, directory, list(terms))

    budget = Term(losses.trash_budget, 0.1, arguments={"target": 0.75})
    return {
        "hand-written loop": by_hand(subject(), work),
        "transformers' Trainer": trained(Trainer, subject(), work, directory),
        "ObjectiveTrainer, the model's loss": ours(Term("model")),
        "+ weight penalty and router z": ours(Term("model"), Term(losses.weight_penalty), Term(losses.router_z)),
        "+ trash budget (a statistic: means first)": ours(Term("model"), budget),
        "+ KL to the base (a reference pass)": ours(Term("model"), Term(losses.forward_kl)),
    }


def large(size: str, keep: Path | None, directory: str) -> dict[str, Callable[[], object]]:
    """Returns a hand-written loop and ours on a generated checkpoint; the model is mapped and shared."""
    place = (keep or Path(directory)) / ("fused" if size == "full" else f"{size}_fused")
    checkpoint.write(place, size=size, layout="memory")
    subject = model(str(place))
    return {
        "hand-written loop": by_hand(subject, WORK[size]),
        "ObjectiveTrainer, the model's loss": trained(
            ObjectiveTrainer, subject, WORK[size], directory, [Term("model")]
        ),
    }


def main() -> None:
    """Times the steps; writes build/benchmarks/training_step.json or training_step_SIZE.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=WORK, default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="where generated checkpoints are, or are put to be used again")
    given = parser.parse_args()
    logging.set_verbosity_error()
    work = WORK[given.size]
    title = f"{work.steps} optimizer steps of {work.accumulation} x {work.size} x {work.length} tokens"
    with tempfile.TemporaryDirectory() as directory:
        ways = tiny(work, directory) if given.size == "tiny" else large(given.size, given.keep, directory)
        ratios = compare(f"{title}, size {given.size}", ways, rounds=given.rounds)
    if given.size == "full":
        met = ratios["ObjectiveTrainer, the model's loss"] <= BAR
        print(f"  bar: at most {BAR} of the loop: {'met' if met else 'NOT MET'}")
    write("training_step" if given.size == "tiny" else f"training_step_{given.size}", {"training_step": ratios})


if __name__ == "__main__":
    main()
