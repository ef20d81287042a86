"""Through the real trainer: the gradient of every term is the same for any split of one ragged batch, and its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from datasets import Dataset

import solidify
from solidify import losses
from solidify.objective.objective import Term
from solidify.training.trainer import ObjectiveTrainer
from training import LORA, TRAIN, awake, distance, step

SPLITS = ((8, 1), (2, 4), (1, 8))
TOLERANCE = 5e-6  # float32 sums in another order

Q = "model.layers.*.self_attn.q_proj"
ACTIVE = "model.layers.*.mlp"


def term(name: str, weight: float = 1.0, **arguments: Any) -> Callable[[], list[Term]]:
    return lambda: [Term("model"), Term(getattr(losses, name), weight, arguments=arguments)]


TERMS: dict[str, Callable[[], list[Term]]] = {
    "next token": lambda: [Term(losses.next_token, arguments={"chunk": 7})],
    "smoothed next token": lambda: [Term(losses.next_token, arguments={"chunk": 7, "label_smoothing": 0.2})],
    "forward KL": term("forward_kl", temperature=2.0),
    "reverse KL": term("reverse_kl"),
    "JSD": term("jensen_shannon", 5.0, beta=0.3),
    "continuous JSD": term("jensen_shannon_continuous", 5.0, beta=0.3),
    "chunked distillation": term("chunked_distillation", 1.0, divergence="reverse_kl", chunk=7),
    "hidden match": term("hidden_match", 0.1, layers="model.layers.*", cosine=0.5),
    "activation sparsity": term("activation_sparsity", 1.0, modules=ACTIVE),
    "Hoyer": term("activation_sparsity", 1.0, modules=ACTIVE, kind="hoyer"),
    "output entropy": term("output_entropy", 0.5),
    "router entropy": term("router_entropy", 1.0),
    "router entropy up": term("router_entropy", 1.0, direction="spread"),
    "router information": term("router_mutual_information", 1.0),
    "null experts": term("load_balance", 1.0, null_experts=2),
    "beta prior": term("beta_prior", 5.0, target=0.3, concentration=2.0),
    "group lasso": term("group_lasso", 0.1),
    "orthogonality": term("orthogonality", 0.1, parameters=Q),
    "spectral": term("spectral", 0.1, parameters=Q),
    "L2-SP": term("l2_sp", 1.0),
}


GROUPS = {
    "towards a reference": [
        "forward KL",
        "reverse KL",
        "JSD",
        "continuous JSD",
        "chunked distillation",
        "hidden match",
    ],
    "of what is computed": [
        "next token",
        "output entropy",
        "hidden match",
        "activation sparsity",
        "Hoyer",
        "beta prior",
    ],
    "of routers": ["router entropy", "router entropy up", "router information", "null experts"],
    "of weights": ["group lasso", "orthogonality", "spectral", "L2-SP"],
}


def together(names: list[str]) -> Callable[[], list[Term]]:
    """One objective of the last terms of several, by names of their own."""

    def terms() -> list[Term]:
        found = [TERMS[name]()[-1] for name in names]
        for name, each in zip(names, found, strict=True):
            each.name = name
        return found

    return terms


@pytest.mark.parametrize("group", GROUPS)
def test_the_gradients_of_many_do_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, group: str) -> None:
    terms = together(GROUPS[group])
    whole, first = step(awake(trash_artifact), tmp_path, 8, 1, terms)
    split, second = step(awake(trash_artifact), tmp_path, 1, 8, terms)
    assert distance(whole, split) < TOLERANCE
    for name in GROUPS[group]:
        value = first.history[-1][f"term/{name}"]
        assert value
        assert second.history[-1][f"term/{name}"] == pytest.approx(value, rel=1e-3)  # near 0, of float32 numbers near 5


@pytest.mark.slow
@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_does_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path, name: str) -> None:
    found: dict[Any, Any] = {}
    for size, steps in SPLITS:
        found[size], trainer = step(awake(trash_artifact), tmp_path, size, steps, TERMS[name])
        logs = trainer.history[-1]
        assert logs["loss"] == pytest.approx(found.setdefault("loss", logs["loss"]), rel=2e-6, abs=1e-6)
    for size, _ in SPLITS[1:]:
        assert distance(found[8], found[size]) < TOLERANCE
    if name != "next token":
        plain, _ = step(awake(trash_artifact), tmp_path, 8, 1, lambda: [Term("model")])
        assert distance(plain, found[8]) > 1e-4  # a split invariance of zeros would prove nothing


def test_the_chunked_loss_is_the_models_own_in_value_and_gradient(trash_artifact: Path, tmp_path: Path) -> None:
    """Also where the head is trained: as a LoRA update, and in full."""
    declared = (
        {"lora": LORA, "train": TRAIN},
        {"lora": {"r": 4, "target_modules": ["lm_head", "**.q_proj"]}, "train": TRAIN},
        {"lora": LORA, "train": [*TRAIN, "lm_head"]},
        {"lora": LORA, "train": [*TRAIN, "lm_head.weight"]},
    )
    for each in declared:
        own, first = step(awake(trash_artifact, **each), tmp_path, 2, 4, lambda: [Term("model")])
        ours, second = step(awake(trash_artifact, **each), tmp_path, 2, 4, TERMS["next token"])
        assert second.history[-1]["loss"] == pytest.approx(first.history[-1]["loss"], rel=1e-6)
        assert own.keys() == ours.keys()
        assert distance(own, ours) < TOLERANCE
        assert sum("lm_head" in name for name in ours) == (0, 2, 1, 1)[declared.index(each)]


class Paired(ObjectiveTrainer):
    """Lays out examples that are pairs as TRL's preference collator does: chosen rows first."""

    def __init__(self, *args: Any, data_collator: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=pairs, **kwargs)


