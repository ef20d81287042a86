"""What a declared mask is: its meaning position by position, and the code by which an attention obeys it.

Artifacts carry `set_masks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

_MOST = {"block": 8, "window": 6, "sinks": 2}  # of the numbers with which a mask is tried; larger ones are as these


def find_masks(module: nn.Module) -> list[dict[str, Any]]:
    """Returns the masks that hooks give an attention: one, or none."""
    return [hook.solid_mask for hook in module._forward_pre_hooks.values() if hasattr(hook, "solid_mask")]


def describe(asked: Mapping[str, Any]) -> str:
    """Writes a mask with its numbers in one line."""
    numbers = [f"{key} {asked[key]}" for key in ("block", "window", "sinks") if asked[key] is not None]
    return f"{asked['kind']}{f' ({chr(44).join(numbers)})' if numbers else ''}".replace(",", ", ")


def reduced(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the mask with numbers small enough to be tried."""
    return {**asked, **{key: min(asked[key], most) for key, most in _MOST.items() if asked[key] is not None}}


def slides(module: nn.Module) -> bool:
    """Returns whether an attention has a window of its own: by its layer's type where there are several."""
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds and index is not None:
        return bool(kinds[index] != "full_attention")
    return getattr(config, "sliding_window", None) is not None


def allowed(asked: Mapping[str, Any], real: torch.Tensor, *, sinks: bool) -> torch.Tensor:
    """Says, by position and position, which sees which, of the `real` ones: what the mask means, in words of its own.

    The first axis is who sees. Without `sinks`, a window has none.
    """
    import torch

    length = len(real)
    start = int(real.to(torch.int64).argmax())
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(start, length):
        for j in range(start, length):
            if asked["kind"] == "bidirectional":
                seen[i, j] = True
            elif asked["kind"] == "causal":
                seen[i, j] = j <= i
            elif asked["kind"] == "block_causal":
                seen[i, j] = (j - start) // asked["block"] <= (i - start) // asked["block"]
            else:
                first = asked["sinks"] if sinks else 0
                seen[i, j] = j <= i and (i - j < asked["window"] or j - start < first)
    return seen & real[:, None] & real[None, :]


def set_masks(model: Any, names: list[str], edit: dict[str, Any], classes: dict[str, Any]) -> None:
    """Has each attention called with another mask, by a hook; one that an earlier change put there goes."""
    import inspect

    import torch

    kind, block, window = edit["kind"], edit["block"], edit["window"]

    def count_up(module: Any, length: int, kwargs: dict[str, Any], ahead: bool) -> Any:
        """Makes the mask of a call to which the family gives none."""
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        first = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        keys, first_key = (length, 0) if cache is None else cache.get_mask_sizes(length, module.layer_idx)
        query = torch.arange(length, device=next(module.parameters()).device)[:, None] + first
        return ((torch.arange(keys, device=query.device)[None, :] + first_key <= query) | ahead)[None, None]

    def look_around(seen: Any) -> Any:
        """Lets what sees be seen; blocks are counted from where a text begins."""
        if seen.shape[-1] != seen.shape[-2]:
            raise ValueError(f"the mask {kind} looks ahead, so the whole text is given at once, without a cache")
        both = (seen | seen.transpose(-1, -2)) & seen.diagonal(dim1=-2, dim2=-1)[..., None, :]
        if kind == "bidirectional":
            return both
        place = torch.arange(seen.shape[-1], device=seen.device)
        begins = seen.diagonal(dim1=-2, dim2=-1) & ~seen.tril(-1).any(-1)  # a text: it sees nothing before itself
        order = (place - torch.where(begins, place, 0).cummax(-1).values) // block
        return both & (order[..., None, :] <= order[..., :, None])

    def look_back(seen: Any, sinks: int, ahead: bool) -> Any:
        """Keeps the last positions and the first."""
        seen = seen.tril() if ahead and seen.shape[-1] == seen.shape[-2] else seen
        rank = seen.cumsum(-1)
        return seen if kind == "causal" else seen & ((rank <= sinks) | (rank > rank[..., -1:] - window))

    def change(module: Any, given: Any, length: int, kwargs: dict[str, Any], sinks: int) -> Any:
        """Changes the mask that an attention is given."""
        found, asked = getattr(getattr(module, "config", None), "_attn_implementation", None), kwargs.get("is_causal")
        if found not in (None, "eager", "sdpa") or (given is not None and getattr(given, "ndim", 0) != 4):
            raise ValueError(f"the mask {kind} needs attention by 'sdpa' or 'eager' (attn_implementation), not {found}")
        ahead = (getattr(module, "is_causal", True) if asked is None else asked) is False
        was = count_up(module, length, kwargs, ahead) if given is None else given
        low = None if was.dtype == torch.bool else torch.finfo(was.dtype).min
        was = was if low is None else was > low / 2
        if not ahead and (kind == "causal" or (kind == "window" and was.shape[-1] <= window + sinks)):
            return given
        seen = look_back(was, sinks, ahead) if kind in ("causal", "window") else look_around(was)
        if given is None and found != "sdpa":  # eager attention adds its mask to the scores: zeros and the lowest
            dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        return seen if low is None else torch.where(seen, given.masked_fill(~was, 0), low)

    for module in map(model.get_submodule, names):
        for key in [key for key, old in module._forward_pre_hooks.items() if hasattr(old, "solid_mask")]:
            del module._forward_pre_hooks[key]
        config, parameters = getattr(module, "config", None), [*inspect.signature(module.forward).parameters]
        types = getattr(config, "layer_types", None) if hasattr(module, "layer_idx") else None
        slides = types[module.layer_idx] != "full_attention" if types else getattr(config, "sliding_window", None)
        place = parameters.index("attention_mask") if "attention_mask" in parameters else 99
        first = 0 if slides else edit["sinks"] or 0

        def hook(module: Any, args: Any, kwargs: dict[str, Any], place: int = place, sinks: int = first) -> Any:
            """Hands the attention the other mask."""
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            given = args[place] if len(args) > place else kwargs.get("attention_mask")
            mask = change(module, given, states.shape[1], kwargs, sinks)
            if len(args) > place:
                return (*args[:place], mask, *args[place + 1 :]), kwargs
            return args, {**kwargs, "attention_mask": mask}

        if edit["hooked"]:
            vars(hook)["solid_mask"] = {key: edit[key] for key in ("kind", "block", "window", "sinks")}
            module.register_forward_pre_hook(hook, with_kwargs=True)
