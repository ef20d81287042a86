"""Each check of training passes on what is right and fails on the fault that is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moving
import pico
import pytest
import torch
from pico import wrappers

import solidify
from solidify import losses
from solidify.adapter import lookup, storage
from solidify.adapter import plan as planning
from solidify.checks import gradients, roundtrip, trainable
from solidify.directory import manifest
from solidify.errors import ObjectiveError
from solidify.merging import changes
from solidify.model import probing
from solidify.objective.objective import Objective, Term
from solidify.training.trainer import ObjectiveTrainer
from training import LORA, TRAIN, arguments, awake, in_order


def attached(artifact: Path) -> tuple[Any, Any]:
    model = solidify.load(artifact)
    wanted = planning.plan(model, LORA, TRAIN)
    return solidify.attach(model, lora=LORA, train=TRAIN), wanted


def test_the_trainable_set_is_compared_by_name_not_by_number(trash_artifact: Path) -> None:
    model, wanted = attached(trash_artifact)
    assert trainable.trainable(model, wanted).passed
    parameters = {(k, n): p for k, n, p in lookup.named_parameters(model)}
    swapped = parameters["full", "model.layers.0.mlp.trash.weight"]
    other = parameters["base", "model.norm.weight"]
    assert swapped.numel() == other.numel()
    swapped.requires_grad_(False)
    other.requires_grad_(True)
    finding = trainable.trainable(model, wanted)
    assert not finding.passed
    assert "trainable, but not declared: the base parameter model.norm.weight" in finding.evidence


def test_frozen_tensors_are_compared_with_what_was_built(trash_artifact: Path) -> None:
    record = manifest.read(trash_artifact)
    model = awake(trash_artifact, lora=LORA, train=["**.mlp.trash", "**.o_proj.weight"])
    assert trainable.frozen(model, record).passed
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.trash.weight"):
        model = attached(trash_artifact)[0]
        base = next(p for kind, n, p in lookup.named_parameters(model) if (kind, n) == ("base", name))
        with torch.no_grad():
            base[0].add_(1e-6)
        finding = trainable.frozen(model, record)
        assert not finding.passed
        assert f"{name} changed" in finding.evidence


def test_a_buffer_that_moves_though_frozen_is_found(trash_artifact: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    bias = "model.layers.0.mlp.trash"
    lookup.owner(model, bias).bias.fill_(-3.0)  # the adapter's own version
    assert trainable.frozen(model, manifest.read(trash_artifact)).passed
    with model.disable_adapter():
        lookup.owner(model, bias).bias.fill_(-3.0)  # the base's
    finding = trainable.frozen(model, manifest.read(trash_artifact))
    assert "model.layers.0.mlp.trash.bias changed" in finding.evidence


def train(model: Any, directory: Path, *callbacks: Any, terms: Any = None, cls: Any = ObjectiveTrainer) -> Any:
    trainer = cls(
        model=model,
        args=arguments(directory, 2, 2, max_steps=3),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=Objective(terms or [Term("model")]),
    )
    in_order(trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def test_gradients_are_seen_where_they_exist(trash_artifact: Path, tmp_path: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    witness = gradients.GradientWitness(model)
    train(model, tmp_path, witness)
    finding = witness.finding()
    assert finding.passed
    assert "4 trainable tensors got non-zero gradients in 3 steps" in finding.evidence


def test_a_saturated_gate_is_found_though_its_gradient_is_not_none(tmp_path: Path) -> None:
    model = pico.olmoe()
    solidify.replace(model, "model.layers.0.mlp", wrappers.Saturated)
    peft_model = solidify.attach(model, lora=LORA, train=["model.layers.0.mlp.gate"])
    witness = gradients.GradientWitness(peft_model)
    train(peft_model, tmp_path, witness)
    finding = witness.finding()
    assert not finding.passed
    assert "never has a gradient: model.layers.*.mlp.gate" in finding.evidence


def test_a_gradient_on_something_frozen_and_one_that_is_not_finite_are_found(
    trash_artifact: Path, tmp_path: Path
) -> None:
    model = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    witness = gradients.GradientWitness(model)
    frozen = next(p for kind, n, p in lookup.named_parameters(model) if n == "model.norm.weight")

    class Spoil(gradients.GradientWitness):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            frozen.grad = torch.ones_like(frozen)
            trained = next(p for p in model.parameters() if p.requires_grad)
            trained.grad.fill_(float("nan"))

    with pytest.raises(ObjectiveError, match="the objective is not finite in step 2: model is nan"):
        train(model, tmp_path, Spoil(model), witness)
    finding = witness.finding()
    assert not finding.passed
    assert "frozen, but has a gradient: base_model.model.model.norm.weight" in finding.evidence
    assert "not finite" in finding.evidence
    assert not gradients.GradientWitness(model).finding().passed


class MultipliesItsPenalty(ObjectiveTrainer):
    """The common mistake: a regulariser added to every micro-batch, not divided by their number."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss + 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)


