"""What terms may ask for: hidden states and a head that is the model's own, in any family; and what is captured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from pico import SIZES
from torch import nn

import solidify
from solidify.errors import ObjectiveError
from solidify.objective.capture import Capture, capture
from solidify.objective.engine import ObjectiveEngine
from solidify.objective.internals import Head, decoder_captures, decoder_output
from solidify.objective.objective import Objective
from solidify.objective.observation import Observation, ReferenceObservation
from solidify.objective.term import Term
from training import awake

DENSE = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
HEADS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": DENSE,
    "GPT2LMHeadModel": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GraniteForCausalLM": {**DENSE, "logits_scaling": 8.0},  # divides its logits
    "CohereForCausalLM": {**DENSE, "logit_scale": 0.25},  # multiplies them
    "Gemma2ForCausalLM": {**DENSE, "final_logit_softcapping": 3.0, "head_dim": 8},  # bends them
    "Qwen3MoeForCausalLM": {**DENSE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16},  # projects before its head
    "PhiForCausalLM": {**DENSE},  # a head with a bias
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_the_models_own(name: str, dtype: torch.dtype) -> None:
    model = pico.make(name, dtype=dtype, **HEADS[name])
    inputs = {"input_ids": pico.tokens(3, 7)}
    with torch.no_grad(), capture(model, decoder_captures(model)) as seen:
        logits = model(**inputs).logits
    decoder, output = decoder_output(model, seen)
    head = Head(model, decoder, output)
    rows = output[0].reshape(-1, output[0].shape[-1])
    with torch.no_grad():
        # A product of other shape may round otherwise.
        near = 1e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(head(rows), logits.reshape(-1, 128), rtol=0, atol=near)
        assert head(rows[:5]).shape == (5, 128)
        again = model(**inputs).logits  # the model is as it was
    assert torch.equal(again, logits)


def test_a_head_that_is_trained_by_lora_is_used_with_it(trash_artifact: Path) -> None:
    model = awake(trash_artifact, lora={"r": 2, "target_modules": ["lm_head"]})
    inputs = {"input_ids": pico.tokens(2, 5)}
    with torch.no_grad(), capture(model, decoder_captures(model)) as seen:
        logits = model(**inputs).logits
    decoder, output = decoder_output(model, seen)
    head = Head(model, decoder, output)
    with torch.no_grad():
        torch.testing.assert_close(head(output[0][0]), logits[0], rtol=0, atol=1e-6)
        with model.disable_adapter():
            assert not torch.allclose(head(output[0][0]), logits[0], atol=1e-3)


class Watch:
    """Asks for hidden states and the head, and remembers the shapes that it saw."""

    reduction = "token_sum"

    def __init__(self) -> None:
        self.heads: list[int] = []

    def __call__(self, hidden_states: torch.Tensor, head: Any, labels: torch.Tensor) -> torch.Tensor:
        rows = hidden_states[:, :-1][labels[:, 1:] != -100]
        return nn.functional.cross_entropy(head(rows).float(), labels[:, 1:][labels[:, 1:] != -100], reduction="sum")


def test_no_logits_are_built_that_nobody_asks_for(trash_artifact: Path) -> None:
    model = awake(trash_artifact)
    lengths: list[int] = []
    model.get_base_model().lm_head.register_forward_hook(lambda m, a, o: lengths.append(o.shape[-2]))
    batch = pico.collate(pico.ragged(4))
    engine = ObjectiveEngine(Objective([Term(Watch())]), model)
    engine.begin([batch])
    ours = engine.loss(batch)
    targets = int((batch["labels"][:, 1:] != -100).sum())
    assert lengths == [1, targets]  # one position, because a model must build some; then the rows that count
    assert float(ours.detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)


def last(attentions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([a[..., -1].square().mean() for a in attentions.values()]).mean()


last.captures = {"attentions": Capture(records="attentions", element=1)}  # type: ignore[attr-defined]


def test_attention_weights_are_seen_where_they_exist() -> None:
    batch = pico.collate(pico.ragged(2))
    with pytest.raises(ObjectiveError, match='is None; attention weights exist with attn_implementation="eager" only'):
        ObjectiveEngine(Objective([Term(last)]), pico.llama()).loss(batch)
    model = pico.llama(attn_implementation="eager")
    with torch.no_grad():
        expected = last(dict(enumerate(model(**batch, output_attentions=True).attentions)))
    seen = ObjectiveEngine(Objective([Term(last)]), model).loss(batch)
    assert float(seen.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_a_modules_input_and_elements_of_what_it_returns_are_seen() -> None:
    model = pico.llama()
    wanted = {
        "in": Capture(modules="model.layers.*.mlp", of="input"),
        "norm": Capture(modules="model.layers.*.post_attention_layernorm"),
        "first": Capture(modules="model.layers.*.self_attn", element=0),
    }
    with torch.no_grad(), capture(model, wanted) as seen:
        model(input_ids=pico.tokens())
    for layer in range(2):
        there = seen["in"][f"model.layers.{layer}.mlp"]
        assert torch.equal(there, seen["norm"][f"model.layers.{layer}.post_attention_layernorm"])
        assert seen["first"][f"model.layers.{layer}.self_attn"].shape == there.shape
    wanted = {"it": Capture(modules="model.layers.0.self_attn", element=5)}
    words = r"wants element 5 of what model\.layers\.0\.self_attn returns, which has 2"
    with pytest.raises(ObjectiveError, match=words), capture(model, wanted):
        model(input_ids=pico.tokens())
    with pytest.raises(ObjectiveError, match="must be 'output' or 'input'"):
        Capture(modules="a", of="both")


class Tapped(nn.Module):
    """Computes a gate inside its forward and declares it by passing it through a tap."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.gate = nn.Parameter(torch.zeros(32))
        self.gate_tap = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.original(x) * 2 * self.gate_tap(torch.sigmoid(x * self.gate))


