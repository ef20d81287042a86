"""Parts of what is trained have learning rates and optimizer settings of their own, found by plain names under PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from transformers import Trainer

import solidify
from solidify.adapter import lookup
from solidify.errors import ObjectiveError
from solidify.objective.objective import Objective, Term
from solidify.training import groups
from solidify.training.groups import ParameterGroup
from solidify.training.trainer import ObjectiveTrainer
from training import Gradients, arguments, in_order

MLP, QUERIES, NORMS = "model.layers.1.mlp", "model.layers.*.self_attn.q_proj", "**.input_layernorm.weight"
PAIR = [
    {"parameters": MLP, "learning_rate": 2e-2, "weight_decay": 0.0},
    {"parameters": [NORMS, "model.layers.0.**.q_proj"], "learning_rate": 5e-3},
]


def attached() -> Any:
    """LoRA on the queries, one MLP in full as PEFT's copy, norms in full as single parameters."""
    torch.manual_seed(1)
    lora = {"r": 2, "target_modules": [QUERIES], "init_lora_weights": False}
    return solidify.attach(pico.llama(tie_word_embeddings=False), lora=lora, train=[MLP, NORMS])


def trainer(model: Any, directory: Path, declared: Any = (), *, kind: Any = ObjectiveTrainer, **more: Any) -> Any:
    own = {key: more.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in more}
    objective = {"objective": Objective([Term("model")])} if issubclass(kind, ObjectiveTrainer) else {}
    made = kind(
        model=model,
        args=arguments(directory, 4, 2, **{"learning_rate": 1e-3, "weight_decay": 0.1, **more}),
        train_dataset=pico.ragged(16),
        data_collator=pico.collate,
        **({"parameter_groups": declared} if issubclass(kind, ObjectiveTrainer) else {}),
        **objective,
        **own,
    )
    in_order(made)
    return made


def names_of(model: Any) -> dict[int, str]:
    return {id(p): name for _, name, p in lookup.named_parameters(model) if p.requires_grad}


# What goes wrong without.


def test_a_plain_name_finds_nothing_under_peft() -> None:
    """So a projector's group stays empty, and it is trained with the learning rate of the rest."""
    model = attached()
    by_start = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(MLP)]
    assert by_start == []
    by_part = [name for name, _ in model.named_parameters() if MLP in name]
    assert len(by_part) == 6  # of which three are PEFT's frozen originals
    assert len(groups.resolve(model, [ParameterGroup(MLP, 1.0)])[0]) == 3


def test_torch_keeps_a_setting_that_it_does_not_know_and_ignores_it() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [weight], "learning_rate": 100.0}], lr=0.5)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "momentum": -3.0})  # nor judges this
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == 0.5


