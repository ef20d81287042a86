"""The gradient of every term is the same for any split of one ragged batch, in Trainer and in SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback
from trl import SFTConfig

import solidify
from solidify import losses
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.sft import ObjectiveSFTTrainer
from solidify.training.trainer import ObjectiveTrainer
from training import LORA, Gradients, arguments, awake, distance, entropy, everything, first_token_norm, in_order, step

SPLITS = ((8, 1), (4, 2), (2, 4), (1, 8))
TOLERANCE = 5e-6  # float32 sums in another order


def penalty(model: torch.nn.Module) -> torch.Tensor:
    return sum(p.float().square().sum() for p in model.parameters() if p.requires_grad)


TERMS: dict[str, Callable[[], list[Term]]] = {
    "the model's loss": lambda: [Term("model")],
    "a user's penalty": lambda: [Term("model"), Term(penalty, 0.1)],
    "a user's token mean": lambda: [Term("model"), Term(entropy, 0.3)],
    "a user's sequence mean": lambda: [Term("model"), Term(first_token_norm, 0.1)],
    "weight penalty": lambda: [Term("model"), Term(losses.weight_penalty, 0.1)],
    "trash budget": lambda: [Term("model"), Term(losses.trash_budget, 20.0, arguments={"target": 0.3})],
    "load balance": lambda: [Term("model"), Term(losses.load_balance, 1.0)],
    "router z": lambda: [Term("model"), Term(losses.router_z, 0.1)],
    "KL to the base": lambda: [Term("model"), Term(losses.forward_kl, 1.0)],
    "KL alone": lambda: [Term(losses.forward_kl)],
    "all together": lambda: [*everything(), Term(losses.trash_controller, arguments={"target": 0.5})],
}


# The others are among "all together", and one by one in tests/test_contract.py.
FAST = ("the model's loss", "a user's sequence mean", "KL alone", "all together")


@pytest.mark.parametrize(
    "terms", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TERMS]
)
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, terms: str) -> None:
    found = {}
    for size, steps in SPLITS:
        found[size], trainer = step(awake(trash_artifact), tmp_path, size, steps, TERMS[terms])
        logs = trainer.history[-1]
        weighted = sum(value for key, value in logs.items() if key.startswith("weighted/"))
        assert logs["loss"] == pytest.approx(weighted, rel=1e-6, abs=1e-6)
        assert logs["loss"] == pytest.approx(found.setdefault("loss", logs["loss"]), rel=1e-6, abs=1e-6)
    for size, _ in SPLITS[1:]:
        assert distance(found[8], found[size]) < TOLERANCE


@pytest.mark.slow
def test_every_term_has_a_gradient_of_its_own(trash_artifact: Path, tmp_path: Path) -> None:
    """A split-invariance of zeros would prove nothing."""
    plain, _ = step(awake(trash_artifact), tmp_path, 8, 1, TERMS["the model's loss"])
    for name in set(TERMS) - {"the model's loss"}:
        other, _ = step(awake(trash_artifact), tmp_path, 8, 1, TERMS[name])
        assert distance(plain, other) > 1e-4, name


def test_the_models_loss_is_the_trainers_own(trash_artifact: Path, tmp_path: Path) -> None:
    ours, trainer = step(awake(trash_artifact), tmp_path, 2, 4, TERMS["the model's loss"])
    theirs, plain = step(awake(trash_artifact), tmp_path, 2, 4, None, trainer_class=Trainer)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert trainer.history[-1]["loss"] == plain.state.log_history[0]["loss"]


def test_terms_are_logged_by_name_as_they_are_and_weighted(trash_artifact: Path, tmp_path: Path) -> None:
    terms = lambda: [Term("model"), Term(penalty, 0.5, name="mine")]  # noqa: E731
    _, trainer = step(awake(trash_artifact), tmp_path, 4, 2, terms)
    logs = trainer.state.log_history[0]
    assert logs["term/mine"] == pytest.approx(penalty(awake(trash_artifact)).item(), rel=1e-5)
    assert logs["weighted/mine"] == pytest.approx(0.5 * logs["term/mine"])
    assert logs["term/model"] == logs["weighted/model"]


def test_evaluation_counts_the_models_loss_alone(trash_artifact: Path, tmp_path: Path) -> None:
    _, trainer = step(awake(trash_artifact), tmp_path, 4, 2, lambda: [Term("model"), Term(penalty, 100.0)])
    plain = Trainer(model=trainer.model, args=trainer.args, data_collator=pico.collate)
    data = pico.ragged(4)
    assert trainer.evaluate(data)["eval_loss"] == plain.evaluate(data)["eval_loss"]


def test_an_empty_micro_batch_adds_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    examples = pico.ragged(8)
    examples[3]["labels"] = [-100] * len(examples[3]["labels"])
    whole, _ = step(awake(trash_artifact), tmp_path, 8, 1, TERMS["all together"], examples=examples)
    split, _ = step(awake(trash_artifact), tmp_path, 1, 8, TERMS["all together"], examples=examples)
    assert all(torch.isfinite(gradient).all() for gradient in split.values())
    assert distance(whole, split) < TOLERANCE


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_no_statistic(trash_artifact: Path, tmp_path: Path, padding: str) -> None:
    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = pico.collate([*rows, {"input_ids": [5] * 40, "labels": [5] * 40}])
        batch = {key: tensor[:-1] for key, tensor in batch.items()}  # padded far beyond the longest
        if padding == "left":
            batch = {key: tensor.flip(1) for key, tensor in batch.items()}
            lengths = batch["attention_mask"].sum(1)
            for row, n in enumerate(lengths):
                for tensor in batch.values():
                    tensor[row, -n:] = tensor[row, -n:].flip(0)
        return batch

    def terms() -> list[Term]:
        return [
            Term("model", 0.0),
            Term(losses.trash_budget, 1.0, arguments={"target": 0.3}),
            Term(losses.load_balance),
            Term(losses.router_z),
        ]

    _, first = step(awake(trash_artifact), tmp_path, 8, 1, terms)
    model = awake(trash_artifact)
    trainer = ObjectiveTrainer(
        model=model, args=first.args, train_dataset=pico.ragged(8), data_collator=collate, objective=Objective(terms())
    )
    in_order(trainer)
    trainer.train()
    assert trainer.history[-1]["loss"] == pytest.approx(first.history[-1]["loss"], rel=1e-5)


def test_an_aux_loss_inside_the_model_is_scaled_too(trash_artifact: Path, tmp_path: Path) -> None:
    found = {}
    for size, steps in ((8, 1), (1, 8)):
        model = awake(trash_artifact)
        model.get_base_model().config.output_router_logits = True
        model.get_base_model().router_aux_loss_coef = 1.0
        found[size], trainer = step(model, tmp_path, size, steps, TERMS["the model's loss"])
        found[f"loss {size}"] = trainer.history[-1]["loss"]
    # transformers' balance is a statistic of the micro-batch: near, not equal. The plain Trainer is off by a factor.
    assert found["loss 1"] == pytest.approx(found["loss 8"], rel=0.05)


class KeepsAPart(torch.nn.Module):
    """Adds to the model's loss what no number of tokens divides."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.loss_type = "ForCausalLM"  # as every head of transformers has; it says that labels are shifted

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        if output.loss is not None:
            output["loss"] = output.loss + 1000.0
        return output


