"""Run by `torchrun` from tests/training/test_processes.py: one optimizer step, and its gradients written by rank 0."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pico
import torch
from safetensors.torch import save_file

from solidify import losses
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, awake, in_order


def penalty(model: torch.nn.Module) -> torch.Tensor:
    return sum(p.float().square().sum() for p in model.parameters() if p.requires_grad)


def objective() -> Objective:
    return Objective(
        [
            Term("model", 0.7),
            Term(losses.forward_kl, 0.5),
            Term(losses.trash_budget, 5.0, arguments={"target": 0.3}),
            Term(losses.load_balance, 0.1),
            Term(losses.router_z, 0.01),
            Term(penalty, 0.1),
        ]
    )


def main() -> None:
    artifact, directory, size, steps = sys.argv[1:5]
    model = awake(Path(artifact))
    trainer: Any = ObjectiveTrainer(
        model=model,
        args=arguments(Path(directory), int(size), int(steps)),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=objective(),
    )
    in_order(trainer)
    watch = Gradients(model)
    trainer.add_callback(watch)
    trainer.train()
    if trainer.accelerator.num_processes > 1:  # of the mapped base nothing is sent, and so nothing copied
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen and set(trainer.model_wrapped.parameters_to_ignore) == frozen
    if trainer.accelerator.is_main_process:
        logs = {k: torch.tensor(v) for k, v in trainer.history[-1].items() if k.startswith(("term/", "loss"))}
        save_file({**watch.found, **logs}, Path(directory) / f"{trainer.accelerator.num_processes}.safetensors")


if __name__ == "__main__":
    main()
