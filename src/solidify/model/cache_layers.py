"""Gives modules that keep state of their own the layer of the cache that they declare (`layer_type`).

An artifact of such modules carries this file's text behind that of `operations.py`, so it depends on torch and
transformers alone. The layers are transformers' own kinds, with what those lack (5.23): a recurrent layer counts the
positions that it has seen, finds a state that came without a convolution, follows the rows of the batch in every way,
and refuses to have positions taken back from a state that holds their sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
    StaticCache,
    StaticSlidingWindowLayer,
)

STOCK = CacheLayerMixin.__module__


class Stateful:
    """Put before one of transformers' recurrent layers, adds what it lacks."""

    recurrent_states: dict[int, Any]
    conv_states: dict[int, Any]
    has_previous_state: dict[int, bool]
    record_past: bool
    is_initialized: bool  # whether there are keys and values
    cumulative_length: Any = 0

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **options: Any) -> Any:
        """Keeps a state, and remembers that there is one."""
        state = super().update_recurrent_state(recurrent_states, state_idx, **options)  # type: ignore[misc]
        self.has_previous_state[state_idx] = True
        return state

    def get_seq_length(self) -> int:
        """Returns the number of positions: of the keys, or, where there are none, of those that were counted."""
        return int(super().get_seq_length() if self.is_initialized else self.cumulative_length)  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follows the beams."""
        LinearAttentionCacheLayerMixin.reorder_cache(self, beam_idx)
        if self.is_initialized:
            CacheLayerMixin.reorder_cache(self, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows of the batch."""
        self._change_rows("batch_select_indices", lambda state: state[indices.to(state.device)], indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row of the batch."""
        self._change_rows("batch_repeat_interleave", lambda state: state.repeat_interleave(repeats, dim=0), repeats)

    def _change_rows(self, name: str, change: Callable[[torch.Tensor], torch.Tensor], argument: Any) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({key: change(state) for key, state in states.items() if state is not None})
        attention = getattr(super(), name, None)
        if attention is not None and self.is_initialized:
            attention(argument)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes positions back from a convolution, and from keys and values.

        Raises:
            RuntimeError: a recurrent state is kept, which holds the sum of all positions.
        """
        if tokens_to_remove and any(state is not None for state in self.recurrent_states.values()):
            raise RuntimeError(
                "a recurrent state holds the sum of all positions, and none can be taken back: generate without "
                "assistance, or compute the shorter text anew"
            )
        if any(state is not None for state in self.conv_states.values()) and (tokens_to_remove or self.record_past):
            super().crop(tokens_to_remove)  # type: ignore[misc]
        elif (attention := getattr(super(LinearAttentionCacheLayerMixin, self), "crop", None)) is not None:
            attention(tokens_to_remove)

    def offload(self) -> None:
        """Sends keys and values away; a state is small, and is read before the cache brings anything back."""
        CacheLayerMixin.offload(self)

    def prefetch(self) -> None:
        """Brings keys and values back."""
        CacheLayerMixin.prefetch(self)


class Counted(Stateful, LinearAttentionLayer, CacheLayerMixin):  # type: ignore[misc]
    """A recurrent layer that knows how many positions it has seen: masks and positions ask the first layer for it."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1, **options: Any) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def update(self, *args: Any, **options: Any) -> Any:
        """Refuses keys and values."""
        raise NotImplementedError("this layer of the cache keeps states, no keys and values (`hybrid` keeps both)")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and the offset that a mask over all positions has."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes positions back, where only a convolution is kept."""
        super().crop(tokens_to_remove)
        self.cumulative_length -= abs(tokens_to_remove)

    def reset(self) -> None:
        """Forgets all positions."""
        LinearAttentionLayer.reset(self)
        self.cumulative_length = 0


STATEFUL: dict[type, type] = {LinearAttentionLayer: Counted}


def layer_class(kind: Any, static: bool = False) -> Any:
    """Returns the class of cache layers that a kind stands for; those that keep states know how many positions."""
    if isinstance(kind, type):
        return kind
    mapping = {**DYNAMIC_LAYER_TYPE_MAPPING, **(STATIC_LAYER_TYPE_MAPPING if static else {})}
    found: Any = mapping[kind]
    if found.__module__ != STOCK or not issubclass(found, LinearAttentionCacheLayerMixin):
        return found
    if found not in STATEFUL:
        STATEFUL[found] = type(found.__name__, (Stateful, found), {"is_compileable": False})
    return STATEFUL[found]


def layer_type_of(module: nn.Module) -> Any:
    """Returns the kind of cache layer that a module's class declares, by name or as a class of its own, or None.

    transformers' own classes declare none.
    """
    kind = getattr(type(module), "layer_type", None)
    return kind if isinstance(kind, (str, type)) and not type(module).__module__.startswith("transformers.") else None


def settle(model: PreTrainedModel) -> None:
    """Has every module that declares a kind of cache layer find one of this kind, in whatever cache it is given.

    Of modules that stand in one another the outer one declares for all.
    """
    stateful: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if layer_type_of(module) is not None and not any(name.startswith(f"{outer}.") for outer in stateful):
            stateful[name] = module
    for module in stateful.values():  # one that came from an artifact has the artifact's own hook
        names = {getattr(hook, "__name__", "") for hook in module._forward_pre_hooks.values()}
        if give_layer.__name__ not in names:
            module.register_forward_pre_hook(give_layer, with_kwargs=True)
            module.register_forward_hook(count_positions, with_kwargs=True)
    if stateful:
        vars(model)["create_masks_for_generate"] = leave_mask


def leave_mask(attention_mask: Any = None, **_: Any) -> Any:
    """Leaves making masks to the model's own forward, which knows which of its layers need which."""
    return attention_mask


def find_cache(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Returns the cache among a call's arguments, that of the decoder's own positions."""
    found = next((value for value in (*args, *options.values()) if isinstance(value, Cache)), None)
    return found.self_attention_cache if isinstance(found, EncoderDecoderCache) else found


def give_layer(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Puts a layer of the declared kind into a cache that has none at this place, before the first use of it."""
    cache = find_cache(args, options)
    if cache is None:
        return
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= module.layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[module.layer_idx]
    kind = type(module).layer_type
    if kind == "hybrid" and getattr(old, "is_sliding", False):  # keys are kept as the masks of this layer expect them
        kind = "hybrid_sliding"
    wanted = layer_class(kind, isinstance(cache, StaticCache))
    if isinstance(old, wanted):
        return
    if kind == "hybrid" and isinstance(cache, StaticCache) and any(cache.is_sliding):
        raise ValueError(
            "a static cache takes a hybrid layer for a recurrent one, and makes the masks of full attention by a "
            "sliding layer (transformers 5.23): use a dynamic cache"
        )
    if is_used(old):
        raise ValueError(
            f"layer {module.layer_idx} of the cache is a {type(old).__name__} that something else filled; "
            f"{type(module).__name__} keeps a {kind!r} layer: start with an empty cache"
        )
    cache.layers[module.layer_idx] = make_layer(wanted, module, old, cache.layers)


def make_layer(wanted: Any, module: Any, old: Any, layers: list[Any]) -> Any:
    """Builds an empty layer; what it needs is said by the module, or else by the layer in whose place it comes."""
    options = {"number_of_states": getattr(module, "number_of_conv_states", 1)}
    for key in ("sliding_window", "max_cache_len"):
        found = (getattr(source, key, None) for source in (module, old, *layers))
        value = next((value for value in found if value is not None), None)
        options |= {key: value} if value is not None else {}
    if isinstance(old, StaticSlidingWindowLayer):  # which is as long as its window, and has no other name for it
        options["sliding_window"] = old.max_cache_len
    new = wanted(**options)
    if any(getattr(layer, "record_past", False) for layer in layers) and hasattr(new, "activate_past_recording"):
        new.activate_past_recording()
    return new


def is_used(layer: Any) -> bool:
    """Returns whether a layer of a cache holds anything."""
    states = getattr(layer, "has_previous_state", None)
    if isinstance(states, dict) and any(states.values()):
        return True
    return isinstance(layer, CacheLayerMixin) and bool(layer.is_initialized) and int(layer.get_seq_length()) > 0


def count_positions(module: Any, args: tuple[Any, ...], options: dict[str, Any], _output: Any) -> None:
    """Counts the positions of a call, for a layer that cannot tell from what it keeps."""
    cache = find_cache(args, options)
    layer = cache.layers[module.layer_idx] if cache is not None else None
    if isinstance(layer, Stateful) and not layer.is_initialized:
        given: Any = options["hidden_states"] if "hidden_states" in options else args[0]
        layer.cumulative_length += given.shape[1]
