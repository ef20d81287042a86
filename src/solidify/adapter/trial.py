"""Does a model still run with an adapter on? Code of a family may read what PEFT's layer does not hand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from solidify.adapter import effects, lookup
from solidify.adapter import past as past_layers
from solidify.behaviour import calling
from solidify.errors import AdapterError, refuse
from solidify.model import anatomy, probing, quantized, weight_reads
from solidify.model.extent import Extent
from solidify.model.probing import Inputs
from solidify.system import console, foreign

_NAMED = 3  # names of layers that a sentence has


def inputs(model: nn.Module) -> Inputs | None:
    """Makes inputs for a small model; None where it is not run, or takes none that we know."""
    plain = lookup.plain_model(model)
    if not isinstance(plain, PreTrainedModel) or anatomy.is_meta(plain) or not Extent.of(plain).whole:
        return None
    return foreign.attempt(probing.probe_inputs, plain, run=anatomy.answer).value


def refuse_read_past(model: nn.Module, names: Sequence[str], made: Inputs | None) -> None:
    """Refuses low-rank updates (of modules, or of their parameters) that another module passes by.

    Raises:
        AdapterError: a pass with the inputs that were `made`, in evaluation or in training, computes with the weight of
            a layer that is named past the layer; or the weight is packed, and others read it without calling the layer.
            (Of other weights that are read `refuse_without_effect` tries whether it has an effect.)
    """
    if made is None:
        return
    located = {each.name: each for each in lookup.modules(model)}
    owners = {name: name if name in located else name.rpartition(".")[0] for name in names}
    layers = {owner: [located[owner].called, located[owner].inner] for owner in owners.values() if owner in located}
    packed = {owner for owner, each in layers.items() if _holds_packed(each[-1])}
    read = _find_read(model, made) if packed else set()
    packed = {owner for owner in packed if {*layers[owner]} & read}
    when = past_layers.find(lookup.plain_model(model), made, layers)
    _refuse(
        [
            *(
                f"LoRA: another module computes with the weight of {name} past the layer ({when[owner]}), so a "
                f"low-rank update has no effect there; {_remedy(name)}"
                for name, owner in owners.items()
                if owner in when and owner not in packed
            ),
            *(_said_of_read(name) for name, owner in owners.items() if owner in packed),
        ]
    )


def refuse_without_effect(model: PeftModel, adapter: str, made: Inputs | None) -> None:
    """Refuses an adapter's low-rank updates that change nothing, though their weights do.

    Says of which updates nothing is seen.

    Raises:
        AdapterError: with the inputs that were `made`, the output depends on a weight and not on the update of it.
    """
    if made is None:
        return
    passed, unseen = effects.find(model, adapter, made)
    _refuse(list(_say_passed(model, passed, made)))
    if unseen:
        more = f" and {len(unseen) - _NAMED} more" if len(unseen) > _NAMED else ""
        console.words.print(
            f"LoRA: not looked at whether an update of {', '.join(unseen[:_NAMED])}{more} has an effect: with inputs "
            "that were made up, their weights have none"
        )


def _say_passed(model: nn.Module, passed: Mapping[str, str], made: Inputs) -> Iterator[str]:
    read = _find_read(model, made) if passed else set()
    for name, mode in passed.items():
        layer = lookup.at(model, name) or lookup.at(model, name.rpartition(".")[0])
        if layer is not None and {layer.called, layer.inner} & read:
            yield _said_of_read(name)
        else:
            yield (
                f"LoRA: what the model returns depends on the weight of {name}, and not on a low-rank update of it "
                f"({mode}), for something computes with the weight past the layer; {_remedy(name)}"
            )


def _find_read(model: nn.Module, made: Inputs) -> set[nn.Module]:
    """Returns the modules whose `weight` others read in a run, and which are not called.

    Torch's encoder layers do so in evaluation, without gradients. Only a run that the model takes is watched: what is
    tried before it may read a weight and fail.
    """
    plain = lookup.plain_model(model)
    assert isinstance(plain, PreTrainedModel)
    read: set[nn.Module] = set()
    called: set[nn.Module] = set()
    with calling.chance_kept(), weight_reads.watching_reads(read, called):
        foreign.attempt(anatomy.answer, plain, made)
    return read - called


def _refuse(faults: Sequence[str]) -> None:
    refuse(AdapterError, "the adapter cannot be attached as declared", faults)


def _holds_packed(module: nn.Module) -> bool:
    return any(quantized.is_packed(parameter) for parameter in module.parameters(recurse=False))


def _said_of_read(name: str) -> str:
    return (
        f"LoRA: another module reads the weight of {name} and does not call it (torch's encoder layers do so in "
        f"evaluation), so a low-rank update has no effect there; {_remedy(name)}"
    )


def _remedy(name: str) -> str:
    return f"name another layer, or name {_whole(name)} in `train`"


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
