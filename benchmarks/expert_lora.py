"""What LoRA on experts costs, by its factors and as PEFT builds it: a step of one MoE block, its time and its memory.

The default is the shape of OLMoE-1B-7B: hidden size 2048, intermediate size 1024, 64 experts, 8 of them for a token.
The two ways take turns on one model in one process. Results go to `build/benchmarks/expert_lora.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

import solidify
from solidify.adapter import expert_factors


class Peak(threading.Thread):
    """Samples how much memory this process holds that no file backs, and keeps the largest."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.largest = anonymous()
        self.over = threading.Event()

    def run(self) -> None:
        """Looks every two milliseconds."""
        while not self.over.wait(0.002):
            self.largest = max(self.largest, anonymous())

    def bytes(self) -> int:
        """Ends, and returns what was held at most beyond the beginning."""
        self.over.set()
        self.join()
        return max(self.largest, anonymous()) - self.first


def anonymous() -> int:
    """Returns the resident bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def layer(arguments: argparse.Namespace, dtype: torch.dtype) -> Any:
    """One MoE block with LoRA on its experts, as PEFT attaches it, run by its factors."""
    config = OlmoeConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        num_hidden_layers=1,
        vocab_size=64,
        num_attention_heads=16,
        pad_token_id=1,
        eos_token_id=2,
    )
    torch.set_default_dtype(dtype)
    model = OlmoeForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.set_experts_implementation(arguments.implementation)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=arguments.rank, target_modules=[], target_parameters=targets, init_lora_weights=False)
    return solidify.factor_experts(get_peft_model(model, lora))


def one_step(model: Any, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs the block forwards and backwards; returns what came out and all gradients."""
    model.zero_grad()
    rows = hidden.clone().requires_grad_()
    output = model.get_base_model().model.layers[0].mlp(rows)
    output.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "input's gradient": rows.grad, **found}


def measure(run: Callable[[], object]) -> dict[str, float]:
    """Returns the seconds that a call takes, those of the processor, and the bytes that it holds beside what was there.

    The processor's are those of this process: other work on the machine is no part of them.
    """
    peak = Peak()
    peak.start()
    start, worked = time.perf_counter(), time.process_time()
    run()
    taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
    return {**taken, "peak_bytes": peak.bytes()}


def main() -> None:
    """Measures both ways in turn and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"hidden": 2048, "intermediate": 1024, "experts": 64, "top_k": 8, "rank": 8, "tokens": 256, "rounds": 5}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--implementation", default="grouped_mm", choices=["grouped_mm", "eager", "batched_mm"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = layer(arguments, getattr(torch, arguments.dtype))
    hidden = torch.randn(1, arguments.tokens, arguments.hidden, dtype=getattr(torch, arguments.dtype))
    ways = {"peft": expert_factors.built, "factors": nullcontext}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    results: dict[str, dict[str, torch.Tensor]] = {}
    for place in range(arguments.rounds + 1):
        for name, entered in ways.items():
            with entered():
                found = measure(lambda name=name: results.update({name: one_step(model, hidden)}))
            if place:  # the first round warms up
                taken[name].append(found)
        if place == 0:
            distance = _largest_difference(results)
        results.clear()
    figures = {
        name: {what: statistics.median(run[what] for run in found) for what in found[0]}
        for name, found in taken.items()
    }
    ratios = {what: figures["factors"][what] / figures["peft"][what] for what in figures["peft"]}
    report = {
        **vars(arguments),
        **figures,
        "runs": taken,
        "ratios": ratios,
        "largest_relative_difference": distance,
        "threads": torch.get_num_threads(),
    }
    path = Path("build/benchmarks/expert_lora.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    for name, found in {**figures, "ratio": {**ratios, "peak_bytes": ratios["peak_bytes"] * 1e9}}.items():
        seconds = f"{found['seconds']:8.3f} s, {found['cpu_seconds']:8.3f} s of the processor"
        print(f"{name:8s} {seconds}, {found['peak_bytes'] / 1e9:8.3f} GB beside the weights")
    print(f"apart by {distance:.1e}")


def _largest_difference(results: dict[str, dict[str, torch.Tensor]]) -> float:
    """Returns how far the two ways are apart, by the norm of each tensor."""
    mine, theirs = results["factors"], results["peft"]
    return max(float((mine[n] - t).float().norm() / t.float().norm()) for n, t in theirs.items())


if __name__ == "__main__":
    main()