def test_an_optimizer_that_was_made_before_the_adapter_trains_nothing(tmp_path: Path) -> None:
    model = pico.llama()
    optimizer = torch.optim.SGD(model.get_submodule(MLP).parameters(), lr=1.0)
    peft_model = solidify.attach(model, train=[MLP])  # PEFT trains a copy
    before = {n: p.detach().clone() for n, p in peft_model.named_parameters()}
    options = {"optimizers": (optimizer, None), "max_steps": 1}
    trainer(peft_model, tmp_path, kind=Trainer, **options).train()
    assert all(torch.equal(p, before[n]) for n, p in peft_model.named_parameters())
    with pytest.raises(ObjectiveError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight is trained, but in none of"):
        trainer(peft_model, tmp_path, **options).train()


# What holds with.


def test_every_trained_parameter_is_in_exactly_one_group(tmp_path: Path) -> None:
    model = attached()
    plain = trainer(model, tmp_path).create_optimizer()
    grouped = trainer(model, tmp_path, PAIR)
    optimizer = grouped.create_optimizer()
    names = names_of(model)
    for made in (plain, optimizer):
        assert sorted(id(p) for group in made.param_groups for p in group["params"]) == sorted(names)
        assert groups.uncovered(made, model) == []
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    decays = {names[id(p)]: group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert decays["model.layers.0.input_layernorm.weight"] == 0.0  # transformers decays no norm ...
    assert decays["model.layers.0.self_attn.q_proj"] == 0.1
    expected = {
        **{name: (1e-3, decay) for name, decay in decays.items()},
        **{name: (5e-3, decay) for name, decay in decays.items() if "norm" in name or ".0." in name},  # ... nor we
        **{name: (2e-2, 0.0) for name in decays if name.startswith(MLP)},
    }
    assert found == expected
    assert len({lr for lr, _ in expected.values()}) == 3


def test_one_step_moves_every_parameter_by_its_own_learning_rate(tmp_path: Path) -> None:
    """Against p - lr (gradient + decay p) in float64, plain gradient descent."""
    model = attached()
    declared = [*PAIR[:1], {"parameters": NORMS, "learning_rate": 0.5, "weight_decay": 0.25}]
    made = trainer(model, tmp_path, declared, optim="sgd", lr_scheduler_type="constant")
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    watch = Gradients(model)
    made.add_callback(watch)
    made.train()
    settings = {MLP: (2e-2, 0.0), "norm": (0.5, 0.25)}
    names = names_of(model)
    moved = set()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = names[id(parameter)]
            lr, decay = next((value for key, value in settings.items() if key in name), (1e-3, 0.1))
            expected = before[path] - lr * (watch.found[path].double() + decay * before[path])
            assert torch.allclose(parameter.double(), expected, rtol=2e-7, atol=1e-8), name
            moved.add(lr)
        else:
            assert torch.equal(parameter.double(), before[path])
    assert moved == {2e-2, 0.5, 1e-3}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_min_lr", "polynomial"])
def test_the_schedule_scales_every_group_from_its_own_learning_rate(tmp_path: Path, schedule: str) -> None:
    more = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}} if schedule == "cosine_with_min_lr" else {}
    made = trainer(
        attached(), tmp_path, PAIR, max_steps=6, warmup_steps=2, lr_scheduler_type=schedule, optim="adamw_torch", **more
    )
    made.train()
    assert len(made.history) == 6
    rates = [logs["learning_rate"] for logs in made.history]
    assert len(set(rates)) > 3
    for logs in made.history:
        assert logs[f"learning_rate/{MLP}"] == pytest.approx(20 * logs["learning_rate"])
        assert logs[f"learning_rate/{NORMS}, model.layers.0.**.q_proj"] == pytest.approx(5 * logs["learning_rate"])


OPTIMS = [
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_bnb_8bit", "lion_32bit"),
    *("schedule_free_adamw", "stable_adamw", "grokadamw", "adamw_torch_4bit", "galore_adamw", "apollo_adamw"),
]


@pytest.mark.parametrize("optim", OPTIMS)
def test_every_optimizer_that_transformers_makes_takes_groups(tmp_path: Path, optim: str) -> None:
    low_rank = {"optim_target_modules": "all-linear"} if optim.startswith(("galore", "apollo")) else {}
    made = trainer(attached(), tmp_path, PAIR, optim=optim, **low_rank)
    try:
        optimizer = made.create_optimizer()
    except (ImportError, ValueError) as error:
        if isinstance(error, ObjectiveError):
            raise
        pytest.skip(f"not installed here: {str(error).splitlines()[0]}")
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups})
    assert rates == pytest.approx([1e-3, 5e-3, 2e-2])
    made.train()


def test_groups_that_an_optimizer_brings_are_split_with_what_they_set(tmp_path: Path) -> None:
    """As low-rank optimizers do it: they hand transformers groups of their own, frozen parameters among them."""
    model = attached()
    everything = list(model.parameters())
    own = [{"params": everything[:20], "betas": (0.5, 0.6)}, {"params": everything[20:]}]
    made = trainer(model, tmp_path, PAIR, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3, "params": own}))
    optimizer = made.create_optimizer()
    names = names_of(model)
    for group in optimizer.param_groups[2:]:
        for parameter in group["params"]:
            assert id(parameter) in names
            first = any(parameter is p for p in everything[:20])
            assert group["betas"] == ((0.5, 0.6) if first else (0.9, 0.999))
    assert groups.uncovered(optimizer, model) == []


def test_optimizer_settings_reach_their_group_alone(tmp_path: Path) -> None:
    declared = [ParameterGroup(MLP, optimizer={"betas": [0.7, 0.8], "eps": 1e-4})]
    optimizer = trainer(attached(), tmp_path, declared).create_optimizer()
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2 + [(0.7, 0.8)]
    assert [group["eps"] for group in optimizer.param_groups] == [1e-8] * 2 + [1e-4]


