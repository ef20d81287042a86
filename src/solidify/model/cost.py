"""What a model costs: parameters, bytes, matrix FLOPs per token. Works on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solidify.model import anatomy


@dataclass(frozen=True)
class Cost:
    """Parameters, their bytes, and FLOPs of one token's forward pass through all weight matrices.

    A matrix of n numbers costs 2n FLOPs per token; stacked experts (num_experts, ., .) cost the share that the router
    picks. Attention scores (which grow with the sequence), embeddings looked up and norms are not counted. A skipped
    expert slot (a trash can) is not known before running, so what is counted is the most.
    """

    parameters: int
    bytes: int
    flops_per_token: int

    def document(self) -> dict[str, int]:
        """Returns the figures as plain values."""
        return {"parameters": self.parameters, "bytes": self.bytes, "flops_per_token": self.flops_per_token}


def cost(model: PreTrainedModel) -> Cost:
    """Counts a model's cost."""
    unique = {id(p): p for p in model.parameters()}
    return Cost(
        anatomy.count(unique.values()),
        sum(p.numel() * p.element_size() for p in unique.values()),
        sum(_flops(model, name, module) for name, module in model.named_modules()),
    )


def _flops(model: PreTrainedModel, name: str, module: nn.Module) -> int:
    """Counts the matrices that a module holds itself."""
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, (nn.Linear, Conv1D)):
        return 2 * module.weight.numel()
    total = 0
    for parameter in module.parameters(recurse=False):
        if parameter.ndim == 2:
            total += 2 * parameter.numel()
        elif parameter.ndim == 3:
            experts, chosen = _experts(model, name)
            share = chosen / experts if experts == parameter.shape[0] else 1.0
            total += int(2 * parameter.numel() * share)
    return total


def _experts(model: PreTrainedModel, name: str) -> tuple[int, int]:
    """Returns the number of experts and how many a token gets, from the configuration around the module."""
    values = anatomy.enclosing_config(model, name).get_text_config().to_dict()
    experts = next((values[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if values.get(k)), 0)
    chosen = next((values[k] for k in ("num_experts_per_tok", "top_k_experts", "moe_topk") if values.get(k)), 1)
    return int(experts), int(chosen)
