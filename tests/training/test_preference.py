"""TRL's preference loss among other terms: one gradient for any split of the pairs, and the reference that TRL means.

Run by itself (under torchrun) it takes one step and writes the gradients.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer

import solidify
from solidify import losses
from solidify.errors import DataError, ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training.batching import GroupedSampler
from solidify.training.preference import ObjectiveDPOTrainer
from training import (
    LORA,
    TRAIN,
    Step,
    arguments,
    assert_alike,
    assert_any_split,
    awake,
    distance,
    entropy,
    everything,
    first_token_norm,
    in_order,
    in_processes,
    pairs,
    take,
)

SPLITS = ((1, 8), (4, 2), (8, 1), (3, 3))  # the last with a smaller last micro-batch: 3, 3 and 2 pairs
TOLERANCE = 5e-6  # float32 sums in another order


def step(*args: Any, **more: Any) -> Step:
    """Takes one optimizer step over 8 pairs; returns gradients and the trainer."""
    return take(prepared(*args, **more))


def prepared(
    model: torch.nn.Module,
    directory: Path,
    size: int,
    steps: int,
    terms: Callable[[], list[Term]] | None,
    *,
    kind: type = ObjectiveDPOTrainer,
    reference: Any = None,
    groups: Any = (),
    group_by: Any = (),
    **more: Any,
) -> Any:
    settings = {"router_aux_loss_coef": 0.0, "activation_checkpointing": False, **more}
    trainer = kind(
        model,
        reference,
        args=arguments(directory, size, steps, kind=DPOConfig, **settings),
        train_dataset=pairs(),
        processing_class=contract.tokenizer(),
        **({"objective": Objective(terms()), "parameter_groups": groups, "group_by": group_by} if terms else {}),
    )
    in_order(trainer)
    return trainer


TERMS: dict[str, Callable[[], list[Term]]] = {
    "the preference loss": lambda: [Term("model")],
    "weight penalty": lambda: [Term("model"), Term(losses.weight_penalty, 0.1)],
    "load balance": lambda: [Term("model"), Term(losses.load_balance, 0.1)],
    "router z": lambda: [Term("model"), Term(losses.router_z, 0.01)],
    "KL to the base": lambda: [Term("model"), Term(losses.forward_kl)],
    "a token mean": lambda: [Term("model"), Term(entropy, 0.3)],
    "a sequence mean": lambda: [Term("model"), Term(first_token_norm, 0.1)],
    "from hidden states": lambda: [Term("model"), Term(losses.chunked_distillation, arguments={"chunk": 5})],
    "no preference loss": lambda: [Term(losses.forward_kl), Term(losses.load_balance, 0.1)],
    "all together": everything,
}


# One by one the terms take more than half a minute; together they are split just so.
FAST = ("all together",)


@pytest.mark.parametrize("terms", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in TERMS])
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, terms: str) -> None:
    found: dict[int, Any] = {}

    def split(size: int, steps: int) -> Step:
        found[size], trainer = step(awake(trash_artifact), tmp_path, size, steps, TERMS[terms])
        return found[size], trainer

    assert_any_split(split, SPLITS, TOLERANCE)
    if terms != "the preference loss":  # the same for any split, and not because there is nothing
        plain, _ = step(awake(trash_artifact), tmp_path, 8, 1, TERMS["the preference loss"])
        assert distance(plain, found[8]) > 1e-3


KINDS: list[dict[str, Any]] = [
    {},
    {"loss_type": ["sigmoid_norm", "bco_pair"], "loss_weights": [0.6, 0.3]},
    {"loss_type": ["ipo"]},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    {"f_divergence_type": "js_divergence"},
]


@pytest.mark.parametrize("more", [KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])], ids=str)
def test_the_loss_is_trls_own_in_one_micro_batch(trash_artifact: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """Bit for bit, against a model of its own as reference; and that for any split, in all of TRL's variants."""
    model, reference = TERMS["the preference loss"], pico.olmoe(seed=5)
    ours, trainer = step(awake(trash_artifact), tmp_path, 8, 1, model, reference=reference, **more)
    theirs, plain = step(awake(trash_artifact), tmp_path, 8, 1, None, kind=DPOTrainer, reference=reference, **more)
    assert trainer.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    split, _ = step(awake(trash_artifact), tmp_path, 3, 3, model, reference=reference, **more)
    assert distance(ours, split) < TOLERANCE


