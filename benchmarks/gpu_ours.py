"""The same trainings as `gpu_plain.py`, by solidify.

python benchmarks/gpu_ours.py build BASE DIRECTORY                   # the base as it stands, and a changed one
python benchmarks/gpu_ours.py train DIRECTORY SIZE ROW RESULT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_work as work
from transformers import AutoTokenizer

import solidify
from solidify.artifact import loading, stock
from solidify.modules.gated_attention import GatedAttention
from solidify.objective.objective import Term

PLAIN, CHANGED = "plain", "changed"


def build(base: str, directory: str) -> None:
    """Builds what is trained: of the base as it stands, and with a gate on every attention."""
    stock.build(loading.load_base(base), Path(directory) / PLAIN)
    read = loading.load_base(base)
    edits = solidify.replace(read.model, "model.layers.*.self_attn", GatedAttention)
    solidify.build(read.model, edits, Path(directory) / CHANGED, tokenizer=read.tokenizer)


def train(directory: str, size: str, name: str, result: str) -> None:
    """Trains, and notes what it took."""
    shape, row = work.SHAPES[size], work.ROWS[name]
    artifact, clock = Path(directory) / (CHANGED if row.changed else PLAIN), work.Clock(shape)
    model: Any = solidify.load(artifact, **({"quantization": "nf4"} if row.quantized else {}))
    targets = [f"model.layers.*.self_attn.{name}" for name in work.TARGETS]
    tuned = solidify.attach(
        model, lora={**work.LORA, "target_modules": targets}, train=[f"**.{work.GATES}"] if row.changed else []
    )
    options: dict[str, Any] = {"data_collator": work.collate}
    if row.trainer == "SFTTrainer":
        options = {"processing_class": AutoTokenizer.from_pretrained(artifact)}
    kind: Any = solidify.ObjectiveSFTTrainer if row.trainer == "SFTTrainer" else solidify.ObjectiveTrainer
    with tempfile.TemporaryDirectory() as scratch:
        trainer = kind(
            model=tuned,
            args=work.make_arguments(row, shape, Path(scratch)),
            train_dataset=work.make_rows(shape),
            objective=solidify.Objective([Term("model")]),
            callbacks=[clock],
            **options,
        )
        trainer.train()
    clock.note(trainer, Path(result))


if __name__ == "__main__":
    _, verb, *given = sys.argv
    {"build": build, "train": train}[verb](*given)