class MeanOfMeans(ObjectiveTrainer):
    """The other one: a mean per micro-batch, whatever its number of tokens."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs).loss / self.current_gradient_accumulation_steps


@pytest.mark.parametrize("cls", [ObjectiveTrainer, MultipliesItsPenalty, MeanOfMeans])
def test_a_loss_that_depends_on_accumulation_is_found(trash_artifact: Path, tmp_path: Path, cls: Any) -> None:
    terms = [Term("model"), Term(losses.trash_budget, 1.0, arguments={"target": 0.3}), Term(losses.weight_penalty, 0.1)]
    trainer = train(awake(trash_artifact), tmp_path, terms=terms, cls=cls)
    finding = gradients.accumulation(trainer, pico.ragged(8))
    assert finding.passed is (cls is ObjectiveTrainer)


class SlightlyOff(ObjectiveTrainer):
    """A scale that is wrong by so little that it could be rounding, but is not."""

    wrong = 4e-4

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss * (1 + self.wrong * (self.current_gradient_accumulation_steps > 1))


@pytest.mark.parametrize(("cls", "tolerance"), [(ObjectiveTrainer, 2e-7), (SlightlyOff, 1e-4)])
def test_what_is_called_rounding_is_what_rounding_is_measured_to_do(
    trash_artifact: Path, tmp_path: Path, cls: Any, tolerance: float
) -> None:
    trainer = train(awake(trash_artifact), tmp_path, terms=[Term("model")], cls=cls)
    batch = pico.ragged(8)
    whole = gradients._compute_gradient(trainer, batch, 8, 1)
    off = max(
        gradients._find_furthest(whole, gradients._compute_gradient(trainer, batch, size, 1))[0] for size in (4, 2, 1)
    )
    assert tolerance < off < 10 * tolerance  # where it may be rounding
    rounded = gradients._measure_rounding(trainer, batch, (8, 1), whole)
    assert 1e-7 < rounded < 1e-4
    finding = gradients.accumulation(trainer, batch, tolerance=tolerance)
    assert finding.passed is (cls is ObjectiveTrainer)
    assert ("moved by a unit in the last place" in finding.evidence) is (cls is ObjectiveTrainer)


@pytest.mark.parametrize(("rounding", "verdict"), [(0.12, "measured"), (0.01, "failed")])
def test_in_half_precision_what_may_be_rounding_is_measured_and_not_proved(
    trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: float, verdict: str
) -> None:
    """Losses that compare answers cancel: of KTO's on four rows, seven hundredths of the gradient were rounding."""
    trainer = train(awake(trash_artifact), tmp_path, terms=[Term("model")], cls=SlightlyOff)
    trainer.wrong = 0.1
    monkeypatch.setattr(gradients, "_measure_rounding", lambda *_: rounding)
    finding = gradients.accumulation(trainer, pico.ragged(8), tolerance=5e-2)
    assert finding.verdict == verdict
    trainer.wrong = 0.3
    monkeypatch.setattr(gradients, "_measure_rounding", lambda *_: 1.0)
    assert gradients.accumulation(trainer, pico.ragged(8), tolerance=5e-2).verdict == "failed"


