"""Which tensors of a model have a row for each token: those that grow with the number of tokens in its configuration.

Learned from the family's own constructor, which is run twice on the meta device; no family is known by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.errors import SurgeryError
from solidify.model import anatomy, operations
from solidify.system import foreign


@dataclass(frozen=True)
class Rows:
    """Which tensors have a row per token (by module name and key: the axis), and what else says how many there are.

    `settings` are entries of the configuration, `attributes` numbers of modules, both by their dotted names.
    """

    rows: int
    tensors: dict[str, dict[str, int]]
    settings: dict[str, int]
    attributes: list[str]


def find(model: PreTrainedModel) -> Rows:
    """Finds what grows with the vocabulary, by building the family's class twice on the meta device.

    Raises:
        SurgeryError: it has no embeddings of tokens, does not build them by its configuration, or they were replaced.
    """
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"surgery is done on a transformers model, and not on {type(model).__name__}")
    table: Any = foreign.attempt(model.get_input_embeddings).value
    kind = type(model).__name__
    if not isinstance(table, nn.Embedding):
        found = "no input embeddings" if table is None else f"a {type(table).__name__} in the place of its embeddings"
        raise SurgeryError(f"tokens cannot be added to this model: {kind} has {found}, so there are no rows of tokens")
    name = next(n for n, m in model.named_modules(remove_duplicate=False) if m is table)
    rows = table.num_embeddings
    faults: list[str] = []
    for wide in (False, True):
        settings = _find_settings(model, name, rows, wide)
        small, large = (_build_shapes(model, dict.fromkeys(settings, rows + more)) for more in (0, 1))
        if small is None or large is None:
            faults = [f"{kind} cannot be built from its configuration with another number of tokens"]
            continue
        plan = _compare(rows, settings, small, large)
        faults = _find_faults(model, plan, name)
        if not faults:
            return plan
    raise SurgeryError(f"tokens cannot be added to this model: {'; '.join(faults)}")


def _find_settings(model: PreTrainedModel, name: str, rows: int, wide: bool) -> dict[str, int]:
    """Returns the entries of the configuration that count tokens: around the embeddings, or, if `wide`, everywhere."""
    around = anatomy.path_in_config(model.config, operations.enclosing_config(model, name)) or ""
    text = anatomy.path_in_config(model.config, model.config.get_text_config(decoder=True)) or ""
    found = {}
    for path, config in _walk_configs(model.config, ""):
        if not wide and not around.startswith(path) and path != text:
            continue
        own = {config.attribute_map.get("vocab_size", "vocab_size")}
        for key, value in vars(config).items():
            named = type(value) is int and not key.startswith("_") and ("vocab" in key or key in own)
            beside = key.startswith("vocab_size_")  # a second table of the same ids (Gemma 3n: per layer)
            if named and (value == rows or beside):
                found[path + key] = value
    return found


def _walk_configs(config: Any, path: str) -> list[tuple[str, Any]]:
    found = [(path, config)]
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            found += _walk_configs(part, f"{path}{key}.")
    return found


_Shapes = tuple[dict[str, tuple[int, ...]], dict[str, int]]


def _build_shapes(model: PreTrainedModel, settings: Mapping[str, int]) -> _Shapes | None:
    """Returns shapes of tensors and numbers of modules, as the family builds them from a changed configuration."""
    config = deepcopy(model.config)
    operations.assign(config, dict(settings))
    kind: Any = next(cls for cls in type(model).__mro__ if not hasattr(cls, "changed"))

    def build() -> nn.Module:
        """Builds the model without memory."""
        with torch.device("meta"):
            built: nn.Module = kind(config)
            return built

    built = foreign.attempt(build).value
    if built is None:
        return None
    held = (*built.named_parameters(remove_duplicate=False), *built.named_buffers(remove_duplicate=False))
    numbers = {
        f"{name}.{key}".lstrip("."): value
        for name, module in built.named_modules(remove_duplicate=False)
        for key, value in vars(module).items()
        if type(value) is int
    }
    return {name: tuple(tensor.shape) for name, tensor in held}, numbers


def _compare(rows: int, settings: dict[str, int], small: _Shapes, large: _Shapes) -> Rows:
    """Returns what one more token changes."""
    tensors: dict[str, dict[str, int]] = {}
    for name, shape in small[0].items():
        other = large[0].get(name, shape)
        if other != shape:
            owner, _, key = name.rpartition(".")
            axes = [axis for axis, (a, b) in enumerate(zip(shape, other, strict=True)) if b == a + 1]
            tensors.setdefault(owner, {})[key] = axes[0] if len(axes) == 1 and shape[axes[0]] == rows else -1
    attributes = [name for name, value in small[1].items() if large[1].get(name) == value + 1 and value == rows]
    return Rows(rows, tensors, settings, attributes)


def _find_faults(model: PreTrainedModel, plan: Rows, embeddings: str) -> list[str]:
    """Says where the model at hand is not what its family builds."""
    modules = dict(model.named_modules(remove_duplicate=False))
    faults = []
    for owner, keys in plan.tensors.items():
        for key, axis in keys.items():
            name = f"{owner}.{key}".lstrip(".")
            held = getattr(modules.get(owner), key, None)
            if axis < 0:
                faults.append(f"{name} grows with the vocabulary otherwise than by a row per token")
            elif held is None or held.shape[axis] not in {plan.rows, *plan.settings.values()}:
                faults.append(
                    f"an earlier step has replaced {owner or name}, which has rows of tokens: add tokens before it"
                )
    if embeddings not in plan.tensors:
        faults.append(f"{embeddings} does not grow with the number of tokens in the configuration")
    head = foreign.attempt(model.get_output_embeddings).value
    above = next((name for name, module in modules.items() if module is head and head is not None), None)
    if above is not None and above not in plan.tensors:
        faults.append(f"its head {above} has rows of another vocabulary than {embeddings}")
    return faults
