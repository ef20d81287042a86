"""What both scripts of `gpu.py` are given: a base of random numbers, rows, settings; and what they note. No solidify.

`python benchmarks/gpu_work.py DIR SIZE` writes the base.
"""

from __future__ import annotations

import importlib
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
TARGETS = ("q_proj", "v_proj")
GATES = "output_gate"  # of GatedAttention, trained in full
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = Path(__file__).parents[1] / "src" / "solidify" / "modules"
_SEED = 0


@dataclass(frozen=True)
class Shape:
    """A Llama, and what it is trained on: rows in a batch, tokens in a row, steps, of which the first are not timed."""

    config: dict[str, int]
    rows: int
    length: int
    steps: int
    warm: int

    def __str__(self) -> str:
        sizes = f"{self.config['num_hidden_layers']} layers, {self.config['hidden_size']} wide"
        return f"Llama of {sizes}, {self.rows} x {self.length} tokens a step, {self.steps - self.warm} steps"


SHAPES = {
    "full": Shape(
        {
            "vocab_size": 32000,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        rows=8,
        length=1024,
        steps=15,
        warm=5,
    ),
    "tiny": Shape(
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        rows=2,
        length=32,
        steps=3,
        warm=1,
    ),
}


@dataclass(frozen=True)
class Row:
    """One row of the table: which trainer, on what, with which settings of it; `needs` a package, `on_device` alone."""

    title: str
    trainer: str = "Trainer"
    quantized: bool = False
    changed: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    needs: str = ""
    on_device: bool = False


ROWS = {
    "lora": Row("LoRA, transformers' Trainer"),
    "sft": Row("LoRA, TRL's SFTTrainer", "SFTTrainer"),
    "qlora": Row("QLoRA (nf4), transformers' Trainer", quantized=True, needs="bitsandbytes"),
    "liger": Row(
        "LoRA with Liger's kernels", settings=(("use_liger_kernel", True),), needs="liger_kernel", on_device=True
    ),
    "changed": Row("LoRA on a changed model (GatedAttention on every layer)", changed=True),
}


def write_base(directory: Path, shape: Shape) -> None:
    """Writes a Llama of random numbers in bfloat16, with a tokenizer that SFTTrainer asks for."""
    torch.manual_seed(_SEED)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**shape.config, pad_token_id=1, eos_token_id=2)).to(torch.bfloat16)
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<end>": 2}, unk_token="<unk>"))
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)


def make_rows(shape: Shape) -> Dataset:
    """Makes rows of random tokens, as many as the steps take."""
    generator = torch.Generator().manual_seed(_SEED)
    size = (shape.rows * shape.steps, shape.length)
    return Dataset.from_dict(
        {"input_ids": torch.randint(3, shape.config["vocab_size"], size, generator=generator).tolist()}
    )


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stacks rows; what is predicted is what stands there."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def make_arguments(row: Row, shape: Shape, directory: Path) -> Any:
    """Makes the trainer's settings: the same for both scripts."""
    library, name = ("trl", "SFTConfig") if row.trainer == "SFTTrainer" else ("transformers", "TrainingArguments")
    more = {"max_length": shape.length, "packing": False} if row.trainer == "SFTTrainer" else {}
    return getattr(importlib.import_module(library), name)(
        output_dir=str(directory),
        per_device_train_batch_size=shape.rows,
        max_steps=shape.steps,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=DEVICE == "cpu",
        gradient_checkpointing=False,
        logging_steps=shape.steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **more,
        **dict(row.settings),
    )


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes how long each step took once the device is done with it, and the most memory that tensors held."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Begins a step."""
        _finish_work()
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Ends a step."""
        _finish_work()
        self.seconds.append(time.perf_counter() - self._begun)

    def note(self, trainer: Any, path: Path) -> None:
        """Writes what was measured, and the loss and the number of trained parameters, which tell whether two scripts
        did the same."""
        cuda = DEVICE == "cuda"
        memory = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        found = {
            "seconds": statistics.median(self.seconds[self.shape.warm :]),
            "memory": memory,
            "loss": losses[-1],
            "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        }
        path.write_text(json.dumps(found), encoding="utf-8")


def _finish_work() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    write_base(Path(sys.argv[1]), SHAPES[sys.argv[2]])
