"""What healing brought back: divergence after each stage, without the new branches, on longer rows; and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from solidify.findings import Finding
from solidify.healing import measuring
from solidify.healing.measuring import Distance

Batches = Sequence[Mapping[str, torch.Tensor]]


def measure_more(model: PreTrainedModel, base: PreTrainedModel, held_out: Batches) -> dict[str, Any]:
    """Measures a healed model with its new branches switched off, and on rows of other lengths."""
    found: dict[str, Any] = {}
    if measuring.ablating(model):
        with measuring.ablated(model):
            found["ablated"] = describe_distance(measuring.distance(model, base, held_out))
    longer = _join_rows(held_out, _longest(model))
    if longer:
        found["longer"] = {
            "length": longer[0]["input_ids"].shape[1],
            **describe_distance(measuring.distance(model, base, longer)),
        }
    return found


def _longest(model: PreTrainedModel) -> int:
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**20)


def _join_rows(batches: Batches, longest: int) -> list[dict[str, torch.Tensor]]:
    """Returns rows of up to four times the length, joined of the rows of batches: lengths beyond training."""
    rows = [row[mask.bool()] for b in batches for row, mask in zip(b["input_ids"], _mask_of(b), strict=True)]
    if not rows:
        return []
    length = min(4 * max(len(row) for row in rows), longest)
    joined = torch.cat(rows)
    count = len(joined) // length
    return [{"input_ids": joined[:length][None]}] if count and length > max(len(row) for row in rows) else []


def _mask_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"]))


def describe_stages(stages: Mapping[str, Distance]) -> list[dict[str, Any]]:
    """Returns what was measured after each stage, with the share that it recovered, as plain values."""
    first = next(iter(stages.values()), None)
    return [
        {"stage": name, **describe_distance(found), "recovered": found.recovered(first) if first else 0.0}
        for name, found in stages.items()
    ]


def describe_distance(found: Distance) -> dict[str, Any]:
    """Returns a distance as plain values."""
    return {"kl": found.kl, "loss": found.loss, "base_loss": found.base_loss, "tokens": found.tokens}


def judge(measured: Mapping[str, Any]) -> list[Finding]:
    """Says what healing did: it may not lead away from the base, and what a new branch adds is told."""
    stages = measured["stages"]
    first, last = stages[0], stages[-1]
    words = (
        f"KL from the base {first['kl']:.4g} after surgery, {last['kl']:.4g} after {last['stage']} "
        f"({last['recovered']:.1%} recovered); loss {first['loss']:.4g}, {last['loss']:.4g}, the base's "
        f"{last['base_loss']:.4g}; {last['tokens']} held-out tokens"
    )
    # On a sample of text: a rise is a failure (NaN is one too), a fall is a figure and no proof.
    found = [Finding("nearer to the base", None if last["kl"] <= first["kl"] else False, words)]
    if "ablated" in measured:
        off = measured["ablated"]["kl"]
        words = f"with the new branches off KL is {off:.4g}, with them {last['kl']:.4g}"
        found.append(Finding("new branches are used", None, words))
    if "longer" in measured:
        longer = measured["longer"]
        words = f"rows of {longer['length']} tokens: KL {longer['kl']:.4g}, loss {longer['loss']:.4g}"
        found.append(Finding("lengths beyond training", None, f"{words}, the base's {longer['base_loss']:.4g}"))
    return found


def add_stage(measured: Mapping[str, Any], name: str, found: Distance) -> list[dict[str, Any]]:
    """Returns the stages of what was measured with one more, whose recovered share is of the first's divergence."""
    first = Distance(*(measured["stages"][0][key] for key in ("kl", "loss", "base_loss", "tokens")))
    return [*measured["stages"], {"stage": name, **describe_distance(found), "recovered": found.recovered(first)}]