def test_the_loss_is_that_of_the_paper(trash_artifact: Path, tmp_path: Path) -> None:
    """Against float64: -log sigmoid(beta * difference of log-ratios), mean over pairs, the adapter's start as π⁰."""
    model = awake(trash_artifact)
    trainer = prepared(model, tmp_path, 3, 3, TERMS["the preference loss"], beta=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))  # away from the start, so that it is not log 2
    start, moved = awake(trash_artifact).train(), model.train()
    batch = trainer.data_collator([trainer.train_dataset[place] for place in range(8)])
    ids, where = batch["input_ids"], batch["completion_mask"][:, 1:]

    def log_probabilities(of: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            logits = of(input_ids=ids, attention_mask=batch["attention_mask"]).logits.double()[:, :-1]
        return (torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0] * where).sum(1)

    chosen, rejected = (log_probabilities(moved) - log_probabilities(start)).chunk(2)
    expected = float(-F.logsigmoid(0.3 * (chosen - rejected)).mean())
    trainer.train()
    assert abs(expected - math.log(2)) > 1e-3
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_the_plain_trainer_is_off_where_the_last_micro_batch_is_smaller(trash_artifact: Path, tmp_path: Path) -> None:
    declared = {"lora": LORA}
    whole, _ = step(awake(trash_artifact, **declared), tmp_path, 8, 1, None, kind=DPOTrainer)
    even, _ = step(awake(trash_artifact, **declared), tmp_path, 4, 2, None, kind=DPOTrainer)
    uneven, _ = step(awake(trash_artifact, **declared), tmp_path, 3, 3, None, kind=DPOTrainer)
    ours, _ = step(awake(trash_artifact, **declared), tmp_path, 3, 3, TERMS["the preference loss"])
    assert distance(whole, even) < TOLERANCE
    assert distance(whole, uneven) > 0.1
    assert distance(whole, ours) < TOLERANCE


@pytest.mark.slow
def test_the_loss_begins_at_log_2_where_trls_copy_of_the_adapter_is_incomplete(
    trash_artifact: Path, tmp_path: Path
) -> None:
    ways: list[dict[str, Any]] = [{"lora": LORA, "train": TRAIN}, {"lora": LORA, "train": ["**.mlp.gate.weight"]}]
    for declared in ways:
        _, ours = step(awake(trash_artifact, **declared), tmp_path, 4, 2, TERMS["the preference loss"])
        assert ours.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
        _, plain = step(awake(trash_artifact, **declared), tmp_path, 4, 2, None, kind=DPOTrainer)
        assert abs(plain.state.log_history[0]["loss"] - math.log(2)) > 1e-4
        _, precomputed = step(
            awake(trash_artifact, **declared), tmp_path, 4, 2, TERMS["KL to the base"], precompute_ref_log_probs=True
        )
        assert precomputed.state.log_history[0]["term/model"] == pytest.approx(math.log(2), rel=1e-6)


def test_what_is_frozen_inside_a_trained_copy_stays_frozen(trash_artifact: Path, tmp_path: Path) -> None:
    def frozen(kind: type, terms: Any) -> bool:
        model = awake(trash_artifact, train=["model.layers.0.self_attn"])
        inside = next(p for n, p in model.named_parameters() if "default" in n and n.endswith("k_norm.weight"))
        inside.requires_grad_(False)
        _, trainer = step(model, tmp_path, 4, 2, terms, kind=kind)
        trainer.evaluate(pairs(2))
        return not inside.requires_grad

    assert frozen(ObjectiveDPOTrainer, TERMS["KL to the base"])
    assert not frozen(DPOTrainer, None)


@pytest.mark.parametrize("kinds", [pytest.param(["sft"], marks=pytest.mark.slow), ["sigmoid", "sft"]], ids=str)
def test_a_mean_over_tokens_counts_by_tokens(trash_artifact: Path, tmp_path: Path, kinds: list[str]) -> None:
    more = {"loss_type": kinds, "loss_weights": [0.7, 0.4][: len(kinds)]}
    whole, first = step(awake(trash_artifact, lora=LORA), tmp_path, 8, 1, None, kind=DPOTrainer, **more)
    for size, steps in ((1, 8), (3, 3)):
        model = awake(trash_artifact, lora=LORA)
        split, trainer = step(model, tmp_path, size, steps, TERMS["the preference loss"], **more)
        assert distance(whole, split) < TOLERANCE
        assert trainer.state.log_history[0]["loss"] == pytest.approx(first.state.log_history[0]["loss"], rel=1e-6)
        assert trainer.loss_weights == more["loss_weights"]
    plain, _ = step(awake(trash_artifact, lora=LORA), tmp_path, 4, 2, None, kind=DPOTrainer, **more)
    assert distance(whole, plain) > 1e-2


@pytest.mark.parametrize(
    ("more", "terms", "words"),
    [
        ({"router_aux_loss_coef": 0.01}, "the preference loss", "set it to 0.0 and add the term load_balance"),
        ({"router_aux_loss_coef": None}, "the preference loss", "router_aux_loss_coef is 0.01"),
        ({"loss_type": ["aot"]}, "the preference loss", "sorts the pairs of each micro-batch"),
        ({"loss_type": ["sigmoid", "aot_unpaired"]}, "the preference loss", "loss_type 'aot_unpaired' sorts"),
        ({"loss_type": ["sft"], "use_weighting": True}, "the preference loss", "use_weighting weights pairs"),
        ({}, "outputs", "a term asks for outputs"),
    ],
)
def test_what_depends_on_the_split_is_refused(
    trash_artifact: Path, tmp_path: Path, more: dict[str, Any], terms: str, words: str
) -> None:
    def of_outputs(outputs: Any) -> torch.Tensor:
        return outputs.logits.sum()

    asking = {**TERMS, "outputs": lambda: [Term("model"), Term(of_outputs)]}
    with pytest.raises(ObjectiveError, match=words):
        prepared(awake(trash_artifact), tmp_path, 4, 2, asking[terms], **more)


