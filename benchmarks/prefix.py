"""What a frozen prefix saves: training the last layers of OLMoE's shape, plainly and with `cache_prefix`, in one run.

`python benchmarks/prefix.py` makes a model with the layers of OLMoE-1B-7B (hidden 2048, 16 layers, 16 heads, experts of
1024, 8 of them for a token), random numbers, bfloat16 in memory, with 16 experts instead of 64 so that it takes 3.7 GB,
and a vocabulary of 8192. LoRA is trained on the last 2 layers. After a first epoch that fills the cache, steps of both
ways take turns on the same batches. Medians go to build/benchmarks/prefix.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import solidify

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts_per_tok": 8,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
TRAINED = [f"model.layers.{number}.self_attn.{name}_proj" for number in (14, 15) for name in "qkvo"]
BAR = 1 / 3


def make_model(experts: int, dtype: torch.dtype) -> Any:
    """Returns the model, with LoRA on its last two layers."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=experts, use_cache=False))
    torch.set_default_dtype(torch.float32)
    adapted: Any = solidify.attach(model, lora={"r": 16, "target_modules": TRAINED})
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted.train()


def take_step(model: Any, optimizer: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Takes one step under autocast; returns seconds and the loss."""
    begin = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begin, float(loss.detach())


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Measures both ways by turns, each from the same weights, and compares their losses."""
    model = make_model(asked.experts, torch.bfloat16 if asked.dtype == "bfloat16" else torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    batches = [
        torch.randint(2, SIZES["vocab_size"], (asked.rows, asked.length), generator=generator)
        for _ in range(asked.batches)
    ]
    directory = Path(tempfile.mkdtemp(prefix="prefix-"))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    seconds: dict[str, list[float]] = {"plain": [], "cached": [], "compared": [], "first epoch": []}
    losses: dict[str, list[float]] = {"plain": [], "cached": []}
    try:
        with solidify.cache_prefix(model, directory, keep=True):
            seconds["first epoch"] = [take_step(model, optimizer, ids)[0] for ids in batches]
        disk = sum(path.stat().st_size for path in directory.iterdir())
        for _ in range(asked.rounds):
            for way in ("plain", "cached"):
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if p.requires_grad:
                            p.copy_(start[name])
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
                for compared, time, loss in run_epoch(
                    model, optimizer, batches, directory if way == "cached" else None
                ):
                    seconds["compared" if compared else way].append(time)
                    losses[way].append(loss)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "settings": vars(asked),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "medians": medians,
        "ratio": medians["cached"] / medians["plain"],
        "bar": BAR,
        "bytes": disk,
        "losses equal": losses["plain"] == losses["cached"],
    }


def run_epoch(
    model: Any, optimizer: Any, batches: list[torch.Tensor], directory: Path | None
) -> list[tuple[bool, float, float]]:
    """Runs one step for each batch; with a directory, from what is kept there, once its first batch was compared.

    Returns of each whether what was read was computed all the same, to be compared; seconds; and the loss.
    """
    if directory is None:
        return [(False, *take_step(model, optimizer, ids)) for ids in batches]
    taken = []
    with solidify.cache_prefix(model, directory, keep=True) as cached:
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            model(input_ids=batches[0], labels=batches[0])  # computed, and compared with what is kept
        for ids in batches:
            before = cached.compared
            time, loss = take_step(model, optimizer, ids)
            taken.append((cached.compared > before, time, loss))
    return taken


def main() -> None:
    """Measures, prints a line, and writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    found = measure(parser.parse_args())
    target = Path("build/benchmarks/prefix.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n")
    medians = ", ".join(f"{way} {value:.2f} s" for way, value in found["medians"].items())
    print(f"{medians}; ratio {found['ratio']:.3f} (bar {BAR:.3f}); losses equal: {found['losses equal']}")


if __name__ == "__main__":
    main()
