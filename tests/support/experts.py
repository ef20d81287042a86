"""MoE blocks of tiny families, routers among many experts, and models in which some experts cannot be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import families
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from solidify.surgery import expert_parts

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def blocks(model: PreTrainedModel) -> list[str]:
    """The innermost modules that hold both experts and their router."""
    found = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and not inside and any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList):
            children = [child for child in module.children() if any(p.ndim == 3 for p in child.parameters(False))]
            if children and expert_parts.plan_block(model, name, [])["size"]:
                found.append(name)
    return found


def tiny(
    family: str,
    experts: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A tiny model of a family, with so many experts, that computes its experts one after the other.

    `changes` are fields of its configuration that have other values, where it has them.
    """
    config = families.tiny_config(family)
    for key, value in (changes or {}).items():
        if hasattr(config, key):
            setattr(config, key, value)
    for key, value in list(vars(config).items()):
        if experts is not None and value == 4 and key.endswith(COUNTS):
            setattr(config, key, experts)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model: PreTrainedModel = families.head_of(config)(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    families.give_opinions(model)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped products are there in other precisions alone
    return model


def fill_tables(model: PreTrainedModel, count: int) -> None:
    """Has every table by which a router looks up experts name some at random, others in each place of a row."""
    generator = torch.Generator().manual_seed(2)
    for buffer in model.buffers():
        if not buffer.is_floating_point() and buffer.ndim == 2 and not bool(buffer.any()):
            buffer.copy_(torch.rand(len(buffer), count, generator=generator).topk(buffer.shape[1]).indices)


def tokens(rows: int = 3, length: int = 13, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits)


class Masking(TorchFunctionMode):
    """While it is entered, the routers with these weights give some experts the logit -inf."""

    def __init__(self, weights: Iterable[torch.Tensor], gone: Sequence[int]):
        super().__init__()
        self.weights, self.gone, self.masked = {weight.data_ptr() for weight in weights}, list(gone), 0

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and args[1].data_ptr() in self.weights:
            self.masked += 1
            output = output.clone()
            output[..., self.gone] = -torch.inf
        return output


def masked_logits(model: PreTrainedModel, names: Sequence[str], gone: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    """What a model computes when no router can choose some experts; what corrects their scores is -inf too."""
    weights = []
    for name in names:
        block, plan = model.get_submodule(name), expert_parts.plan_block(model, name, [])
        own = expert_parts.expert_tensors(block, plan)
        for path, dim in plan["tensors"].items():
            tensor = expert_parts.get_path(block, path)
            if path in own:
                continue
            if tensor.numel() > tensor.shape[dim]:
                weights.append(tensor)
            elif "correction" in path or not isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    tensor.index_fill_(dim, torch.tensor(gone), -torch.inf)
    with Masking(weights, gone) as mode:
        found = logits(model, ids)
    assert mode.masked == len(names)
    return found
