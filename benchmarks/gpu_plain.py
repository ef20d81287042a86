"""The script that ours is compared with: transformers, PEFT and TRL as their documentation shows them.

python benchmarks/gpu_plain.py BASE SIZE ROW RESULT
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import gpu_work as work
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def load(base: str, row: work.Row) -> Any:
    """Loads the base, changes it by hand where the row says so, and puts LoRA on it."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if row.quantized:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    more = {}
    if row.changed:
        sys.path.insert(0, str(work.MODULES))
        gated = importlib.import_module("gated_attention").GatedAttention
        for layer in model.model.layers:
            layer.self_attn = gated(layer.self_attn).to(torch.bfloat16)
        more = {"modules_to_save": [work.GATES]}
    return get_peft_model(model, LoraConfig(**work.LORA, target_modules=list(work.TARGETS), **more))


def main(base: str, size: str, name: str, result: str) -> None:
    """Trains, and notes what it took."""
    shape, row = work.SHAPES[size], work.ROWS[name]
    clock = work.Clock(shape)
    with tempfile.TemporaryDirectory() as directory:
        options: dict[str, Any] = {"data_collator": work.collate}
        if row.trainer == "SFTTrainer":
            options = {"processing_class": AutoTokenizer.from_pretrained(base)}
        library = "trl" if row.trainer == "SFTTrainer" else "transformers"
        trainer = getattr(importlib.import_module(library), row.trainer)(
            model=load(base, row),
            args=work.make_arguments(row, shape, Path(directory)),
            train_dataset=work.make_rows(shape),
            callbacks=[clock],
            **options,
        )
        trainer.train()
    clock.note(trainer, Path(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
