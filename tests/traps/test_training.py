"""Traps of losses and trainers: each test shows the plain way failing, and ours working or refusing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from datasets import Dataset
from pico import wrappers
from torch import nn
from transformers import AutoTokenizer, OlmoeForCausalLM, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

import solidify
from solidify import losses
from solidify.checks.gradients import GradientWitness
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.sft import ObjectiveSFTTrainer
from training import LORA, Gradients, arguments, awake, distance, in_order, step

pytestmark = pytest.mark.slow


def penalty(model: nn.Module) -> torch.Tensor:
    return sum(p.square().sum() for p in model.parameters() if p.requires_grad)


class OldSignature(Trainer):
    """The seed's compute_loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        return model(**inputs).loss


class Plain(Trainer):
    """The same with the argument that today's Trainer passes."""

    weight = 0.0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + self.weight * penalty(model)
        return (loss, outputs) if return_outputs else loss


class PlainWithItems(Plain):
    """Passes the number of items on, so that the model's loss is right; the penalty is not."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs, num_items_in_batch=num_items_in_batch).loss + self.weight * penalty(model)


class OnlyPenalty(Plain):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return 0.0 * model(**inputs).loss + penalty(model)


def test_the_old_signature_raises(trash_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="num_items_in_batch"):
        step(awake(trash_artifact), tmp_path, 4, 2, None, trainer_class=OldSignature)

    gradients, _ = step(awake(trash_artifact), tmp_path, 4, 2, lambda: [Term("model")])
    assert gradients


def ratio(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Returns the factor between two gradients."""
    x, y = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (a, b))
    return float((x * y).sum() / (y * y).sum())


