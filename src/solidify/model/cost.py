"""What a model costs: parameters, bytes, matrix FLOPs per token. Works on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solidify.model import anatomy, operations


@dataclass(frozen=True)
class Cost:
    """Parameters, bytes on disk, bytes in memory once loaded, and FLOPs of one token's way through all matrices.

    On disk are parameters and saved buffers, each shared tensor once; in memory also the buffers that are computed. A
    matrix of n numbers costs 2n FLOPs per token; of experts counts the share that the router picks. Attention scores
    (which grow with the sequence), embeddings looked up and norms are not counted. A skipped expert slot (a trash can)
    is not known before running, so what is counted is the most.
    """

    parameters: int
    bytes: int
    memory: int
    flops_per_token: int

    def document(self) -> dict[str, int]:
        """Returns the figures as plain values."""
        return asdict(self)


def cost(model: PreTrainedModel) -> Cost:
    """Counts a model's cost."""
    parameters = {id(p): p for p in model.parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    size = sum(p.nbytes for p in parameters.values())
    return Cost(
        anatomy.count(parameters.values()),
        size + sum(buffer.nbytes for name, buffer in buffers.items() if name not in computed),
        size + sum(buffer.nbytes for buffer in buffers.values()),
        sum(flops(model).values()),
    )


def flops(model: PreTrainedModel) -> dict[str, int]:
    """Returns for every module the FLOPs per token of the matrices that it holds itself."""
    return {name: _flops(model, name, module) for name, module in model.named_modules()}


def _flops(model: PreTrainedModel, name: str, module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    number, chosen = experts(operations.enclosing_config(model, name))
    if isinstance(module, (nn.Linear, Conv1D)):
        return int(2 * module.weight.numel() * (chosen / number if _is_expert(model, name, number) else 1))
    total = 0
    for parameter in module.parameters(recurse=False):
        if parameter.ndim == 2:
            total += 2 * parameter.numel()
        elif parameter.ndim == 3:
            total += int(2 * parameter.numel() * (chosen / number if number == parameter.shape[0] else 1))
    return total


def _is_expert(model: PreTrainedModel, name: str, number: int) -> bool:
    """Returns whether a module stands in a list of as many experts as there are, below the list of layers."""
    parts = name.split(".")
    lists = [model.get_submodule(".".join(parts[:place])) for place, part in enumerate(parts) if part.isdigit()]
    return number > 1 and any(isinstance(each, nn.ModuleList) and len(each) == number for each in lists[1:])


def experts(config: PreTrainedConfig) -> tuple[int, int]:
    """Returns the number of experts (0 for a model without any) and how many a token gets."""
    values = config.get_text_config().to_dict()
    number = next((values[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if values.get(k)), 0)
    chosen = next((values[k] for k in ("num_experts_per_tok", "top_k_experts", "moe_topk") if values.get(k)), 1)
    return int(number), int(chosen)
