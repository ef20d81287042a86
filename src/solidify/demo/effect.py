"""What the trash can is worth: held-out loss against the expert work that is saved, beside the plain way to save it.

The plain way is a smaller top-k for every token. Both are measured untrained and after the same LoRA training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from solidify.adapter import lookup
from solidify.model import anatomy
from solidify.objective.capture import Capture, capture
from solidify.training import data

TRASH = Capture(class_name="TrashCan")


@dataclass(frozen=True)
class Row:
    """One way of running the model: share of routed slots computed, held-out loss in nats per token."""

    name: str
    kept: float
    loss: float


@dataclass(frozen=True)
class HeldOut:
    """Tokenised held-out text and what makes batches of it."""

    examples: Any
    collate: Any

    def loss(self, model: nn.Module) -> float:
        """Returns the model's loss."""
        return data.mean_loss(model, self.examples, self.collate)

    def margins(self, model: nn.Module, limit: int = 64) -> dict[str, torch.Tensor]:
        """Returns the margins (slots,) of every trash can over the attended tokens of some examples."""
        found: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad(), anatomy.evaluation(model):
            for start in range(0, min(limit, len(self.examples)), 16):
                rows = [self.examples[i] for i in range(start, min(start + 16, len(self.examples)))]
                batch = self.collate([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
                with capture(model, {"trash": TRASH}) as captured:
                    model(**batch)
                mask = batch["attention_mask"].reshape(-1).bool()
                for name, margin in captured["trash"].items():
                    found.setdefault(name, []).append(margin[mask].flatten())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def kept(self, model: nn.Module) -> float:
        """Returns the share of routed slots that are computed, over all layers."""
        margins = self.margins(model, limit=len(self.examples))
        return sum(float((m >= 0).float().mean()) for m in margins.values()) / len(margins)


def with_top_k(model: nn.Module, top_k: int) -> nn.Module:
    """Sets in place how many experts every router chooses, and returns the model."""
    for module in model.modules():
        if type(module).__name__ == "OlmoeTopKRouter":
            module.top_k = top_k  # type: ignore[assignment]
    return model


def calibrate(model: nn.Module, calibration: HeldOut, kept: float) -> None:
    """Sets in place every trash can's threshold so that this share of the slots is computed; no training."""
    margins = calibration.margins(model)
    for located in lookup.modules(model):
        if located.name in margins:
            can: Any = located.inner
            with torch.no_grad():
                can.bias += torch.quantile(margins[located.name], 1 - kept)


def at_same_share(rows: list[Row], kept: float) -> float:
    """Returns the loss that rows of different top-k have at a share between them, on the straight line."""
    above = min((row for row in rows if row.kept >= kept), key=lambda row: row.kept)
    below = max((row for row in rows if row.kept <= kept), key=lambda row: row.kept)
    if above.kept == below.kept:
        return above.loss
    weight = (kept - below.kept) / (above.kept - below.kept)
    return weight * above.loss + (1 - weight) * below.loss


def generate(model: nn.Module, tokenizer: Any, prompt: str, *, tokens: int = 24) -> str:
    """Continues a text greedily."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