def openness(gates: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.mean() for g in gates.values()]).mean()


openness.captures = {"gates": Capture(modules="**.gate_tap", count=2)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_module_declares_what_it_computes_by_a_tap(checkpointing: bool) -> None:
    model = pico.llama()
    solidify.replace(model, "model.layers.*.mlp", Tapped)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    engine = ObjectiveEngine(Objective([Term("model"), Term(openness, 10.0)]), model)
    batch = pico.collate(pico.ragged(4))
    engine.begin([batch])
    engine.loss(batch).backward()  # recomputes the layers; what ran again is not counted again
    assert engine.end()["term/openness"] == pytest.approx(0.5)
    assert all(float(layer.mlp.gate.grad.abs().max()) > 0 for layer in model.model.layers)


def test_a_module_that_runs_twice_is_refused() -> None:
    model = pico.llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp  # one module in two places
    term = Term(openness)
    term.captures = {"gates": Capture(modules="model.layers.0.mlp")}
    with pytest.raises(ObjectiveError, match="ran twice in one forward pass"):
        ObjectiveEngine(Objective([term]), model).loss(pico.collate(pico.ragged(2)))


def test_a_model_without_a_decoder_of_its_own_has_no_hidden_states_to_give() -> None:
    model = pico.make("LlamaModel", **DENSE)
    with pytest.raises(ObjectiveError, match="LlamaModel has no decoder apart from its head"):
        ObjectiveEngine(Objective([Term(Watch())]), model)


def test_masks_are_boolean_so_that_indexing_takes_the_attended_rows() -> None:
    seen: dict[str, Any] = {}

    def attended(
        mask: torch.Tensor, attention_mask: torch.Tensor, hidden_states: torch.Tensor, inputs: Any
    ) -> torch.Tensor:
        seen.update(mask=mask, attention_mask=attention_mask, inputs=inputs)
        rows = hidden_states.flatten(0, 1)[mask]
        assert torch.equal(rows, hidden_states[attention_mask])
        return rows.square().mean()

    batch = pico.collate(pico.ragged(3))
    engine = ObjectiveEngine(Objective([Term(attended)]), pico.llama())
    value = engine.loss(batch)
    assert seen["mask"].dtype == seen["attention_mask"].dtype == torch.bool
    assert (
        seen["mask"].shape == (batch["input_ids"].numel(),) and seen["attention_mask"].shape == batch["input_ids"].shape
    )
    assert seen["inputs"]["attention_mask"].dtype == torch.long  # the model's own is as it was
    states = engine.model.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
    torch.testing.assert_close(value, states[batch["attention_mask"].bool()].square().mean())


def test_an_observation_shows_what_it_has_and_runs_the_reference_when_it_is_asked_for() -> None:
    ran: list[int] = []

    def reference() -> ReferenceObservation:
        ran.append(1)
        return ReferenceObservation({("mine", "seen"): {"a": 1}}, logits=torch.ones(2, 3, 4))

    states = torch.zeros(2, 3, 8)
    given = {"model": nn.Linear(1, 1), "inputs": {}, "labels": None, "attention_mask": None, "mask": None}
    shown = Observation(**given, hidden_states=states, make_reference=reference)
    assert shown.give("labels") is None  # a batch may have none
    assert shown.give("hidden_states") is states
    with pytest.raises(ObjectiveError, match="asks for 'logits', which this forward pass does not give"):
        shown.give("logits")
    assert not ran
    assert shown.give("reference_logits").shape == (2, 3, 4)
    assert shown.give_captured("mine", "seen", reference=True) == {"a": 1}
    assert ran == [1]
    with pytest.raises(ObjectiveError, match="the term mine asks for 'seen', which was not captured"):
        shown.give_captured("mine", "seen")
    with pytest.raises(ObjectiveError, match="asks for 'reference_head', which"):
        shown.give("reference_head")