@pytest.mark.parametrize("steps", [4, 8])
def test_the_whole_loss_is_multiplied_by_the_accumulation_steps(
    trash_artifact: Path, tmp_path: Path, steps: int
) -> None:
    whole, _ = step(awake(trash_artifact), tmp_path, 8, 1, None, trainer_class=Plain)
    split, _ = step(awake(trash_artifact), tmp_path, 8 // steps, steps, None, trainer_class=Plain)
    assert ratio(split, whole) > 0.8 * steps

    ours, _ = step(awake(trash_artifact), tmp_path, 8 // steps, steps, lambda: [Term("model")])
    right, _ = step(awake(trash_artifact), tmp_path, 8, 1, lambda: [Term("model")])
    assert ratio(ours, right) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("cls", [OnlyPenalty, PlainWithItems])
def test_a_regulariser_is_multiplied_even_where_the_loss_is_right(
    trash_artifact: Path, tmp_path: Path, cls: type[Plain]
) -> None:
    cls.weight = 1.0
    whole, _ = step(awake(trash_artifact), tmp_path, 8, 1, None, trainer_class=cls)
    split, _ = step(awake(trash_artifact), tmp_path, 1, 8, None, trainer_class=cls)
    if cls is OnlyPenalty:
        assert ratio(split, whole) == pytest.approx(8.0, rel=1e-3)
    else:
        assert distance(whole, split) > 0.1

    def terms() -> list[Term]:
        return [Term("model"), Term(penalty)]

    ours, _ = step(awake(trash_artifact), tmp_path, 1, 8, terms)
    right, _ = step(awake(trash_artifact), tmp_path, 8, 1, terms)
    assert distance(right, ours) < 5e-6


def with_aux(artifact: Path) -> nn.Module:
    model = awake(artifact)
    model.get_base_model().config.output_router_logits = True
    model.get_base_model().router_aux_loss_coef = 1.0
    return model


def test_an_auxiliary_loss_inside_the_model_is_multiplied_too(trash_artifact: Path, tmp_path: Path) -> None:
    plain = {}
    for size, steps in ((8, 1), (1, 8)):
        _, trainer = step(with_aux(trash_artifact), tmp_path, size, steps, None, trainer_class=Trainer)
        _, without = step(awake(trash_artifact), tmp_path, size, steps, None, trainer_class=Trainer)
        plain[size] = trainer.state.log_history[0]["loss"] - without.state.log_history[0]["loss"]
    assert plain[1] / plain[8] > 7  # the balance of one sequence is worse than that of eight, so not exactly eight

    ours = {}
    for size, steps in ((8, 1), (1, 8)):
        _, trainer = step(with_aux(trash_artifact), tmp_path, size, steps, lambda: [Term("model")])
        _, without = step(awake(trash_artifact), tmp_path, size, steps, lambda: [Term("model")])
        ours[size] = trainer.history[0]["loss"] - without.history[0]["loss"]
    assert 1 <= ours[1] / ours[8] < 1.3


def test_evaluation_counts_the_regulariser(trash_artifact: Path, tmp_path: Path) -> None:
    Plain.weight = 100.0
    _, plain = step(awake(trash_artifact), tmp_path, 4, 1, None, trainer_class=Plain)
    data = pico.ragged(4)
    bare = Trainer(model=plain.model, args=plain.args, data_collator=pico.collate).evaluate(data)["eval_loss"]
    assert plain.evaluate(data)["eval_loss"] > 2 * bare

    _, ours = step(awake(trash_artifact), tmp_path, 4, 1, lambda: [Term("model"), Term(penalty, 100.0)])
    bare = Trainer(model=ours.model, args=ours.args, data_collator=pico.collate).evaluate(data)["eval_loss"]
    assert ours.evaluate(data)["eval_loss"] == bare


class AddsInForward(OlmoeForCausalLM):
    """A composite loss in the model's forward."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            AddsInForward.calls += 1
            output.loss = output.loss + 1000.0
        return output


def sft(model: nn.Module, directory: Path, base: Path, cls: type = SFTTrainer, **more: Any) -> Any:
    values = {"dataset_kwargs": {"skip_prepare_dataset": True}, "activation_checkpointing": False}
    options = {"objective": more.pop("objective")} if "objective" in more else {}
    trainer = cls(
        model=model,
        args=arguments(directory, 4, 2, SFTConfig, **{**values, **more}),
        train_dataset=Dataset.from_list(pico.ragged(8)),
        data_collator=pico.collate,
        processing_class=AutoTokenizer.from_pretrained(base),
        **options,
    )
    in_order(trainer)
    return trainer


def test_trls_trainer_never_calls_the_models_forward(trash_artifact: Path, tiny_base: Path, tmp_path: Path) -> None:
    model = AddsInForward(pico.olmoe().config)
    trainer = sft(model, tmp_path, tiny_base, router_aux_loss_coef=0.0)
    trainer.train()
    assert AddsInForward.calls == 0
    assert trainer.state.log_history[0]["loss"] < 100  # the thousand is nowhere

    objective = Objective([Term("model"), Term(penalty, 0.5, name="mine")])
    ours = sft(
        awake(trash_artifact), tmp_path, tiny_base, ObjectiveSFTTrainer, router_aux_loss_coef=0.0, objective=objective
    )
    ours.train()
    assert ours.history[0]["weighted/mine"] > 0
    assert ours.history[0]["loss"] == pytest.approx(
        ours.history[0]["weighted/model"] + ours.history[0]["weighted/mine"], rel=1e-6
    )


def test_trls_trainer_asks_for_router_logits_that_are_not_there(tiny_base: Path, tmp_path: Path) -> None:
    def routerless() -> nn.Module:
        model = pico.olmoe()
        for layer in model.model.layers:
            layer.mlp = wrappers.PlainMLP(model.config)
        return model

    with pytest.raises(IndexError):
        sft(routerless(), tmp_path, tiny_base).train()

    from solidify.recipe import schema, trainers

    loaded = schema.load(Path(__file__).parents[2] / "examples" / "side_path.yaml")
    assert trainers.training_arguments(loaded, tmp_path).router_aux_loss_coef == 0.0


@pytest.mark.parametrize("words", [{"tokenizer": None}, {"dataset_text_field": "text"}, {"max_seq_length": 64}])
def test_trls_trainer_no_longer_takes_what_recipes_pass(tmp_path: Path, words: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        SFTTrainer(model=pico.olmoe(), args=arguments(tmp_path, 4, 1, SFTConfig), **words)

    from solidify.recipe import schema, trainers

    loaded = schema.load(Path(__file__).parents[2] / "examples" / "side_path.yaml")
    made = trainers.training_arguments(loaded, tmp_path)
    assert (made.max_length, made.dataset_text_field) == (128, "text")


def test_reentrant_checkpointing_cuts_the_gradient_of_what_a_loss_looks_at(
    trash_artifact: Path, tmp_path: Path
) -> None:
    model = pico.olmoe().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(input_ids=pico.tokens(), output_router_logits=True, use_cache=False)
    assert not output.aux_loss.requires_grad

    more = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ObjectiveError, match="cuts the graph"):
        step(awake(trash_artifact), tmp_path, 4, 2, lambda: [Term("model"), Term(losses.load_balance)], **more)


def test_gradients_are_gone_when_the_step_has_ended(trash_artifact: Path, tmp_path: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    late: list[Any] = []

    class Late(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            late.extend(p.grad for p in model.parameters() if p.requires_grad)

    witness = GradientWitness(model)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, 4, 1, max_steps=2),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        callbacks=[Late(), witness],
    )
    trainer.train()
    assert late
    assert all(gradient is None for gradient in late)

    assert witness.finding().passed


def test_a_gradient_that_is_not_none_may_be_zero_everywhere(tmp_path: Path) -> None:
    model = pico.olmoe()
    solidify.replace(model, "model.layers.0.mlp", wrappers.Saturated)
    peft_model = solidify.attach(model, lora=LORA, train=["model.layers.0.mlp.gate"])
    witness, watch = GradientWitness(peft_model), Gradients(peft_model)
    trainer = Trainer(
        model=peft_model,
        args=arguments(tmp_path, 4, 1, max_steps=4),  # the first steps move what starts at zero; FEW of them tell
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        callbacks=[watch, witness],
    )
    trainer.train()
    gate = next(gradient for name, gradient in watch.found.items() if name.endswith("mlp.gate"))
    assert gate is not None  # what the usual checklist looks at
    assert not gate.any()

    assert "never has a gradient: model.layers.*.mlp.gate" in witness.finding().evidence


def test_half_precision_loses_small_updates(tmp_path: Path) -> None:
    model = pico.olmoe(dtype=torch.bfloat16)
    weight = nn.Parameter(model.model.layers[0].mlp.gate.weight.detach().clone())
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    assert float((weight != before).float().mean()) < 0.5  # most of the training did not happen

    peft_model = solidify.attach(model, train=["model.layers.0.mlp.gate"])
    with pytest.raises(ObjectiveError, match="where small updates are lost to rounding; set bf16: true"):
        step(peft_model, tmp_path, 4, 2, lambda: [Term("model")])


def test_averaging_over_layers_first_hides_their_collapse() -> None:
    """The test of the load balance shows it: tests/test_losses.py, with transformers' own function beside ours."""
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    collapsed = []
    for layer in range(4):
        row = torch.full((16, 8), -20.0)
        row[:, [2 * layer, 2 * layer + 1]] = 0.0
        collapsed.append(row)
    assert float(load_balancing_loss_func(tuple(collapsed), 8, 2)) == pytest.approx(2.0, rel=1e-3)

    outputs = {f"{i}.gate": (row, *row.softmax(-1).topk(2)) for i, row in enumerate(collapsed)}
    term = losses.load_balance()
    assert float(term.value(term.statistics(router=outputs, trash={}, mask=torch.ones(16)) / 16)) > 3.9


def test_trls_trainer_takes_a_peft_model_or_a_peft_configuration_not_both(
    trash_artifact: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    model = solidify.attach(solidify.load(trash_artifact), lora=LORA)
    with pytest.raises(ValueError, match="together with a"):
        SFTTrainer(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(tiny_base),
            args=arguments(tmp_path, 4, 1, SFTConfig),
            train_dataset=Dataset.from_list(pico.ragged(8)),
            peft_config=LoraConfig(target_modules=["q_proj"]),
        )
