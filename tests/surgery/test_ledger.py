from __future__ import annotations

import pico
from pico import wrappers

import solidify
from solidify.artifact import tensors
from solidify.checks import structure
from solidify.model.extent import Extent
from solidify.surgery import ledger


def test_names_are_followed_through_insertions_and_removals() -> None:
    model = pico.llama(num_hidden_layers=3)
    edits = solidify.replace(model, "model.layers.1.mlp", wrappers.Scaled)
    edits += solidify.insert(model, "model.layers.1")
    edits += solidify.remove(model, "model.layers.0")
    edits += solidify.replace(model, "model.layers.2.self_attn.o_proj", wrappers.Bottleneck)
    records = [edit.document() for edit in edits]
    assert set(ledger.new_modules(records)) == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
        "model.layers.2.self_attn.o_proj",
    }
    assert structure.structure(model, records).passed
    assert structure.in_use(model, records, Extent.of(model)).passed


def test_a_module_inside_a_later_replacement_is_gone_unless_it_was_kept() -> None:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.0.mlp.up_proj", wrappers.Bottleneck)
    gone = [*edits, *solidify.replace(model, "model.layers.0.mlp", wrappers.PlainMLP)]
    assert set(ledger.new_modules([e.document() for e in gone])) == {"model.layers.0.mlp"}


def test_every_base_tensor_is_found_again_after_a_chain_of_edits() -> None:
    model = pico.llama(num_hidden_layers=3)
    before = tensors.digests(model.state_dict().items())
    edits = solidify.insert(model, "model.layers.1", zero=["mlp.down_proj"])
    edits += solidify.replace(model, "model.layers.*.mlp", wrappers.Scaled)
    edits += solidify.remove(model, "model.layers.0")
    edits += solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm")
    records = [edit.document() for edit in edits]
    finding = structure.untouched(model, before, records)
    assert finding.passed, finding.evidence
    assert "21 of 30 base tensors byte-identical" in finding.evidence
    origins, _ = ledger.origins(before, records)
    assert origins["model.layers.2.mlp.original.up_proj.weight"] == "model.layers.2.mlp.up_proj.weight"
    assert origins["model.layers.1.mlp.original.down_proj.weight"] is None
    model.model.layers[2].mlp.original.up_proj.weight.data[0, 0] += 1
    spoiled = structure.untouched(model, before, records)
    assert "model.layers.2.mlp.original.up_proj.weight changed" in spoiled.evidence