class IgnoresTheNumber(KeepsAPart):
    """Accepts any argument, and returns a mean whatever num_items_in_batch says."""

    def forward(self, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_a_part_of_the_models_loss_that_cannot_be_scaled_is_refused(trash_artifact: Path, tmp_path: Path) -> None:
    model = KeepsAPart(awake(trash_artifact))
    with pytest.raises(ObjectiveError, match="1000 of the model's own loss of 10"):
        step(model, tmp_path, 4, 2, TERMS["the model's loss"])


def test_a_model_that_ignores_the_number_of_tokens_is_found_out(trash_artifact: Path, tmp_path: Path) -> None:
    whole, _ = step(IgnoresTheNumber(awake(trash_artifact)), tmp_path, 8, 1, TERMS["the model's loss"])
    split, _ = step(IgnoresTheNumber(awake(trash_artifact)), tmp_path, 1, 8, TERMS["the model's loss"])
    assert distance(whole, split) < TOLERANCE
    naive, _ = step(IgnoresTheNumber(awake(trash_artifact)), tmp_path, 1, 8, None, trainer_class=Trainer)
    assert distance(whole, naive) > 3  # eight times the gradient


def test_a_second_model_serves_as_reference_where_the_change_cannot_be_switched_off(
    wrapped_artifact: Path, tmp_path: Path
) -> None:
    declared = {"lora": LORA, "train": ["**.mlp.scale"]}
    with pytest.raises(ObjectiveError, match="switching Scaled off"):
        step(awake(wrapped_artifact, **declared), tmp_path, 4, 2, TERMS["KL to the base"])
    base = pico.olmoe()
    whole, trainer = step(awake(wrapped_artifact, **declared), tmp_path, 8, 1, TERMS["KL to the base"], reference=base)
    split, _ = step(awake(wrapped_artifact, **declared), tmp_path, 2, 4, TERMS["KL to the base"], reference=base)
    assert trainer.history[-1]["term/ForwardKL"] > 0
    assert distance(whole, split) < TOLERANCE


def test_switched_off_is_the_base_bit_for_bit(trash_artifact: Path) -> None:
    from solidify.adapter.adapters import switched_off
    from solidify.model import anatomy, probing

    model = awake(trash_artifact)
    inputs = probing.probe_inputs(model.get_base_model())
    with switched_off(model):
        off = anatomy.run(model, inputs)
    assert torch.equal(off, anatomy.run(pico.olmoe(), inputs))
    assert not torch.equal(off, anatomy.run(model, inputs))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label smoothing replaces"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant activation checkpointing cuts the graph",
        ),
    ],
)
def test_settings_that_would_spoil_a_term_are_refused(
    trash_artifact: Path, tmp_path: Path, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(ObjectiveError, match=words):
        step(awake(trash_artifact), tmp_path, 4, 2, TERMS["load balance"], **more)


def test_activation_checkpointing_counts_nothing_twice(trash_artifact: Path, tmp_path: Path) -> None:
    plain, first = step(awake(trash_artifact), tmp_path, 4, 2, TERMS["all together"])
    saved, second = step(awake(trash_artifact), tmp_path, 4, 2, TERMS["all together"], activation_checkpointing=True)
    assert second.history[-1]["loss"] == pytest.approx(first.history[-1]["loss"], rel=1e-6)
    assert distance(plain, saved) < TOLERANCE


def test_the_model_must_have_what_a_term_looks_at(wrapped_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="looks into TrashCan, but the model has none"):
        step(awake(wrapped_artifact, lora=LORA), tmp_path, 4, 2, TERMS["trash budget"])


def test_the_controller_reaches_its_target_and_its_state_is_saved(trash_artifact: Path, tmp_path: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), lora=LORA, train=["**.mlp.trash"])
    terms = lambda: [Term("model"), Term(losses.trash_controller, arguments={"target": 0.6})]  # noqa: E731
    step(model, tmp_path, 8, 1, terms, max_steps=120, learning_rate=0.0, examples=pico.ragged(8))
    kept = share(model)
    assert kept == pytest.approx(0.6, abs=0.02)
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load(trash_artifact, tmp_path / "adapter")
    assert share(again) == kept
    with again.disable_adapter():
        assert share(again) == 1.0


