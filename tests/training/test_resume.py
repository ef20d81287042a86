from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch

import solidify
from solidify import losses
from solidify.errors import AdapterError
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer
from training import arguments, in_order

WAYS = {
    "LoRA, a module and a controller": {"lora": {"r": 4, "target_modules": ["**.q_proj"]}, "train": ["**.mlp.trash"]},
    "a bare parameter, no LoRA": {"train": ["model.layers.*.mlp.gate.weight"]},
    "a start that is kept, made anew": {
        "lora": {"r": 4, "target_modules": ["**.q_proj"], "init_lora_weights": "pissa_niter_1"},
        "train": ["**.mlp.trash"],
    },
    "LoRA beside a bare parameter": {
        "lora": {"r": 4, "target_modules": ["**.q_proj"]},
        "train": ["**.q_norm.weight", "model.norm"],
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    trash_artifact: Path, tmp_path: Path, way: str
) -> None:
    def trainer(directory: Path, seed: int) -> ObjectiveTrainer:
        torch.manual_seed(seed)
        model = solidify.attach(solidify.load(trash_artifact), **WAYS[way])
        terms = [Term("model")]
        if "**.mlp.trash" in WAYS[way]["train"]:
            terms.append(Term(losses.trash_controller, arguments={"target": 0.5}))
        made = ObjectiveTrainer(
            model=model,
            args=arguments(directory, 2, 2, max_steps=6, save_strategy="steps", save_steps=3, learning_rate=0.01),
            train_dataset=pico.ragged(8),
            data_collator=pico.collate,
            objective=Objective(terms),
        )
        in_order(made)
        return made

    whole = trainer(tmp_path / "whole", 0)
    whole.train()
    resumed = trainer(tmp_path / "resumed", 1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert set(expected) == set(found)
    moved = 0
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        moved += name in dict(whole.model.named_parameters())
    assert moved


def test_a_start_is_not_sharded(trash_artifact: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "target_modules": ["**.q_proj"], "init_lora_weights": "pissa"}
    trainer = ObjectiveTrainer(
        model=solidify.attach(solidify.load(trash_artifact), lora=lora),
        args=arguments(tmp_path, 2, 1),
        train_dataset=pico.ragged(2),
        data_collator=pico.collate,
        objective=Objective([Term("model")]),
    )
    trainer.args.fsdp = True
    with pytest.raises(AdapterError, match="but not the start that stands frozen beside it"):
        trainer._refuse_unusable()
