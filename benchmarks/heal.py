"""Measures the memory of an alignment that streams its base: a dense model of Llama-7B's shape, random weights.

`python benchmarks/heal.py DIR` writes the model to DIR/base once (13.5 GB with 32 layers), puts a module with something
to learn around the attention of some layers, and aligns it in a process of its own. It prints the peak of resident
memory above that of the imports, beside what one layer and the activations take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
ROWS, LENGTH, BATCHES = 1, 256, 4


class Turned(nn.Module):
    """The original, what it returns turned by a matrix that learns."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.inner = original
        size = original.o_proj.out_features
        self.turn = nn.Parameter(torch.eye(size) + 0.01 * torch.randn(size, size))

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, *rest = self.inner(hidden_states, *args, **kwargs)
        return (output @ self.turn, *rest)


def write_base(directory: Path, layers: int) -> None:
    """Writes a model with random weights, a layer at a time."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", **SHAPE)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    generator, places = torch.Generator().manual_seed(0), {}
    for file, tensors in files.items():
        made = {
            name: (torch.randn(t.shape, generator=generator) * 0.02 + (t.ndim == 1)).to(torch.bfloat16)
            for name, t in tensors.items()
        }
        save_file(made, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(made, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)


def read_memory(key: str) -> int:
    """Returns a figure of this process's memory, in bytes."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition(f"{key}:")[2].split()[0])


def run_alignment(directory: Path, numbers: list[int], steps: int) -> None:
    """Aligns the attention of some layers, streamed, and prints what it took."""
    import solidify
    from solidify.healing.align import align
    from solidify.model import anatomy

    surgery = solidify.Surgery(directory / "base")
    surgery.replace([f"model.layers.{number}.self_attn" for number in numbers], Turned)
    base = solidify.Surgery(directory / "base").model
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, LENGTH)
    batches = [{"input_ids": torch.randint(3, 32000, shape, generator=generator)} for _ in range(BATCHES)]
    settings = solidify.Alignment(max_steps=steps, learning_rate=1e-3, stream=True)
    before, started = read_memory("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    found = align(surgery.model, base, batches, edits=surgery.edits, settings=settings, held_out=batches[:1])
    layer = anatomy.size(base.model.layers[0])
    unit = surgery.model.model.layers[numbers[0]].self_attn
    wide = 4 * anatomy.count(unit.parameters())
    learned = 3 * 4 * unit.turn.numel()  # its gradient and two moments
    activations = 2 * (BATCHES + 1) * ROWS * LENGTH * 4096 * 2
    print(
        json.dumps(
            {
                "seconds": round(time.perf_counter() - started, 1),
                "peak": read_memory("VmHWM"),
                "before": before,
                "layer": layer,
                "unit in float32, gradient and moments": wide + learned,
                "activations": activations,
                "above what stood, of layers of base and model, unit and activations": round(
                    (read_memory("VmHWM") - before) / (2 * layer + wide + learned + activations), 2
                ),
                "errors": [[unit.before, unit.after] for unit in found],
            }
        )
    )


def main() -> None:
    """Writes the base, and runs the alignment in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--aligned", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        run_alignment(given.directory, given.aligned, given.steps)
        return
    write_base(given.directory / "base", given.layers)
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inside"], check=True)


if __name__ == "__main__":
    main()