def test_a_term_that_never_had_a_gradient_is_found(
    trash_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asleep = solidify.attach(solidify.load(trash_artifact), lora=LORA, train=TRAIN)
    terms = [Term("model"), Term(losses.trash_budget, arguments={"target": 0.5}, name="budget")]
    finding = gradients.terms(train(asleep, tmp_path, terms=terms).engine.sanity)
    assert not finding.passed and finding.evidence == "budget never had a gradient"
    assert "The term budget never had a gradient" in capsys.readouterr().err
    finding = gradients.terms(train(awake(trash_artifact), tmp_path, terms=terms).engine.sanity)
    assert finding.passed and "2 terms" in finding.evidence


def test_a_gradient_that_is_no_number_agrees_with_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = train(awake(trash_artifact), tmp_path)
    next(each for each in trainer.model.parameters() if each.requires_grad).register_hook(lambda g: g * torch.nan)
    finding = gradients.accumulation(trainer, pico.ragged(8))
    assert finding.passed is False and "is NaN or infinite" in finding.evidence


def test_accumulation_of_nothing_proves_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = train(awake(trash_artifact), tmp_path)
    assert not gradients.accumulation(trainer, pico.ragged(1)).passed
    trainer.engine.objective = Objective([Term("model", 0.0)])
    assert not gradients.accumulation(trainer, pico.ragged(8)).passed


def test_accumulation_is_judged_without_dropout_and_leaves_no_trace(trash_artifact: Path, tmp_path: Path) -> None:
    model = awake(trash_artifact, lora={**LORA, "lora_dropout": 0.5})
    trainer = train(model, tmp_path)
    history = list(trainer.history)
    assert gradients.accumulation(trainer, pico.ragged(8)).passed
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    assert all(p.grad is None for p in model.parameters())
    assert trainer.history == history


@pytest.mark.parametrize("module", [moving.Counted, moving.Averaged])
def test_accumulation_leaves_buffers_as_training_left_them(tmp_path: Path, module: type) -> None:
    model = pico.llama()
    solidify.replace(model, "model.layers.*.mlp", module)
    model = solidify.attach(model, lora=LORA)
    trainer = train(model, tmp_path)
    there = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in there.items()}
    assert any(bool(b.any()) for name, b in before.items() if name.endswith(("passes", "mean")))
    finding = gradients.accumulation(trainer, pico.ragged(8))
    after = dict(model.named_buffers())
    assert all(after[name] is there[name] and torch.equal(after[name], before[name]) for name in before)
    assert "run again, differs" not in finding.evidence
    assert gradients.accumulation(trainer, pico.ragged(8)) == finding  # every split begins where the first did


def test_parts_that_do_not_sum_are_found() -> None:
    good = {"loss": 3.0, "weighted/model": 2.5, "weighted/penalty": 0.5}
    assert gradients.parts_sum([good]).passed
    assert not gradients.parts_sum([good, {**good, "loss": 3.01}]).passed
    assert not gradients.parts_sum([]).passed


@pytest.fixture
def saved(trash_artifact: Path, tmp_path: Path) -> Path:
    return solidify.save_adapter(awake(trash_artifact), tmp_path / "adapter")


