"""Attention over a window with sinks: a token sees the last `window` tokens and the first `sinks` of its text.

    of the n keys that the original lets a query see, in their order: those of rank r are seen where
    r <= sinks  or  r > n - window                        (the query's own key has rank n)

The first tokens hold the attention that has nothing better to do; without them a window breaks a trained model
(StreamingLLM, arXiv 2309.17453; with fine-tuning and full layers in between: SWAA, arXiv 2512.10411). Positions stay
what they are in the text. Because ranks are counted among keys that are seen, sinks begin after padding on the left,
and at the beginning of each of several packed texts.

With a window of at least the text's length the module is the original, bit for bit: the mask is then passed on as it
was given. The cache keeps all keys, so that every way to use it stays exact; to let it forget is another step. The
original's own forward runs, with a narrower mask; all of its modules keep their names.

This file needs torch only and is copied into artifacts as it stands.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

IMPLEMENTATIONS = (None, "eager", "sdpa")  # those that take a mask of (batch_size, 1, queries, keys)


class WindowAttention(nn.Module):
    """Takes over a causal attention with all its modules and lets each token see fewer others; it adds no parameter.

    An attention that slides already forgets its first tokens: it gets the narrower of both windows, and no sinks. One
    that is not causal is refused, and so are implementations without a mask of queries and keys (flash, flex).

    While `bypass` is True the module computes what the original computed, bit for bit.
    """

    def __init__(self, original: nn.Module, window: int, sinks: int = 4) -> None:
        super().__init__()
        if window < 1 or sinks < 0:
            raise ValueError(f"window must be at least 1 and sinks at least 0, but they are {window} and {sinks}")
        causal = getattr(getattr(original, "config", None), "is_causal", getattr(original, "is_causal", None))
        if causal is not True or not hasattr(original, "layer_idx"):
            raise ValueError(
                f"WindowAttention needs a causal attention (is_causal is True) that knows its layer_idx, but "
                f"{type(original).__name__} has is_causal={causal} and layer_idx={getattr(original, 'layer_idx', None)}"
            )
        take_over(self, original)
        self.windowed_kind = type(original)
        self.windowed_inner = Inner(original)
        self.windowed_last = window
        self.windowed_first = 0 if slides(original) else sinks
        self.bypass = False

    @property
    def exact_up_to(self) -> int:
        """The number of positions up to which this is the original."""
        return self.windowed_last + self.windowed_first

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        """Maps (batch_size, sequence_length, hidden_size) to what the original returns."""
        view = as_original(self, self.windowed_kind, self.windowed_inner)
        if not self.bypass:
            if kwargs.get("is_causal") is False:
                raise ValueError("WindowAttention looks back only, but the model is called with is_causal=False")
            cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
            kwargs["attention_mask"] = self.narrow(kwargs.get("attention_mask"), hidden_states, cache)
        return self.windowed_kind.forward(view, hidden_states, **kwargs)

    def narrow(self, mask: torch.Tensor | None, hidden_states: torch.Tensor, cache: Any) -> torch.Tensor | None:
        """Returns the mask (batch_size, 1, queries, keys) within the window, in its dtype: True, or 0, is seen.

        No mask means that a query sees all keys until its own; it stays so where the window holds them all.
        """
        found = getattr(getattr(self, "config", None), "_attn_implementation", None)
        if found not in IMPLEMENTATIONS or (mask is not None and (not torch.is_tensor(mask) or mask.ndim != 4)):
            raise ValueError(
                f"WindowAttention needs a mask of queries and keys, which attention by {found} does not take; load the "
                "model with attn_implementation='sdpa' or 'eager'"
            )
        keys = mask.shape[-1] if mask is not None else self.count_keys(hidden_states.shape[1], cache)[0]
        if keys <= self.windowed_last + self.windowed_first:
            return mask
        if mask is None:
            mask = self.causal_mask(hidden_states, cache)
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        rank = seen.cumsum(-1)
        kept = seen & ((rank <= self.windowed_first) | (rank > rank[..., -1:] - self.windowed_last))
        return kept if mask.dtype == torch.bool else mask.masked_fill(seen & ~kept, torch.finfo(mask.dtype).min)

    def causal_mask(self, hidden_states: torch.Tensor, cache: Any) -> torch.Tensor:
        """Returns the mask of all keys until the query's own, (1, 1, queries, keys)."""
        length, device = hidden_states.shape[1], hidden_states.device
        keys, first_key, first_query = self.count_keys(length, cache)
        query = torch.arange(length, device=device)[:, None] + first_query
        until_its_own: torch.Tensor = torch.arange(keys, device=device)[None, :] + first_key <= query
        return until_its_own[None, None]

    def count_keys(self, length: int, cache: Any) -> tuple[int, int, Any]:
        """Returns how many keys there will be, and the positions of the first key and of the first query."""
        if cache is None:
            return length, 0, 0
        keys, first_key = cache.get_mask_sizes(length, self.layer_idx)
        return keys, first_key, cache.get_seq_length(self.layer_idx)


def slides(original: nn.Module) -> bool:
    """Returns whether an attention has a window of its own: by its layer's type where there are several, else by its
    configuration."""
    config = getattr(original, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return bool(kinds[original.layer_idx] != "full_attention")
    return getattr(config, "sliding_window", None) is not None


class Inner(nn.Module):
    """Holds the `bypass` of the module that was taken over, if it has one, beside that of the new one."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.bypass = bool(getattr(original, "bypass", False))


def take_over(module: nn.Module, original: nn.Module, without: Collection[str] = ()) -> None:
    """Gives a module what the original has, `without` some modules: under their own names, and its plain attributes."""
    saved = original.state_dict(keep_vars=True)
    for name, value in vars(original).items():
        if name not in (*vars(nn.Module()), "forward", "bypass"):  # torch's tables, a dispatcher's wrap, and `Inner`'s
            setattr(module, name, value)
    for name, child in original.named_children():
        if name not in without:
            module.add_module(name, child)
    for name, parameter in original.named_parameters(recurse=False):
        module.register_parameter(name, parameter)
    for name, buffer in original.named_buffers(recurse=False):
        module.register_buffer(name, buffer, persistent=name in saved)


def as_original(module: nn.Module, kind: type[nn.Module], inner: nn.Module) -> nn.Module:
    """Returns the module seen as one of the original's class: a shallow copy, whose attributes may be set for one call.

    It is made for every call, because adapters replace modules by name after this one was built.
    """
    view = object.__new__(kind)
    vars(view).update(vars(module))
    vars(view)["bypass"] = vars(inner)["bypass"]
    return view