def share(model: torch.nn.Module) -> float:
    """Returns the share of routed slots that are kept on the training examples."""
    from solidify.losses import TRASH
    from solidify.model import anatomy
    from solidify.objective.capture import capture

    batch = pico.collate(pico.ragged(8))
    with torch.no_grad(), anatomy.evaluation(model), capture(model, {"trash": TRASH}) as captured:
        model(**batch)
    mask = batch["attention_mask"].reshape(-1).bool()
    kept = [float((m[mask] >= 0).float().mean()) for m in captured["trash"].values()]
    return sum(kept) / len(kept)


def test_the_controller_refuses_to_move_what_would_not_be_saved(trash_artifact: Path, tmp_path: Path) -> None:
    model = awake(trash_artifact, lora=LORA)
    with pytest.raises(ObjectiveError, match=r"is frozen and would not be saved; name it in `adapter.train`"):
        step(model, tmp_path, 8, 1, lambda: [Term("model"), Term(losses.trash_controller, arguments={"target": 0.5})])


def test_half_precision_is_trained_in_float32_or_refused(tmp_path: Path) -> None:
    from solidify.modules.trashcan_moe import TrashCanMoE

    model = pico.olmoe(dtype=torch.bfloat16)
    edits = solidify.replace(model, "**.mlp", TrashCanMoE, arguments={"threshold": -2.0})
    pico.artifact(model, edits, tmp_path / "bf16")

    def attach() -> torch.nn.Module:
        return solidify.attach(solidify.load(tmp_path / "bf16"), lora=LORA, train=["**.mlp.trash"])

    with pytest.raises(ObjectiveError, match="would be trained in half precision"):
        step(attach(), tmp_path, 4, 2, TERMS["the model's loss"])
    model = attach()
    seen = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.update({n: p.dtype for n, p in model.named_parameters() if p.requires_grad})

    trainer = ObjectiveTrainer(
        model=model,
        args=arguments(tmp_path, 4, 2, bf16=True),
        train_dataset=pico.ragged(8),
        data_collator=pico.collate,
        objective=Objective([Term("model")]),
    )
    trainer.add_callback(Look())
    trainer.train()
    assert set(seen.values()) == {torch.float32}
    full = {n: p.dtype for n, p in model.named_parameters() if "trash.modules_to_save" in n}
    assert set(full.values()) == {torch.bfloat16}


SFT = {
    "kind": SFTConfig,
    "router_aux_loss_coef": 0.0,
    "activation_checkpointing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


@pytest.mark.parametrize("terms", ["the model's loss", "KL alone", "all together", "a user's penalty", "trash budget"])
def test_trls_trainer_gives_the_same_gradients(
    trash_artifact: Path, tiny_base: Path, tmp_path: Path, terms: str
) -> None:
    from datasets import Dataset

    def sft(size: int, steps: int) -> dict[str, torch.Tensor]:
        model = awake(trash_artifact)
        more = dict(SFT)
        trainer = ObjectiveSFTTrainer(
            model=model,
            args=arguments(tmp_path, size, steps, **more),
            train_dataset=Dataset.from_list(pico.ragged(8)),
            data_collator=pico.collate,
            processing_class=AutoTokenizer.from_pretrained(tiny_base),
            objective=Objective(TERMS[terms]()),
        )
        in_order(trainer)
        watch = Gradients(model)
        trainer.add_callback(watch)
        trainer.train()
        return watch.found

    ours, _ = step(awake(trash_artifact), tmp_path, 8, 1, TERMS[terms])  # "KL alone" asks for all logits, and no loss
    for size, steps in ((8, 1), (2, 4)):
        assert distance(ours, sft(size, steps)) < 2e-5  # TRL sums log-probabilities in chunks of its own