def test_an_adapter_that_trl_would_not_find_is_refused(trash_artifact: Path, tmp_path: Path) -> None:
    other = solidify.attach(solidify.load(trash_artifact), lora=LORA, name="other")
    with pytest.raises(ObjectiveError, match="but the model has other, active: other"):
        prepared(other, tmp_path, 4, 2, TERMS["the preference loss"])
    model = awake(trash_artifact)
    prepared(model, tmp_path, 4, 2, TERMS["the preference loss"])
    with pytest.raises(ObjectiveError, match=r"take an older copy off with model.delete_adapter\('ref'\)"):
        prepared(model, tmp_path, 4, 2, TERMS["the preference loss"])
    model.delete_adapter("ref")
    _, again = step(model, tmp_path, 4, 2, TERMS["the preference loss"])
    assert again.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_evaluation_is_trls_own(trash_artifact: Path, tmp_path: Path) -> None:
    trainer = prepared(awake(trash_artifact), tmp_path, 4, 2, TERMS["all together"])
    assert trainer.evaluate(pairs(4))["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)


# TRL 1.16 switches checkpointing off and on by transformers' old names.
def test_activation_checkpointing_changes_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    plain = step(awake(trash_artifact), tmp_path, 3, 3, TERMS["all together"])
    saved = step(awake(trash_artifact), tmp_path, 3, 3, TERMS["all together"], activation_checkpointing=True)
    assert_alike(plain, saved, TOLERANCE)


def test_a_resumed_training_keeps_its_reference(trash_artifact: Path, tmp_path: Path) -> None:
    """The second one starts from another adapter: what it goes on from, and its reference, are the checkpoint's."""
    more = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}
    whole = prepared(awake(trash_artifact), tmp_path / "whole", 2, 2, TERMS["all together"], **more)
    whole.train()
    other = solidify.attach(solidify.load(trash_artifact), lora=LORA, train=TRAIN)
    resumed = prepared(other, tmp_path / "resumed", 2, 2, TERMS["all together"], **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    start, end = (expected[n] for n in sorted(n for n in expected if "layers.0" in n and "lora_A" in n))
    assert not torch.equal(start, end)


def test_what_was_trained_is_saved_without_the_copy(trash_artifact: Path, tmp_path: Path) -> None:
    model = awake(trash_artifact)
    step(model, tmp_path, 4, 2, TERMS["all together"], learning_rate=0.05)
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load(trash_artifact, tmp_path / "adapter")
    assert list(again.peft_config) == ["default"]
    ids = pico.tokens()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(trash_artifact: Path, tmp_path: Path) -> None:
    in_processes(__file__, trash_artifact, tmp_path)
    one, two = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert float(two.pop("loss")) == pytest.approx(float(one.pop("loss")), rel=1e-6)
    assert distance(one, two) < TOLERANCE


def test_parameter_groups_are_for_this_trainer_too(trash_artifact: Path, tmp_path: Path) -> None:
    groups = [{"parameters": "**.mlp.trash", "learning_rate": 0.25}]
    trainer = prepared(awake(trash_artifact), tmp_path, 4, 2, TERMS["the preference loss"], groups=groups)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate/**.mlp.trash"] == 0.25


def test_pairs_are_grouped_by_the_length_of_the_longer_answer(trash_artifact: Path, tmp_path: Path) -> None:
    model, terms = awake(trash_artifact), TERMS["the preference loss"]
    trainer = prepared(model, tmp_path, 2, 2, terms, group_by=("length",))
    del trainer._get_train_sampler  # which reads the pairs in their order
    sampler = trainer._get_train_sampler()
    rows = trainer.train_dataset
    assert isinstance(sampler, GroupedSampler)
    assert sampler.lengths == [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(DataError, match="cannot be grouped: they have no column for anything other than text"):
        prepared(awake(trash_artifact), tmp_path, 2, 2, terms, group_by=("modality",))


def main() -> None:
    """Takes one step; the first process writes its gradients."""
    artifact, directory, size, steps = sys.argv[1:5]
    found, trainer = step(awake(Path(artifact)), Path(directory), int(size), int(steps), TERMS["all together"])
    if trainer.accelerator.is_main_process:
        found["loss"] = torch.tensor(trainer.state.log_history[0]["loss"])
        save_file(found, Path(directory) / f"{trainer.accelerator.num_processes}.safetensors")


if __name__ == "__main__":
    main()
