"""Does a model still run with an adapter on? Code of a family may read what PEFT's layer does not hand on."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import lookup
from solidify.adapter import past as past_layers
from solidify.behaviour import calling
from solidify.errors import AdapterError, refuse
from solidify.model import anatomy, probing, weight_reads
from solidify.model.extent import Extent
from solidify.model.probing import Inputs
from solidify.system import foreign


def inputs(model: nn.Module) -> tuple[Inputs | None, set[nn.Module]]:
    """Makes inputs for a small model; None where it is not run, or takes none that we know.

    Returns also the modules whose `weight` others read in a run with them, and which are not called: torch's encoder
    layers do so in evaluation, without gradients. What was tried before, and failed, is no such run.
    """
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel) or anatomy.is_meta(plain) or not Extent.of(plain).whole:
        return None, set()
    read: set[nn.Module] = set()
    called: set[nn.Module] = set()
    made = foreign.attempt(probing.probe_inputs, plain, run=anatomy.answer).value
    if made is None:
        return None, set()
    with calling.chance_kept(), weight_reads.watching_reads(read, called):
        foreign.attempt(anatomy.answer, plain, made)
    return made, read - called


def refuse_read_past(model: nn.Module, names: Sequence[str], made: Inputs | None, read: set[nn.Module]) -> None:
    """Refuses low-rank updates (of modules, or of their parameters) that another module passes by.

    Raises:
        AdapterError: a layer that is named is among those that are `read` and not called, or a pass with the inputs
            that were `made`, in evaluation or in training, computes with its weight past the layer.
    """
    if made is None:
        return
    located = {each.name: each for each in lookup.modules(model)}
    past = {name for name, each in located.items() if {each.called, each.inner} & read}
    owners = {name: name if name in located else name.rpartition(".")[0] for name in names}
    layers = {owner: [located[owner].called, located[owner].inner] for owner in owners.values() if owner in located}
    when = past_layers.find(lookup.plain_model(model), made, layers)
    refuse(
        AdapterError,
        "the adapter cannot be attached as declared",
        [
            *(
                f"LoRA: another module computes with the weight of {name} past the layer ({when[owner]}), so a "
                f"low-rank update has no effect there; name another layer, or name {_whole(name)} in `train`"
                for name, owner in owners.items()
                if owner in when and owner not in past
            ),
            *(
                f"LoRA: another module reads the weight of {name} and does not call it (torch's encoder layers do so "
                f"in evaluation), so a low-rank update has no effect there; name another layer, or name "
                f"{_whole(name)} in `train`"
                for name, owner in owners.items()
                if owner in past
            ),
        ],
    )


def _whole(name: str) -> str:
    """Returns the name of the module that a layer, or a layer's weight, is part of."""
    return name.removesuffix(".weight").rpartition(".")[0] or name


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
