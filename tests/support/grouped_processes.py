"""Run by `torchrun` from tests/test_llava.py: a LLaVA trains on rows with and without images, is cut and goes on.

Every process writes which rows it saw, whole and cut; the first also what one step's gradients were, where one process
has rows with images and another has none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llava
import torch
from safetensors.torch import save_file

import solidify
from solidify.objective.objective import Objective, Term
from solidify.training import data, images
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, in_order


class Seen(images.Collator):
    """Keeps which rows came together."""

    def __init__(self, processor: Any, rows: Any) -> None:
        super().__init__(processor)
        self.numbers = {json.dumps([row["input_ids"], row["images"]]): place for place, row in enumerate(rows)}
        self.batches: list[list[int]] = []

    def __call__(self, rows: Any) -> dict[str, Any]:
        self.batches.append([self.numbers[json.dumps([row["input_ids"], row["images"]])] for row in rows])
        return super().__call__(rows)


def model() -> Any:
    torch.manual_seed(1)
    plain = llava.model(llava.processor())
    lora = {"r": 2, "target_modules": [llava.QUERIES]}
    return llava.awake(solidify.attach(plain, lora=lora, train=[llava.PROJECTOR]))


def trainer(rows: Any, directory: Path, size: int, **more: Any) -> Any:
    return ObjectiveTrainer(
        model=model(),
        args=arguments(directory, size, 1, **more),
        train_dataset=rows,
        data_collator=Seen(llava.processor(), rows),
        objective=Objective([Term("model")]),
        parameter_groups=[{"parameters": llava.PROJECTOR, "learning_rate": 1e-2}],
        group_by=("modality", "length"),
    )


def main() -> None:
    directory = Path(sys.argv[1])
    read = data.read(directory / "rows.jsonl", "text", "image")
    rows = images.tokenize(read, llava.processor(), text="text", max_length=64)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else int(sys.argv[2])

    four = rows.select([0, 1, 2, 5])  # with images, with images, without, without
    one = trainer(four, directory / "step", 4 // ranks, max_steps=1)
    in_order(one)
    watch = Gradients(one.model)
    one.add_callback(watch)
    one.train()
    if one.accelerator.is_main_process:
        save_file(watch.found, directory / f"{ranks}.safetensors")
    if ranks == 1:
        return
    options: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2}
    whole = trainer(rows, directory / "whole", 2, **options)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 8, **options}
    cut = directory / "cut"
    trainer(rows, cut, 2, **saving).train()
    again = trainer(rows, cut, 2, **saving)
    again.train(resume_from_checkpoint=str(cut / "checkpoint-8"))
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    found = {
        "whole": whole.data_collator.batches,
        "again": again.data_collator.batches,
        "equal": all(torch.equal(a, b) for a, b in pairs),
        "rates": whole.history[0],
    }
    (directory / f"rank{whole.accelerator.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
