"""Pico models: real transformers classes in tiny configurations, and batches for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import PreTrainedModel

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "user_modules"))

import wrappers  # noqa: E402, F401 (tests use pico.wrappers: classes whose source file can travel)

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}


def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """Builds `<name>` (a transformers class with a head) from settings, in evaluation mode."""
    torch.manual_seed(seed)
    head = getattr(transformers, name)
    torch.set_default_dtype(dtype)  # as from_pretrained does; .to(dtype) would also cast what is computed, not saved
    try:
        return head(head.config_class(**settings)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def olmoe(layers: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    """An OLMoE with routers that have opinions (the default initialisation is nearly uniform)."""
    values = {**SIZES, **EXPERTS, "intermediate_size": 16, "eos_token_id": 0, "num_hidden_layers": layers, **settings}
    model = make("OlmoeForCausalLM", seed=seed, dtype=dtype, **values)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(20)
            layer.mlp.experts.gate_up_proj.mul_(5)
            layer.mlp.experts.down_proj.mul_(5)
    return model


def llama(**settings: object) -> PreTrainedModel:
    return make("LlamaForCausalLM", **{**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, **settings})


def artifact(model: PreTrainedModel, edits: Sequence[Any], directory: Path, **more: Any) -> Path:
    """Writes an artifact for tests of what comes after it: as `solidify.build`, but no fresh process looks at it."""
    from solidify.artifact.solidify import assemble
    from solidify.directory import trust

    trust.remember(assemble(model, edits, directory, **more))
    return directory


def unwitnessed(patch: pytest.MonkeyPatch) -> None:
    """Leaves the fresh process out of what is built, where it is not the point; it does not even start."""
    from solidify.artifact import certificate, fresh
    from solidify.findings import Finding

    patch.setattr(certificate, "witness", lambda *_: [Finding("left out", True, "")])
    patch.setattr(fresh, "started", nullcontext)


def tokens(rows: int = 2, length: int = 12, *, seed: int = 0, vocab_size: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (rows, length), generator=generator)


def ragged(count: int = 8, *, seed: int = 3) -> list[dict[str, list[int]]]:
    """Examples of different lengths, labels equal to inputs."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for place in range(count):
        length = 4 + int(torch.randint(0, 16, (1,), generator=generator))
        ids = torch.randint(3, 120, (length,), generator=generator).tolist()
        # Some labels are masked, as in instruction tuning: token shares are then no sequence shares.
        labels = [-100 if place % 3 == 0 and i < length // 2 else t for i, t in enumerate(ids)]
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pads on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    pad = [width - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([row["input_ids"] + [1] * n for row, n in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, pad, strict=True)]
        ),
        "labels": torch.tensor([row["labels"] + [-100] * n for row, n in zip(rows, pad, strict=True)]),
    }