def pairs(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return pico.collate([row[key] for key in ("chosen", "rejected") for row in rows])


def test_preferences_do_not_depend_on_the_split(trash_artifact: Path, tmp_path: Path) -> None:
    rows = pico.ragged(16)
    examples = [{"chosen": a, "rejected": b} for a, b in zip(rows[:8], rows[8:], strict=True)]
    terms = lambda: [Term(losses.dpo, arguments={"beta": 0.5})]  # noqa: E731
    found = {}
    for size, steps in SPLITS:
        found[size], trainer = step(
            awake(trash_artifact), tmp_path, size, steps, terms, trainer_class=Paired, examples=examples
        )
        assert trainer.history[-1]["loss"] == pytest.approx(found.setdefault("loss", trainer.history[-1]["loss"]))
    for size, _ in SPLITS[1:]:
        assert distance(found[8], found[size]) < TOLERANCE
    fresh = solidify.attach(solidify.load(trash_artifact), lora=LORA, train=TRAIN)
    gradients, trainer = step(fresh, tmp_path, 2, 4, terms, trainer_class=Paired, examples=examples)
    assert trainer.history[-1]["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
    assert any(bool(gradient.any()) for gradient in gradients.values())


def test_a_teachers_columns_go_through_the_trainer(trash_artifact: Path, tmp_path: Path) -> None:
    teacher = pico.olmoe(seed=5)
    columns = losses.teacher_columns(teacher, Dataset.from_list(pico.ragged(8)), pico.collate, pico.SIZES["vocab_size"])

    class Taught(ObjectiveTrainer):
        def __init__(self, *args: Any, data_collator: Any, **kwargs: Any) -> None:
            super().__init__(*args, data_collator=losses.with_teacher_columns(pico.collate), **kwargs)

    cached = lambda: [Term(losses.cached_kl)]  # noqa: E731
    exact, first = step(
        awake(trash_artifact), tmp_path, 8, 1, lambda: [Term(losses.forward_kl)], reference=teacher.float()
    )
    found = {}
    for size, steps in SPLITS:
        found[size], trainer = step(
            awake(trash_artifact), tmp_path, size, steps, cached, trainer_class=Taught, examples=list(columns)
        )
        assert trainer.history[-1]["loss"] == pytest.approx(first.history[-1]["loss"], rel=1e-5)
        assert distance(exact, found[size]) < 1e-5


def test_the_thresholds_that_a_controller_wakes_to_do_not_depend_on_the_split(
    trash_artifact: Path, tmp_path: Path
) -> None:
    woken = {}
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        model = solidify.attach(solidify.load(trash_artifact), lora=LORA, train=TRAIN)
        terms = lambda: [Term("model"), Term(losses.trash_controller, arguments={"target": 0.5, "start": 0.2})]  # noqa: E731
        step(model, tmp_path, size, steps, terms)
        woken[size] = [float(b) for n, b in model.named_buffers() if n.endswith("modules_to_save.default.bias")]
    assert len(woken[8]) == 2
    assert all(-20 < threshold < 0 for threshold in woken[8])
    assert woken[8] == woken[4] == woken[1]  # bit for bit
