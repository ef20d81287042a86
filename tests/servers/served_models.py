"""Models that servers are tried with: pico ones with heads of 64, and opinions about the next token."""

from __future__ import annotations

from typing import Any

import pico
import torch
from transformers import PreTrainedModel

SIZES = {"vocab_size": 256, "hidden_size": 128, "num_attention_heads": 2, "pad_token_id": 1, "head_dim": 64}


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Three layers, two heads of queries and one of keys."""
    values = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "intermediate_size": 96, **settings}
    return opinionated(pico.make("LlamaForCausalLM", dtype=dtype, **values))


def olmoe(dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Two layers of eight experts, of which each token uses two."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"}  # OLMoE has no such field
    values = {**sizes, "num_key_value_heads": 2, "intermediate_size": 32, **settings}
    return opinionated(pico.olmoe(dtype=dtype, **values))


def opinionated(model: PreTrainedModel) -> PreTrainedModel:
    """Draws every matrix so wide that the most probable token stands out, and differs from text to text."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2 if "embed" in name else 0.3)
    return model


def awaken(model: PreTrainedModel) -> None:
    """Wakes every trash can so that it takes a part of the slots, another of each token."""
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.trash.bias.fill_(-1.5)
            layer.mlp.trash.weight.normal_(std=0.1)


def stir(model: PreTrainedModel, *parts: str) -> None:
    """Draws the parameters whose names hold one of `parts`, so that new modules do something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.normal_(std=0.15)
