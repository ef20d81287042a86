"""What a model was before surgery: the class and configuration to start from, and the changes made until now.

A model loaded from an artifact is traced back to the base of that artifact, so that a second surgery adds to the first
instead of wrapping it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from solidify.model.operations import assign
from solidify.surgery.edit_record import Edit

MIXIN = "Solid"  # the class that all generated models have in common


@dataclass(frozen=True)
class Ancestor:
    """`head` is the model's class before any surgery, `config` a copy of its configuration as it was then.

    `earlier` are the entries of `config.surgery` that an artifact came with, `classes` the modules that they name.
    """

    head: type[PreTrainedModel]
    config: PreTrainedConfig
    earlier: list[dict[str, Any]]
    classes: dict[str, type[nn.Module]]


def is_solid(model: PreTrainedModel) -> bool:
    """Returns whether the model was loaded from an artifact."""
    return any(cls.__name__ == MIXIN and cls.__module__ == type(model).__module__ for cls in type(model).__mro__)


def trace(model: PreTrainedModel, edits: Sequence[Edit] = ()) -> Ancestor:
    """Returns what the model was before `edits` and before all surgery of the artifact that it may come from."""
    config = deepcopy(model.config)
    for edit in reversed(edits):
        assign(config, edit.settings.get("before", {}))
    if not is_solid(model):
        return Ancestor(type(model), config, [], {})
    lineage = type(model).__mro__
    head = lineage[next(i for i, cls in enumerate(lineage) if cls.__name__ == MIXIN) + 1]
    earlier = deepcopy(list(model.config.surgery))
    for entry in reversed(earlier):
        assign(config, entry.get("before", {}))
    config.__class__ = type(config).__mro__[1]
    leading = vars(config).get("auto_map") or {}
    for key in ("surgery", "auto_map", "model_type"):
        vars(config).pop(key, None)
    if not any(cls.__module__.startswith("transformers.models.") for cls in head.__mro__):
        # Nothing of transformers says by which Auto class it is loaded: only what was written does.
        config.auto_map = {auto: reference.replace(f".{MIXIN}", ".") for auto, reference in leading.items()}
    classes = vars(sys.modules[type(model).__module__])["CLASSES"]
    keys = [key for e in earlier for key in ([e["class"]] if "class" in e else []) + e.get("classes", [])]
    return Ancestor(head, config, earlier, {key: classes[key] for key in keys})
