"""Puts a declared mask on the attentions of a model, and proves that the family obeys it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solidify.errors import SurgeryError, refuse
from solidify.model import anatomy, operations
from solidify.model.extent import Extent
from solidify.surgery import control, influence, masking, selection
from solidify.surgery.control import Control, Judgement
from solidify.surgery.edit_record import Edit
from solidify.surgery.influence import Reach
from solidify.surgery.transaction import transaction

_LOOKS_AHEAD = ("bidirectional", "block_causal")
_NAMED = 4  # at most, in a message


def give_mask(
    model: PreTrainedModel,
    asked: dict[str, Any],
    target: str | Sequence[str] | None,
    expect: str | None,
    extent: Extent | None,
) -> list[Edit]:
    """Gives the attentions a mask, first by the configuration where that can say it, else by hooks.

    Raises:
        SurgeryError: as `masks.mask`.
    """
    names, all_named = _find_attentions(model, target, expect)
    refuse(SurgeryError, "the mask cannot be given as asked", _find_cut_blocks(model, names, asked["block"]))
    extent = Extent.given(extent, model)
    before = control.take(model, names, extent)
    by_itself = all_named and asked["kind"] in ("causal", "bidirectional")
    for hooked in (False, True) if by_itself else (True,):
        settings = {**asked, "hooked": hooked, **_find_configured(model, asked["kind"], all_named, hooked)}
        try:
            with transaction(model, extent, changes=()):
                return _give_masks(model, names, settings, before, extent)
        except SurgeryError:
            if hooked:
                raise
    raise AssertionError("unreachable")


def _find_cut_blocks(model: PreTrainedModel, names: Sequence[str], block: int | None) -> list[str]:
    """Says which attentions see chunks of a text alone, whose ends would cut a block: blocks are counted in a chunk."""
    faults = []
    for name in names if block is not None else ():
        config, index = operations.enclosing_config(model, name), operations.layer_index(model, name)
        types, chunk = getattr(config, "layer_types", None), getattr(config, "attention_chunk_size", None)
        chunked = types is not None and index is not None and types[index] == "chunked_attention"
        if chunked and chunk and block and chunk % block:
            faults.append(
                f"{name} sees chunks of {chunk} positions, which blocks of {block} do not fill; choose a divisor"
            )
    return faults[:_NAMED]


def _give_masks(
    model: PreTrainedModel, names: Sequence[str], settings: dict[str, Any], before: Control, extent: Extent
) -> list[Edit]:
    """Measures what the layers reach without a declared mask, gives it, and measures again."""
    kind = settings["kind"]
    what = f"the mask {masking.describe(settings)}"
    declares = {"causal": False, "cache": False} if kind in _LOOKS_AHEAD else {}
    if before.inputs is not None:
        tried = extent.sample(names, list(control.first_of_each_kind(model, names)))
        layers = _find_other_layers(model, names) if extent.whole else []
        masking.set_masks(model, [*names], {**settings, "hooked": False}, {})
        own = influence.measure(model, [*tried, *layers], whole=extent.whole)
        operations.assign(model.config, settings["after"])
        small = {**settings, **masking.reduced(settings)}
        masking.set_masks(model, [*names], small, {})
        found = influence.measure(model, [*tried, *layers], whole=extent.whole)
        faults = _find_faults(model, tried, small, own, found)
        refuse(SurgeryError, f"{type(model).__name__} does not obey {what}", faults)
        judged = _judge_widely(model, before, what, declares)
        refuse(SurgeryError, f"with {what} the model does not behave as before", judged.faults)
    operations.assign(model.config, settings["after"])
    masking.set_masks(model, [*names], settings, {})
    operations.withhold(model, {key for key, kept in declares.items() if not kept})
    probed = before.inputs is not None
    edits = [_make_record(model, name, settings, declares) for name in names]
    return [dataclasses.replace(edit, probed=probed, control=before.distances) for edit in edits]


def _judge_widely(model: PreTrainedModel, before: Control, what: str, declares: Mapping[str, bool]) -> Judgement:
    """Judges the model, one in half precision in float32 alone: what it never learned to see makes rounding grow."""
    wide = before.wide is not None
    sharp = dataclasses.replace(before, reading=before.wide, wide=None) if wide else before
    with influence.widened(model, wide):
        return control.judge(model, sharp, what=what, fresh=(), declared=declares, identical=False)


def _find_attentions(
    model: PreTrainedModel, target: str | Sequence[str] | None, expect: str | None
) -> tuple[list[str], bool]:
    """Returns the self-attentions that are meant, and whether these are all that the text's layers have."""
    if not isinstance(model, PreTrainedModel):
        raise SurgeryError(f"surgery is done on a transformers model, but this is a {type(model).__name__}")
    if model.config.is_encoder_decoder:
        raise SurgeryError(
            f"{type(model).__name__} is an encoder and a decoder, each with masks of its own; none can be given"
        )
    hits = selection.targets(model, target, None, None) if target is not None else []
    every = _list_attentions(model)
    without = _find_other_layers(model, every)
    if target is None:
        faults = [] if every else [f"{type(model).__name__} has no attention that takes an attention_mask"]
        if every and without:
            faults.append(f"{_write_names(without)} have no attention that takes a mask; name the layers that have one")
        names = every
    else:
        inside = {hit: [n for n in every if n == hit or n.startswith(f"{hit}.")] for hit in hits}
        faults = [
            f"{hit} ({type(model.get_submodule(hit)).__name__}) is and holds no attention that takes an attention_mask"
            for hit, found in inside.items()
            if not found
        ]
        names = list(dict.fromkeys(name for found in inside.values() for name in found))
    kinds = {name: type(model.get_submodule(name)).__name__ for name in names}
    faults += [f"{n} is {kind}, but {expect} was expected" for n, kind in kinds.items() if expect not in (None, kind)]
    refuse(SurgeryError, "the mask cannot be given as asked", faults)
    return names, set(names) == set(every) and not without


