"""What it costs in memory to train MoE blocks in full: ours against plain PEFT, on the same model, in one run.

`python benchmarks/full_training.py` makes a small OLMoE (232 MB), and has each way load it, run it once, put full
training on all its MoE blocks, and take one forward and backward pass; each in a process of its own, by turns. Resident
memory (anonymous, and of mapped files) is read from /proc after each. Medians of three go to
build/benchmarks/full_training.json.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
LORA = {"r": 1}  # PEFT wants one
ROUNDS = 3


def resident() -> float:
    """Returns the resident memory of this process in MB."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key[:3] == "Rss"}
    return sum(found.values()) / 1024


def run(way: str, model: str) -> dict[str, float]:
    """Measures one way: memory that attaching adds, and a pass with its gradients."""
    import torch

    if way == "ours":
        import solidify

        base = solidify.load(model)
    else:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    ids = torch.randint(0, 1000, (2, 32))
    with torch.no_grad():
        base(input_ids=ids)
    before = resident()
    if way == "ours":
        tuned: Any = solidify.attach(base, lora={**LORA, "target_modules": ["**.q_proj"]}, train=["model.layers.*.mlp"])
    else:
        from peft import LoraConfig, get_peft_model

        names = [name for name, module in base.named_modules() if name.endswith(".mlp")]
        tuned = get_peft_model(base, LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=names))
    attached = resident()
    tuned(input_ids=ids, labels=ids).loss.backward()
    gradients = sum(p.grad.nbytes for p in tuned.parameters() if p.grad is not None) / 2**20
    return {"attached": attached - before, "a pass": resident() - before, "gradients": gradients}


def main() -> None:
    """Runs both ways by turns and prints what they add."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    import solidify
    from solidify.modules.trashcan_moe import TrashCanMoE

    found: dict[str, list[dict[str, float]]] = {"ours": [], "peft": []}
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        model = OlmoeForCausalLM(OlmoeConfig(**SIZES))
        solidify.build(model, solidify.replace(model, "model.layers.*.mlp", TrashCanMoE), Path(directory) / "artifact")
        del model
        for _ in range(ROUNDS):
            for way, results in found.items():
                command = [sys.executable, __file__, way, f"{directory}/artifact"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {w: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for w, runs in found.items()}
    target = Path("build/benchmarks/full_training.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"runs": found, "medians": medians}, indent=1) + "\n")
    for way, figures in medians.items():
        print(way, ", ".join(f"{key} {value:+.0f} MB" for key, value in figures.items()))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(run(*sys.argv[1:])))
    else:
        main()
