"""An adapter merged by PEFT itself, in memory: what the merge on disk is compared with."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from solidify.adapter.buffers import NAME as BUFFERS
from solidify.adapter.parameters import NAME as PARAMETERS
from solidify.errors import AdapterError, refuse
from solidify.upstream.torch import own_modules


def merge_in_memory(model: PeftModel) -> PreTrainedModel:
    """Folds the active adapter into its base, in place, and returns the plain model.

    Raises:
        AdapterError: a merged or trained tensor is not finite.
    """
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise AdapterError(f"the adapter cannot be merged: {error}") from error
    own_modules(plain).pop(PARAMETERS, None)  # PEFT's own class leaves them
    own_modules(plain).pop(BUFFERS, None)
    broken = [n for n, t in plain.state_dict().items() if t.is_floating_point() and not torch.isfinite(t).all()]
    refuse(AdapterError, "the merged model is not finite", [f"{name} holds NaN or infinity" for name in broken])
    return plain
