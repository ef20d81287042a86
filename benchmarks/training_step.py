"""What an objective costs: a training step against the plain Trainer's and a hand-written loop; for `make bench`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from pairs import compare, write
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

import solidify
from solidify import losses
from solidify.artifact.loading import load_base
from solidify.builtin import tiny_olmoe
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.tuning.objective import Objective, Term
from solidify.tuning.trainer import ObjectiveTrainer

STEPS, SIZE, ACCUMULATION, LENGTH = 15, 4, 4, 128
LORA = {"r": 8, "target_modules": ["**.q_proj", "**.v_proj"]}


def model() -> Any:
    """The embedded OLMoE with trash cans, half awake, and an adapter."""
    base = load_base(str(tiny_olmoe.directory())).model
    solidify.replace(base, "model.layers.*.mlp", TrashCanMoE, arguments={"threshold": -2.5})
    return solidify.attach(base, lora=LORA, train=["**.mlp.trash"]).train()


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 1000, (SIZE * ACCUMULATION * STEPS, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def trained(kind: type, directory: str, terms: list[Term] | None = None) -> Callable[[], object]:
    """Returns a function that takes STEPS optimizer steps with a trainer."""
    arguments = TrainingArguments(
        output_dir=directory,
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1000,
        dataloader_pin_memory=False,
    )
    subject = model()

    def run() -> None:
        options = {"objective": Objective(terms)} if terms is not None else {}
        kind(model=subject, args=arguments, train_dataset=examples(), data_collator=collate, **options).train()

    return run


def by_hand() -> Callable[[], object]:
    """Returns a function that takes the same steps in a plain loop."""
    subject = model()
    optimizer = torch.optim.AdamW([p for p in subject.parameters() if p.requires_grad], lr=5e-5)
    rows = examples()

    def run() -> None:
        for step in range(STEPS):
            window = rows[step * SIZE * ACCUMULATION : (step + 1) * SIZE * ACCUMULATION]
            tokens = len(window) * (LENGTH - 1)
            for start in range(0, len(window), SIZE):
                subject(**collate(window[start : start + SIZE]), num_items_in_batch=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def main() -> None:
    """Times steps of a hand-written loop, the plain Trainer, and objectives of growing ambition."""
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        budget = Term(losses.trash_budget, 0.1, arguments={"target": 0.75})
        ways = {
            "hand-written loop": by_hand(),
            "transformers' Trainer": trained(Trainer, directory),
            "ObjectiveTrainer, the model's loss": trained(ObjectiveTrainer, directory, [Term("model")]),
            "+ weight penalty and router z": trained(
                ObjectiveTrainer, directory, [Term("model"), Term(losses.weight_penalty), Term(losses.router_z)]
            ),
            "+ trash budget (a statistic: means first)": trained(ObjectiveTrainer, directory, [Term("model"), budget]),
            "+ KL to the base (a reference pass)": trained(
                ObjectiveTrainer, directory, [Term("model"), Term(losses.kl_to_base)]
            ),
        }
        title = f"{STEPS} optimizer steps of {ACCUMULATION} x {SIZE} x {LENGTH} tokens"
        write("training_step", {"training_step": compare(title, ways, rounds=5)})


if __name__ == "__main__":
    main()