def _list_attentions(model: PreTrainedModel) -> list[str]:
    """Names the innermost self-attentions, of the text's configuration, whose calls hold an `attention_mask`."""
    texts = (model.config, model.config.get_text_config(decoder=True))
    found = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2].lower()
        words = [own, *(kind.__name__.lower() for kind in type(module).__mro__)]
        if isinstance(module, PreTrainedModel) or "cross" in own or not any("att" in word for word in words):
            continue
        parameters = inspect.signature(module.forward).parameters
        takes = "attention_mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if takes and any(operations.enclosing_config(model, name) is text for text in texts):
            found.append(name)
    return [name for name in found if not any(other.startswith(f"{name}.") for other in found)]


def _find_other_layers(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Names the layers, in the lists that hold a named attention, that hold none themselves."""
    lists = {}
    for name in names:
        parts = name.split(".")
        owners = (".".join(parts[:end]) for end in range(1, len(parts)))
        owner = next((o for o in owners if isinstance(model.get_submodule(o), nn.ModuleList)), None)
        if owner is not None:
            lists[owner] = model.get_submodule(owner)
    layers = [f"{owner}.{key}" for owner, items in lists.items() for key, _ in items.named_children()]
    return [layer for layer in layers if not any(name.startswith(f"{layer}.") for name in names)]


def _find_configured(model: PreTrainedModel, kind: str, all_named: bool, hooked: bool) -> dict[str, dict[str, Any]]:
    """Returns what the configuration says of looking ahead, before and after, where it speaks of the whole model."""
    text = model.config.get_text_config(decoder=True)
    path = anatomy.path_in_config(model.config, text)
    now = getattr(text, "is_causal", True)
    then = not (kind == "bidirectional" and not hooked)
    if not all_named or path is None or now is then:
        return {"before": {}, "after": {}}
    return {"before": {f"{path}is_causal": now}, "after": {f"{path}is_causal": then}}


def _find_faults(
    model: PreTrainedModel, tried: Sequence[str], asked: Mapping[str, Any], own: Reach, found: Reach
) -> list[str]:
    """Compares what was measured with what the mask means."""
    if own.biased and asked["kind"] in _LOOKS_AHEAD:
        return [f"{_write_names(own.biased)} add to the scores by their mask, which says nothing of positions ahead"]
    faults = []
    for number, real in enumerate(found.real):
        when = ", padded on the left" if number else ""
        meant = {name: _mean(model, name, asked, own, number) for name in tried}
        for name, expected in meant.items():
            got = found.alone[name][number]
            faults += _describe_difference(
                f"{name} ({type(model.get_submodule(name)).__name__})", got, expected, expected, real, when
            )
        if not found.whole or any(faults):
            continue
        before = _compose_in_order(model, {name: reach[number] for name, reach in own.alone.items()})
        told = _describe_difference("", own.whole[number], *before, real, "")
        if told:
            return [f"positions reach one another otherwise than through its layers even without the mask{told[0]}"]
        others = {name: reach[number] for name, reach in found.alone.items() if name not in meant}
        after = _compose_in_order(model, {**others, **meant})
        faults += _describe_difference("the whole model", found.whole[number], *after, real, when)
    return faults


def _compose_in_order(model: nn.Module, reach: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Composes what modules reach, in the order in which they stand in the model."""
    return influence.compose([reach[name] for name, _ in model.named_modules() if name in reach])


def _mean(model: PreTrainedModel, name: str, asked: Mapping[str, Any], own: Reach, number: int) -> torch.Tensor:
    """Returns what a declared mask means at one attention: no more than it sees by itself, in either direction."""
    real, alone = own.real[number], own.alone[name][number]
    module = model.get_submodule(name)
    near = (alone | alone.T) & real[:, None] & real[None, :]
    if not asked["hooked"] and asked["kind"] == "bidirectional":  # there transformers counts a window from both ends
        grown = torch.nn.functional.pad(near, (0, 0, 1, 1))
        near = grown[:-2] | near | grown[2:]
    return masking.allowed(asked, real, sinks=not masking.slides(module)) & near


def _describe_difference(
    what: str, found: torch.Tensor, most: torch.Tensor, least: torch.Tensor, real: torch.Tensor, when: str
) -> list[str]:
    """Says where a reach is larger than `most` or smaller than `least`; who sees is real, who is seen need not be."""
    own = torch.eye(len(real), dtype=torch.bool)
    ahead = found & ~most & ~own & real[:, None]
    missing = least & ~found & real[:, None] & real[None, :]
    faults = []
    for wrong, words in ((ahead, "moves"), (missing, "does not move")):
        if bool(wrong.any()):
            i, j = (int(place) for place in wrong.nonzero()[0])
            faults.append(
                f"{what}: a change at position {j} {words} position {i}{when} ({int(wrong.sum())} of "
                f"{int(real.sum()) ** 2} such pairs)"
            )
    return faults


def _make_record(model: PreTrainedModel, name: str, settings: Mapping[str, Any], declares: Mapping[str, bool]) -> Edit:
    module = model.get_submodule(name)
    numbers = {key: settings[key] for key in ("block", "window", "sinks") if settings[key] is not None}
    parameters = anatomy.count(module.parameters())
    return Edit(
        name=name,
        old_class=type(module).__name__,
        module_class=None,
        arguments={"mask": settings["kind"], **numbers},
        supplied=(),
        tensors={f"{name}.{key}": f"{name}.{key}" for key in module.state_dict()},
        dropped=(),
        frozen=(),
        parameters_before=parameters,
        parameters_after=parameters,
        probed=False,
        identical=False,
        bypass=False,
        operation="mask",
        settings=dict(settings),
        declares=dict(declares),
    )


def _write_names(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
