"""The trash can as a judge of text: how well the kept share of its slots tells planted noise from clean documents.

`python benchmarks/trash_judge.py` takes held-out documents of 128 tokens, makes a noisy one of each (tokens shuffled, a
phrase repeated, text of another language), and scores all by the share of slots that are kept and by perplexity. What
is printed, and written to docs/trash_judge.json, is the area under the curve: 0.5 is chance, 1 tells all apart, less
than 0.5 tells them apart the wrong way round. Nothing is trained; thresholds are set on training text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from trash_trial import ARMS, Arm, Trial

DOCS = Path(__file__).parents[1] / "docs"
FOREIGN = Path(__file__).parents[1] / "README.zh-CN.md"


def plant(trial: Trial, kind: str, clean: torch.Tensor) -> torch.Tensor:
    """Returns a noisy document for each clean one, of the same length."""
    generator = torch.Generator().manual_seed(0)
    length = clean.shape[1]
    if kind == "shuffled":
        return torch.stack([row[torch.randperm(length, generator=generator)] for row in clean])
    if kind == "repeated":
        return clean[:, :8].repeat(1, length // 8)
    text = "".join(c for c in FOREIGN.read_text(encoding="utf-8") if ord(c) > 0x2E80)
    ids = torch.tensor(trial.tokenizer(text, verbose=False).input_ids)
    starts = torch.randint(0, len(ids) - length, (len(clean),), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def score(trial: Trial, model: nn.Module, arm: Arm, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns by document the kept share, and the mean negative log-likelihood."""
    kept, losses = [], []
    for part in rows.split(8):
        with torch.no_grad(), trial.running(model, arm) as seen:
            logits = model(input_ids=part).logits.float()
        keep = torch.stack(seen["kept"]).float().mean((0, 2))
        kept.append(keep.view(len(part), -1).mean(1))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(part), -1).mean(1))
    return torch.cat(kept), torch.cat(losses)


def area(clean: torch.Tensor, noisy: torch.Tensor) -> float:
    """Returns how often a noisy document scores higher than a clean one, ties half."""
    above = (noisy[:, None] > clean[None]).double() + 0.5 * (noisy[:, None] == clean[None]).double()
    return float(above.mean())


def main() -> None:
    """Judges documents with each arm."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=DOCS / "trash_judge.json")
    output = parser.parse_args().output
    trial = Trial(argparse.Namespace(base=None, dtype="float32", steps=100, kept=0.75, held_out=64))
    clean = trial.held_out
    trial.held_out = trial.train[:64]  # what thresholds are set on
    noisy = {kind: plant(trial, kind, clean) for kind in ("shuffled", "repeated", "foreign")}
    found: dict[str, Any] = {}
    for arm in (arm for arm in ARMS if arm.name.startswith("trash can") and not arm.trained):
        ready = trial.prepare(arm, 0)
        trial.calibrate(trial.base, ready)
        kept, loss = score(trial, trial.base, ready, clean)
        for kind, rows in noisy.items():
            less, more = score(trial, trial.base, ready, rows)
            found.setdefault(arm.name, {})[kind] = [area(-kept, -less)]
            found.setdefault("perplexity", {})[kind] = [area(loss, more)]
        output.write_text(json.dumps(found, indent=1) + "\n")
        print(arm.name, {kind: round(values[0], 3) for kind, values in found[arm.name].items()}, flush=True)
    print("perplexity", {kind: round(values[0], 3) for kind, values in found["perplexity"].items()})


if __name__ == "__main__":
    main()
