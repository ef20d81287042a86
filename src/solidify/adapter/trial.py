"""Does a model still run with an adapter on? Code of a family may read what PEFT's layer does not hand on."""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import lookup
from solidify.errors import AdapterError
from solidify.model import anatomy, probing
from solidify.model.extent import Extent
from solidify.model.probing import Inputs
from solidify.system import foreign


def inputs(model: nn.Module) -> Inputs | None:
    """Makes inputs for a small model that has no adapter yet; None where it is not run, or takes none that we know."""
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel) or anatomy.is_meta(plain) or not Extent.of(plain).whole:
        return None
    return foreign.attempt(probing.probe_inputs, plain, run=anatomy.answer).value


def faults(model: PeftModel, made: Inputs | None) -> list[str]:
    """Runs a model with its adapter on the inputs that its base ran with, and says what that raises."""
    if made is None:
        return []
    try:
        with foreign.calling("the model does not run with the adapter on, though it does without", AdapterError):
            anatomy.answer(model, made)
    except AdapterError as error:
        return [f"{error}; its code reads something of a layer that PEFT's layer lacks: leave that layer out"]
    return []
