"""Writes a random checkpoint, tensor by tensor: the subject of the benchmarks of full scale.

`python benchmarks/checkpoint.py DIR --size full --layout hub` makes one of the size of OLMoE-1B-7B (13.8 GB). The `hub`
layout has a tensor for each expert, as the family's checkpoints on the hub do; `memory` has the tensors that
transformers keeps in memory, where the experts of a layer are one. Both hold the same numbers, which depend on the seed
and the size alone. The `dense` layout has no experts and the shape of Llama-3.1-8B (16 GB), or half of its layers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.core_model_loading import revert_weight_conversion

Layout = Literal["hub", "memory", "dense"]

CONFIGS: dict[str, dict[str, Any]] = {
    "full": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "small": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
_LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
DENSE: dict[str, dict[str, Any]] = {
    "full": {**_LLAMA, "num_hidden_layers": 32},
    "half": {**_LLAMA, "num_hidden_layers": 16},
    "small": {**_LLAMA, "vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8},
    "tiny": {**_LLAMA, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2},
}
SHARD_BYTES = {"full": 5_000_000_000, "half": 5_000_000_000, "small": 250_000_000, "tiny": 500_000}
END, PADDING = "<|endoftext|>", "<|padding|>"
STD = 0.02
POOL = {"full": 1 << 26, "half": 1 << 26, "small": 1 << 26, "tiny": 1 << 22}  # how many numbers are drawn
PIECE = 1 << 16  # how many of them in a row a tensor takes


class Numbers:
    """Gives every tensor numbers of its own, by its name: pieces of one pool, each from a random place."""

    def __init__(self, seed: int, count: int) -> None:
        """Draws the pool."""
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        self.pool = (torch.randn(count, generator=generator) * STD).to(torch.bfloat16)

    def fill(self, name: str, shape: torch.Size) -> torch.Tensor:
        """Returns a matrix around zero, or a norm's weight around one."""
        places = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        flat = torch.empty(shape.numel(), dtype=torch.bfloat16)
        for piece in flat.split(PIECE):
            start = int(places.integers(len(self.pool) - len(piece)))
            piece.copy_(self.pool[start : start + len(piece)])
        return (flat if len(shape) > 1 else 1 + flat).view(shape)


def write(directory: Path, *, size: str = "full", layout: Layout = "hub", seed: int = 0) -> None:
    """Writes a checkpoint that appears under its name when it is complete; one that is there already is kept."""
    if directory.exists():
        return
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    special = {"dtype": "bfloat16", "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(**DENSE[size], **special) if layout == "dense" else OlmoeConfig(**CONFIGS[size], **special)
    with torch.device("meta"):
        model = (LlamaForCausalLM if layout == "dense" else OlmoeForCausalLM)(config).to(torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(partial)
    GenerationConfig.from_model_config(config).save_pretrained(partial)
    _tokenizer(config).save_pretrained(partial)
    numbers = Numbers(seed, POOL[size])
    shards = list(_shards(model, SHARD_BYTES[size]))
    index: dict[str, str] = {}
    for place, names in enumerate(shards, 1):
        file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(_write_shard(partial / file, model, names, layout, numbers), file)
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (partial / "model.safetensors.index.json").write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(directory)


def _shards(model: PreTrainedModel, limit: int) -> Iterator[list[str]]:
    """Yields the names of the tensors of one file after another, in the model's order."""
    names: list[str] = []
    held = 0
    for name, tensor in model.state_dict().items():
        if names and held + tensor.nbytes > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += tensor.nbytes
    yield names


def _write_shard(path: Path, model: PreTrainedModel, names: list[str], layout: Layout, numbers: Numbers) -> list[str]:
    """Writes one file, its header first; returns the names in it. At most one tensor of the model is in memory."""
    state = model.state_dict()

    def laid_out(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return revert_weight_conversion(model, {name: tensor}) if layout == "hub" else {name: tensor}

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        for key, tensor in laid_out(name, state[name]).items():
            header[key] = {
                "dtype": "BF16",
                "shape": list(tensor.shape),
                "data_offsets": [end, end := end + tensor.nbytes],
            }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for tensor in laid_out(name, numbers.fill(name, state[name].shape)).values():
                file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    return [key for key in header if key != "__metadata__"]


def _tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token for each byte and no merges."""
    words = [END, PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=config.max_position_embeddings,
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=DENSE, default="full")
    parser.add_argument("--layout", choices=("hub", "memory", "dense"), default="hub")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.directory, size=given.size, layout=given.layout, seed=given.seed)


if __name__ == "__main__":
    main()