def cases(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {"case": probing.probe_inputs(lookup.plain_model(model))}


def test_an_adapter_without_effect_is_found(trash_artifact: Path) -> None:
    base = solidify.load(trash_artifact)
    expected = roundtrip.outputs(base, cases(base))
    effect, off = roundtrip.adapter_effect(awake(trash_artifact), expected, cases(base))
    assert effect.passed
    assert off.passed
    fresh = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    effect, off = roundtrip.adapter_effect(fresh, expected, cases(base))
    assert not effect.passed


def headed(path: Path) -> Any:
    """Builds a model with a head of its own beside the logits."""
    model = pico.llama()
    pico.artifact(model, solidify.add(model, "value_head", wrappers.ValueHead, reads="model.norm"), path)
    return solidify.load(path)


def test_a_head_that_is_trained_alone_is_looked_at(tmp_path: Path) -> None:
    base = headed(tmp_path / "headed")
    inputs = cases(base)
    expected = roundtrip.outputs(base, inputs)
    model = solidify.attach(base, train=["value_head"])
    effect, _ = roundtrip.adapter_effect(model, expected, inputs)
    assert effect.verdict == "failed"
    head = lookup.plain_model(model).value_head
    with torch.no_grad():
        head.modules_to_save["default"].linear.weight.add_(1.0)
    effect, off = roundtrip.adapter_effect(model, expected, inputs)
    assert (effect.verdict, off.verdict) == ("proved", "proved") and "value_head moves most" in effect.evidence
    moved = roundtrip.outputs(model, inputs)
    assert roundtrip.adapter_reload(moved, roundtrip.outputs(model, inputs)).verdict == "proved"
    assert "case/value_head" in roundtrip.adapter_reload(expected, moved).evidence
    with torch.no_grad():
        head.original_module.linear.weight.add_(1.0)
    _, off = roundtrip.adapter_effect(model, expected, inputs)
    assert off.verdict == "failed" and "value_head" in off.evidence


def test_an_output_that_is_gone_did_not_come_back() -> None:
    outputs = {"case/logits": torch.ones(2), "case/value": torch.ones(2)}
    finding = roundtrip.adapter_reload(outputs, {"case/logits": torch.ones(2)})
    assert finding.verdict == "failed" and "case/value" in finding.evidence


def test_what_came_back_has_the_same_bits() -> None:
    outputs = {"case/logits": torch.tensor([float("nan"), 0.0])}
    assert roundtrip.adapter_reload(outputs, {"case/logits": torch.tensor([float("nan"), 0.0])}).verdict == "proved"
    assert roundtrip.adapter_reload(outputs, {"case/logits": torch.tensor([float("nan"), -0.0])}).verdict == "failed"


def test_an_adapter_that_cannot_be_switched_off_is_found(trash_artifact: Path) -> None:
    base = solidify.load(trash_artifact)
    expected = roundtrip.outputs(base, cases(base))
    model = awake(trash_artifact)
    with torch.no_grad():
        next(p for kind, n, p in lookup.named_parameters(model) if n == "model.norm.weight").mul_(1.01)
    _, off = roundtrip.adapter_effect(model, expected, cases(base))
    assert not off.passed


def test_a_reload_that_differs_in_one_bit_is_found() -> None:
    outputs = {"case": torch.randn(2, 3)}
    assert roundtrip.adapter_reload(outputs, {"case": outputs["case"].clone()}).passed
    other = outputs["case"].clone()
    other.view(torch.int32)[1, 2] ^= 1
    assert not roundtrip.adapter_reload(outputs, {"case": other}).passed


def test_a_loader_that_accepts_a_wrong_base_is_found(
    trash_artifact: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, record = solidify.load(trash_artifact, saved), manifest.read(saved)
    assert roundtrip.wrong_base_refused(model, record, saved).passed
    monkeypatch.setattr(storage, "refuse_wrong_base", lambda *args: None)
    finding = roundtrip.wrong_base_refused(model, record, saved)
    assert not finding.passed
    assert "accepted with another configuration, code, weights" in finding.evidence


def test_a_merge_that_touches_what_was_not_trained_is_found(trash_artifact: Path, saved: Path) -> None:
    base, adapter = manifest.read(trash_artifact), manifest.read(saved)
    merged = dict(base.tensors)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.trash.bias"):
        merged[name] = "0" * 64
    assert changes.merge_ledger(base, merged, adapter).passed
    assert not changes.merge_ledger(base, dict(base.tensors), adapter).passed
    spoiled = {**merged, "model.layers.0.self_attn.k_proj.weight": "0" * 64}
    assert "k_proj.weight changed though" in changes.merge_ledger(base, spoiled, adapter).evidence
    del spoiled["model.layers.0.self_attn.k_proj.weight"]
    assert "k_proj.weight is gone" in changes.merge_ledger(base, spoiled, adapter).evidence
