"""What surgery does for modules that keep state in the cache (`layer_type`): it looks at the kind and says it.

The configuration names the kind of every layer of the cache (`layer_types`), so that a cache made from it is right from
the start. Where the family reads that list for its masks or modules too, it is left as it is: the layers are then put
in at the first call (`model/cache_layers.py`), which needs no configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import CacheLayerMixin, PreTrainedModel

from solidify.model import anatomy, cache_layers, operations
from solidify.upstream.transformers import (
    ALLOWED_ATTN_LAYER_TYPES,
    LinearAttentionCacheLayerMixin,
    cache_layer_classes,
    cache_layer_kinds,
)

# transformers (5.23) asks an attention layer how long the text is, also of a cache that is empty and has none.
_WITHOUT_LENGTH = ("linear_attention", "conv", "moe")
_WITHOUT_WINDOW = {"hybrid_sliding": "hybrid", "sliding_attention": "full_attention"}


def kind_of(module: Any) -> Any:
    """Returns the kind of cache layer that a class declares: a name that transformers knows, or a class, or None."""
    kind = getattr(module, "layer_type", None)
    return kind if isinstance(kind, (str, type)) else None


def class_of(kind: Any) -> Any:
    """Returns the class of cache layers that a kind stands for in transformers, or None."""
    return kind if isinstance(kind, type) else cache_layer_classes().get(kind)


def faults(module: type[nn.Module]) -> list[str]:
    """Says why a class cannot have the kind of cache layer that it declares."""
    kind = kind_of(module)
    if kind is None or issubclass(class_of(kind) or int, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        return []
    return [
        f"its layer_type {kind!r} is no kind of cache layer; it is a class of your own that extends one of "
        f"transformers.cache_utils, or one of these names: {', '.join(cache_layer_classes())}"
    ]


def unnumbered(built: Mapping[str, nn.Module]) -> list[str]:
    """Says which new modules would not find their layer of the cache."""
    return [
        f"{name}: {type(new).__name__} declares layer_type {kind!r}, but has no attribute layer_idx, the number of "
        "its layer of the cache; take it in the constructor and keep it"
        for name, new in built.items()
        if (kind := cache_layers.layer_type_of(new)) is not None
        and not isinstance(getattr(new, "layer_idx", None), int)
    ]


def lost(module: Any) -> dict[str, bool]:
    """Returns what follows from the kind: from a recurrent state no position can be taken back."""
    kind = kind_of(module)
    found = class_of(kind)
    stock = found is not None and found.__module__ == CacheLayerMixin.__module__
    recurrent = stock and issubclass(found, LinearAttentionCacheLayerMixin) and kind != "conv"
    return {"crop": False} if recurrent else {}


def settings(model: PreTrainedModel, names: Sequence[str], module: Any) -> dict[str, Any]:
    """Returns what the records say of the kind: `layer_type`, and the configuration's entries before and after."""
    kind = kind_of(module)
    if kind is None:
        return {}
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    for name in names:
        config, index = operations.enclosing_config(model, name), operations.layer_index(model, name)
        path = anatomy.path_in_config(model.config, config)
        if path is None or index is None or _is_read_by_family(config):
            continue
        key = f"{path}layer_types"
        if key not in after:
            before[key] = getattr(config, "layer_types", None)
            after[key] = cache_layer_kinds(config)
        if index < len(after[key]):
            slides = kind == "hybrid" and after[key][index] == "sliding_attention"
            after[key][index] = "hybrid_sliding" if slides else _find_stock(kind, config)
    for kinds in after.values():
        if all(name in _WITHOUT_LENGTH for name in kinds):
            kinds[0] = "hybrid"
    named = kind.__name__ if isinstance(kind, type) else kind
    return {"layer_type": named, **({"before": before, "after": after} if after else {})}


def _is_read_by_family(config: Any) -> bool:
    """Returns whether the list means more to a family than the cache; where it has none, nobody else reads it."""
    known = hasattr(type(config), "layer_types") or "layer_types" in type(config).attribute_map
    return known or bool(config.is_encoder_decoder)


def _find_stock(kind: Any, config: Any) -> str:
    """Returns the kind that a configuration may name: for a layer of the user's own, that of what it extends."""
    names = {cls: name for name, cls in reversed(cache_layer_classes().items())}
    lineage = class_of(kind).__mro__
    found = [*([kind] if isinstance(kind, str) else []), *(names[cls] for cls in lineage if cls in names)]
    stock = next((name for name in found if name in ALLOWED_ATTN_LAYER_TYPES), "full_attention")
    if getattr(config, "sliding_window", None) is None:
        return _WITHOUT_WINDOW.get(stock, stock)
    return stock
