"""What a model costs: parameters, bytes, matrix FLOPs per token. Works on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from solidify.behaviour import calling
from solidify.model import operations, quantized

# How modules call the number of experts that a token is sent to.
_TOP_K = ("top_k", "topk", "k", "num_experts_per_tok", "moe_top_k", "num_selected_experts", "top_k_experts")


@dataclass(frozen=True)
class Cost:
    """Parameters, bytes on disk, bytes in memory once loaded, and FLOPs of one token's way through all matrices.

    On disk are parameters and saved buffers, each shared tensor once; in memory also the buffers that are computed. A
    matrix of n numbers costs 2n FLOPs per token; of experts counts the share that the router picks, as the module that
    holds them says (`top_k` or a name like it, of its own or of its router), or else the configuration. Attention
    scores (which grow with the sequence), embeddings looked up and norms are not counted. A skipped expert slot (a
    trash can) is not known before running, so what is counted is the most.

    `uncertain` names stacks of matrices in modules of the user's of which nothing says how many a token uses: all are
    counted, and `flops_per_token` is then the most that it can be. `unit` is what goes that way in place of a token
    where the model reads none: a `patch` or `position` of an image, a `frame` of sound.
    """

    parameters: int
    bytes: int
    memory: int
    flops_per_token: int
    uncertain: tuple[str, ...] = ()
    unit: str = "token"

    def document(self) -> dict[str, Any]:
        """Returns the figures as plain values."""
        return {**asdict(self), "uncertain": list(self.uncertain)}


def cost(model: PreTrainedModel) -> Cost:
    """Counts a model's cost."""
    parameters = {id(p): p for p in model.parameters()}
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    size = sum(p.nbytes for p in parameters.values()) + quantized.difference(model)
    return Cost(
        sum(map(quantized.numel, parameters.values())),
        size + sum(buffer.nbytes for name, buffer in buffers.items() if name not in computed),
        size + sum(buffer.nbytes for buffer in buffers.values()),
        sum(flops(model).values()),
        tuple(dict.fromkeys(name for name, stack in _find_stacks(model).items() if stack.picked is None)),
        _name_unit(model),
    )


def _name_unit(model: PreTrainedModel) -> str:
    """Names what a model reads one of after the other, by its main input."""
    if calling.takes(model) & {"input_ids", "decoder_input_ids"}:
        return "token"
    if model.main_input_name == "pixel_values":
        return "patch" if getattr(model.config, "patch_size", None) is not None else "position"
    return "frame" if model.main_input_name in ("input_values", "input_features") else "token"


def flops(model: PreTrainedModel) -> dict[str, int]:
    """Returns for every module the FLOPs per token of the matrices that it holds itself."""
    stacks = _find_stacks(model)
    return {name: _count_flops(stacks, name, module) for name, module in model.named_modules()}


@dataclass(frozen=True)
class _Stack:
    """Matrices of one shape side by side, of which a token uses `picked` of `size`; None where nothing says so."""

    size: int
    picked: int | None

    def share(self) -> float:
        """Returns the share that is counted."""
        return (self.picked if self.picked is not None else self.size) / self.size


def _count_flops(stacks: Mapping[str, _Stack], name: str, module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return 0
    above = [stacks[outer] for outer in _list_outer(name) if outer in stacks]  # a list of experts that it stands in
    share = min((stack.share() for stack in above), default=1.0)
    if isinstance(module, (nn.Linear, Conv1D)):
        return int(2 * quantized.numel(module.weight) * share)
    total = 0
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 2:
            total += int(2 * parameter.numel() * share)
        elif parameter.ndim == 3:
            own = stacks.get(f"{name}.{key}".lstrip("."))
            total += int(2 * parameter.numel() * (own.share() if own is not None else share))
    return total


def _list_outer(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _find_stacks(model: PreTrainedModel) -> dict[str, _Stack]:
    """Finds what may be experts: lists of equal modules within a layer, and parameters with three dimensions."""
    found: dict[str, _Stack] = {}
    for name, module in model.named_modules():
        sizes = {name: len(module)} if isinstance(module, nn.ModuleList) and _side_by_side(name, module) else {}
        sizes |= {
            f"{name}.{key}".lstrip("."): parameter.shape[0]
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }
        for stack_name, size in sizes.items():
            holder = name if stack_name != name else name.rpartition(".")[0]
            if (stack := _judge_stack(model, holder, size)) is not None:
                found[stack_name] = stack
    return found


def _side_by_side(name: str, modules: nn.ModuleList) -> bool:
    kinds = {(type(m), tuple((k, p.shape) for k, p in m.named_parameters())) for m in modules}
    return len(modules) > 1 and len(kinds) == 1 and any(part.isdigit() for part in name.split("."))


def _judge_stack(model: PreTrainedModel, holder: str, size: int) -> _Stack | None:
    """Judges a stack by what holds it; None for one that is no stack of experts, as far as anybody says."""
    number, chosen = experts(operations.enclosing_config(model, f"{holder}.experts"))
    near = [model.get_submodule(name) for name in (holder, holder.rpartition(".")[0])]
    said = size == number or any(size == value for each in near for key, value in vars(each).items() if "expert" in key)
    if said and not any(map(_is_users, near)):  # a family's own block, whatever stands around it
        return _Stack(size, chosen)
    users = False
    for outer in [holder, *reversed(_list_outer(holder))]:
        if outer.rpartition(".")[2].isdigit() and outer != holder:
            break  # the layer: what stands around it is about all layers
        module = model.get_submodule(outer)
        own = _is_users(module)
        users = users or own
        for each in (module, *module.children()) if own else ():
            for key in _TOP_K:
                value = vars(each).get(key)
                if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= size:
                    return _Stack(size, value)
    if size == number:
        return _Stack(size, chosen)
    return _Stack(size, None) if users else None


def _is_users(module: nn.Module) -> bool:
    return not type(module).__module__.startswith(("torch.", "transformers.models.", "transformers.integrations."))


def experts(config: PreTrainedConfig) -> tuple[int, int]:
    """Returns the number of experts (0 for a model without any) and how many a token gets."""
    values = config.get_text_config().to_dict()
    number = next((values[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if values.get(k)), 0)
    chosen = next((values[k] for k in ("num_experts_per_tok", "top_k_experts", "moe_topk") if values.get(k)), 1)
    return int(number), int(chosen)