def test_a_resumed_training_keeps_its_groups(tmp_path: Path) -> None:
    """Bit for bit what an uninterrupted one makes, momentum and learning rates of all groups included."""
    whole = trainer(attached(), tmp_path / "whole", PAIR, max_steps=4)
    whole.train()
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(attached(), tmp_path / "cut", PAIR, **options).train()
    again = trainer(attached(), tmp_path / "cut", PAIR, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [g["lr"] for g in again.optimizer.param_groups] == [g["lr"] for g in whole.optimizer.param_groups]
    label = f"learning_rate/{MLP}"
    assert [logs[label] for logs in again.history] == [logs[label] for logs in whole.history]


def test_groups_find_their_way_without_peft(tmp_path: Path) -> None:
    model = pico.llama()
    optimizer = trainer(model, tmp_path, [{"parameters": "lm_head", "learning_rate": 0.5}])
    rates = {g["lr"]: len(g["params"]) for g in optimizer.create_optimizer().param_groups}
    assert rates == {0.5: 1, 1e-3: rates[1e-3]}


# What is refused.


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ([{"parameters": "model.layers.0.mlp", "learning_rate": 1.0}], "'model.layers.0.mlp' names nothing that is"),
        ([{"parameters": "model.layers.0.mlp", "learning_rate": 1.0}], "what it names is frozen; trained are: "),
        ([{"parameters": "model.layers.1.mpl", "learning_rate": 1.0}], r"trained are: .*layers\.\*\.mlp\.gate_proj"),
        ([*PAIR, {"parameters": "**.gate_proj", "learning_rate": 1.0}], r"both name model\.layers\.1\.mlp\.gate_proj"),
        ([{"parameters": MLP}], "nothing is set; give learning_rate"),
        ([{"parameters": MLP, "lr": 1.0}], "'lr' is unknown; known here: parameters, learning_rate"),
        ([{"learning_rate": 1.0}], "`parameters` must name the parameters of the group"),
        ([{"parameters": MLP, "optimizer": {"lr": 1.0}}], "'lr' is written learning_rate"),
    ],
)
def test_groups_that_do_not_fit_are_refused_at_once(tmp_path: Path, declared: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        trainer(attached(), tmp_path, declared)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": {"momentum": 0.9}}, "AdamW does not .*: it has no setting 'momentum'; it has: lr, betas, eps"),
        ({"optimizer": {"betas": [0.9, 1.5]}}, "Invalid beta parameter at index 1: 1.5"),
        ({"learning_rate": -1.0}, "Invalid learning rate: -1.0"),
        ({"learning_rate": "fast"}, "not supported between"),
    ],
)
def test_settings_that_the_optimizer_refuses_are_refused(tmp_path: Path, settings: Any, words: str) -> None:
    with pytest.raises(ObjectiveError, match=words):
        trainer(attached(), tmp_path, [{"parameters": MLP, **settings}]).create_optimizer()


def test_an_optimizer_of_ones_own_and_groups_exclude_each_other(tmp_path: Path) -> None:
    model = attached()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ObjectiveError, match="leave out the optimizer, or parameter_groups"):
        trainer(model, tmp_path, PAIR, optimizers=(optimizer, None))
    trainer(model, tmp_path, optimizers=(optimizer, None)).train()  # by itself it holds all


def test_optimizers_that_know_no_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match="knows no parameter groups"):
        trainer(attached(), tmp_path, PAIR, optim="lomo")


def test_an_optimizer_that_is_made_elsewhere_is_noticed(tmp_path: Path) -> None:
    """As DeepSpeed does it when its own configuration names one."""
    made = trainer(attached(), tmp_path, PAIR)
    made.optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ObjectiveError, match="the parameter groups would be ignored"):
        made.train()


def test_what_no_group_holds_or_two_hold_is_found() -> None:
    model = attached()
    trained = [p for p in model.parameters() if p.requires_grad]
    names = names_of(model)
    optimizer = torch.optim.SGD(trained[1:], lr=0.1)
    assert groups.uncovered(optimizer, model) == [
        f"{names[id(trained[0])]} is trained, but in none of the optimizer's groups"
    ]
    optimizer.param_groups.append({"params": trained[:2]})
    assert groups.uncovered(optimizer, model) == [
        f"{names[id(trained[1])]} is trained, but in 2 of the optimizer's groups"
    ]
