"""Each check passes on what is right and fails on the fault that is planted."""

from __future__ import annotations

import copy
from functools import partial

import pico
import torch
from pico import wrappers

import solidify
from solidify.adapter import lookup
from solidify.artifact import tensors
from solidify.checks import structure
from solidify.model import anatomy, probing
from solidify.model.extent import Extent
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.modules.window_attention import WindowAttention


def operated() -> tuple[torch.nn.Module, list[dict[str, object]], dict[str, str]]:
    model = pico.olmoe()
    before = tensors.digests(model.state_dict().items())
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    return model, [edit.document() for edit in edits], before


def test_structure_passes_and_sees_a_module_that_is_not_there() -> None:
    model, edits, _ = operated()
    assert structure.structure(model, edits).passed
    model.model.layers[1].mlp = pico.olmoe().model.layers[1].mlp
    finding = structure.structure(model, edits)
    assert not finding.passed
    assert "model.layers.1.mlp is OlmoeSparseMoeBlock, not TrashCanMoE" in finding.evidence


def test_structure_sees_a_child_with_a_dotted_name() -> None:
    model, edits, _ = operated()
    setattr(model, "model.layers.0.mlp", wrappers.PlainMLP(model.config))
    finding = structure.structure(model, edits)
    assert not finding.passed
    assert "dotted name 'model.layers.0.mlp'" in finding.evidence


def test_structure_reads_through_an_adapter() -> None:
    model, edits, _ = operated()
    peft_model = solidify.attach(model, train=["model.layers.0.mlp"])
    find = partial(lookup.find_inner, peft_model)
    assert structure.structure(lookup.plain_model(peft_model), edits, find).passed


def test_a_module_without_effect_is_found() -> None:
    model, edits, _ = operated()
    assert structure.in_use(model, edits, Extent.of(model)).passed
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    finding = structure.in_use(model, edits, Extent.of(model))
    assert not finding.passed
    assert "no effect: model.layers.1.mlp" in finding.evidence


def test_every_base_tensor_is_accounted_for() -> None:
    model, edits, before = operated()
    finding = structure.untouched(model, before, edits)
    assert finding.passed
    assert "25 of 25 base tensors byte-identical, 8 new, 0 dropped" in finding.evidence
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert "model.norm.weight changed" in structure.untouched(model, before, edits).evidence


def test_tensors_that_vanish_or_appear_are_found() -> None:
    model, edits, before = operated()
    model.extra = torch.nn.Parameter(torch.ones(1))
    assert (
        "extra is neither the base's nor named as new by an edit" in structure.untouched(model, before, edits).evidence
    )
    del model.extra
    del model.model.norm
    finding = structure.untouched(model, before, edits)
    assert not finding.passed
    assert "model.norm.weight of the base is gone" in finding.evidence


def test_moved_and_dropped_tensors_are_followed() -> None:
    model = pico.olmoe()
    before = tensors.digests(model.state_dict().items())
    edits = [e.document() for e in solidify.replace(model, "model.layers.*.mlp", wrappers.Adopter)]
    edits += [e.document() for e in solidify.replace(model, "**.self_attn", wrappers.Scaled)]
    assert structure.untouched(model, before, edits).passed
    spoiled = copy.deepcopy(edits)
    spoiled[0]["dropped"] = []
    assert not structure.untouched(model, before, spoiled).passed


def test_an_identical_start_is_required_only_where_it_was_promised() -> None:
    model = pico.olmoe()
    inputs = {"case": probing.probe_inputs(model)}
    before = {case: anatomy.run(model, batch) for case, batch in inputs.items()}
    after = {case: logits + 1e-6 for case, logits in before.items()}
    assert structure.start(before, before, promised=True).passed is True
    assert structure.start(before, after, promised=True).passed is False
    assert structure.start(before, after, promised=False).passed is None


def test_a_module_that_is_exact_up_to_a_length_is_held_to_that_and_any_other_to_all() -> None:
    model = pico.olmoe()
    inputs = {case: probing.probe_inputs(model, length=length) for case, length in (("short", 12), ("long", 40))}
    before = {case: anatomy.run(model, batch) for case, batch in inputs.items()}
    edits = solidify.replace(model, "**.self_attn", WindowAttention, arguments={"window": 20})
    limit = structure.exact_up_to(model, [edit.document() for edit in edits])
    assert all(edit.identical for edit in edits) and limit == 24
    after = {case: anatomy.run(model, batch) for case, batch in inputs.items()}
    found = structure.start(before, after, promised=True, limit=limit)
    assert found.passed is None and "of more than the 24 positions" in found.evidence
    broken = {"short": after["short"] + 1e-6, "long": after["long"]}
    assert structure.start(before, broken, promised=True, limit=limit).passed is False
    assert structure.start(before, after, promised=True).passed is False  # who says nothing of a length is held to all
    other, declared, _ = operated()
    assert structure.exact_up_to(other, declared) is None
