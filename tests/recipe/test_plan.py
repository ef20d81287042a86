"""Nothing of a recipe fails after the build that `plan` could have known; the numbers of `plan` are those of `run`."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from rich.console import Console

from solidify.artifact import inspection
from solidify.command import views
from solidify.errors import ObjectiveError, SolidifyError
from solidify.recipe import dry_run, schema, stages

USER = Path(pico.__file__).parent / "user_modules"


def loaded(directory: Path, base: Path, target: str, expect: str, module: str, /, **changes: Any) -> schema.Recipe:
    """Writes a recipe for a pico model and reads it."""
    lines = [json.dumps({"text": f"w{n} w{n + 1} w{n + 2} and no other"}) for n in range(20)]
    (directory / "lines.jsonl").write_text("\n".join(lines))
    document = {
        "base": {"model": str(base)},
        "surgery": [{"replace": target, "expect": expect, "with": f"{USER}/{module}"}],
        "adapter": {"lora": {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]}},
        "data": {"train": "lines.jsonl", "max_length": 16},
        "training": {"max_steps": 2, "learning_rate": 1e-3},
        **changes,
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return schema.load(path)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (
            [{"loss": "solidify.losses:hidden_match", "arguments": {"layers": ["model.layers.7"]}}],
            "looks into model.layers.7",
        ),
        ([{"loss": "solidify.losses:trash_budget", "arguments": {"target": 0.5}}], "looks into TrashCan"),
        ([{"loss": "solidify.losses:weight_penalty", "arguments": {"parameters": "**.nothing"}}], "names no parameter"),
        ([{"loss": "solidify.losses:next_token", "arguments": {"chunk": 0}}], "chunk must be a whole number"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused_in_plan(
    tiny_base: Path, tmp_path: Path, terms: list[Any], words: str
) -> None:
    with pytest.raises(ObjectiveError, match=words):
        dry_run.plan(loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled",
                            objective=[{"loss": "model"}, *terms]))  # fmt: skip


@pytest.mark.parametrize("layers", ["model.layers.*", ["model.layers.0", "model.layers.1"]])
def test_hidden_match_takes_a_list_of_layers(tiny_base: Path, tmp_path: Path, layers: Any) -> None:
    terms = [{"loss": "model"}, {"loss": "solidify.losses:hidden_match", "arguments": {"layers": layers}}]
    plan = dry_run.plan(
        loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", objective=terms)
    )
    assert [term["name"] for term in plan.objective] == ["model", "hidden_match"]


def test_faults_are_those_of_the_recipe(tiny_base: Path, tmp_path: Path) -> None:
    terms = [{"loss": "solidify.losses:forward_kl"}, {"loss": "solidify.losses:load_balance"}]
    made = loaded(
        tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", objective=terms
    )
    try:
        dry_run.plan(made)
    except SolidifyError as error:
        pytest.fail(str(error))


ADOPTING = '''
import torch
from torch import nn


class OwnMoE(nn.Module):
    """Takes the router and the experts over, and brings a norm and a bias of its own."""

    def __init__(self, original):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(128))
        self.bias = nn.Parameter(torch.zeros(16))
        self.router = nn.Linear(128, 16, bias=False)
        self.up = nn.Parameter(torch.empty_like(original.experts.gate_up_proj))
        self.down = nn.Parameter(torch.empty_like(original.experts.down_proj))
        self.top_k = original.gate.top_k

    def adopt(self, original):
        self.router.weight.copy_(original.gate.weight)
        self.up.copy_(original.experts.gate_up_proj)
        self.down.copy_(original.experts.down_proj)

    def forward(self, hidden_states):
        x = hidden_states * self.norm
        logits = self.router(x) + self.bias
        top = logits.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, top.indices, top.values.softmax(-1))
        gate, up = torch.einsum("...i,eoi->...eo", x, self.up).chunk(2, dim=-1)
        made = torch.einsum("...eo,eio->...ei", nn.functional.silu(gate) * up, self.down)
        return (made * weights[..., None]).sum(-2).to(hidden_states.dtype)
'''


@pytest.mark.slow
def test_plan_run_card_and_diff_say_the_same_numbers(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "own_moe.py").write_text(ADOPTING)
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled")
    step = made.surgery[0].model_copy(update={"module": "own_moe.py:OwnMoE"})
    made = made.model_copy(update={"surgery": [step], "adapter": None, "data": None, "training": {}})
    plan = dry_run.plan(made).document()
    assert {key: len(plan["tensors"][key]) for key in ("kept", "new", "dropped", "unknown")} == {
        **plan["counts"],
        "unknown": 0,
    }
    assert plan["counts"]["new"] == 8 and plan["counts"]["dropped"] == 0

    report = stages.build(made, tmp_path / "out")
    assert report.measured["tensors"] == plan["counts"]
    assert report.measured["cost"] == plan["after"]
    untouched = next(f for f in report.findings if f.name == "unchanged tensors identical")
    assert untouched.evidence == (
        f"{plan['counts']['kept']} of {plan['counts']['kept']} base tensors byte-identical, 8 new, 0 dropped"
    )
    card = (tmp_path / "out" / "artifact" / "README.md").read_text()
    total = plan["counts"]["kept"]
    assert f"Tensors: {total} of the base's {total} kept, 0 dropped; 8 new." in card
    assert f"{plan['after']['flops_per_token']:,} matrix FLOPs per token." in card
    found = {
        entry["name"]: entry["new"] for entry in inspection.diff(tiny_base, tmp_path / "out" / "artifact")["figures"]
    }
    assert {key: found[f"tensors {key}"] for key in plan["counts"]} == plan["counts"]
    assert found["flops_per_token"] == plan["after"]["flops_per_token"]


def test_experts_of_which_nobody_says_how_many_run_are_named(tiny_base: Path, tmp_path: Path) -> None:
    text = ADOPTING.replace("self.top_k = original.gate.top_k", "self.chosen = 2").replace("self.top_k", "self.chosen")
    text = text.replace("(16)", "(6)").replace("128, 16", "128, 6").replace("gate.weight", "gate.weight[:6]")
    for key in ("gate_up_proj", "down_proj"):
        text = text.replace(f"original.experts.{key})", f"original.experts.{key}[:6])")
    (tmp_path / "own_moe.py").write_text(text)
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled")
    step = made.surgery[0].model_copy(update={"module": "own_moe.py:OwnMoE"})
    plan = dry_run.plan(made.model_copy(update={"surgery": [step], "adapter": None, "data": None, "training": {}}))
    names = [f"model.layers.{layer}.mlp.{key}" for layer in range(4) for key in ("up", "down")]
    assert sorted(plan.after["uncertain"]) == sorted(names)
    shown = Console(width=200, file=(written := StringIO()))
    for each in views.plan(plan.document()):
        shown.print(each)
    assert "nothing says how many of" in written.getvalue()


HALF = {"base": {"model": "builtin:tiny-olmoe", "dtype": "bfloat16"}}
WHOLE = {"adapter": {"train": ["model.layers.*.mlp.scale"]}}
SHARDED = {"fsdp": True, "fsdp_config": {"cpu_ram_efficient_loading": True}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (HALF | WHOLE, "would be trained in half precision .* set bf16: true"),
        ({"training": {"max_steps": 2, **SHARDED}}, "leave out cpu_ram_efficient_loading"),
    ],
)
def test_what_the_trainer_would_refuse_is_refused_in_plan(
    tiny_base: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", **changes)
    with pytest.raises(SolidifyError, match=words):
        dry_run.plan(made)
    with pytest.raises(SolidifyError, match=words):
        stages.run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_under_autocast_is_planned(tiny_base: Path, tmp_path: Path) -> None:
    changes = {**HALF, **WHOLE, "training": {"max_steps": 2, "bf16": True}}
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", **changes)
    assert dry_run.plan(made).trainable


def test_sharding_that_depends_on_how_a_run_is_started_is_told(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe may be planned and built by one process and trained by several."""
    changes = {"training": {"max_steps": 2, "fsdp": True}}
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", **changes)
    dry_run.plan(made)
    assert "training.fsdp: accelerate shards a model over accelerators" in capsys.readouterr().err
    with pytest.raises(SolidifyError, match="every process would silently hold the whole model"):
        stages.run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_low_rank_factors_on_a_half_precision_base_are_planned(tiny_base: Path, tmp_path: Path) -> None:
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", **HALF)
    assert dry_run.plan(made).trainable  # PEFT makes them in float32, on the meta device too


TRASH = {"replace": "model.layers.*.mlp", "with": "solidify.modules.trashcan_moe:TrashCanMoE"}
CONTROLLER = {"loss": "solidify.losses:trash_controller", "arguments": {"target": 0.75}}
RAMP = {"loss": "solidify.losses:ramp", "arguments": {"buffers": "**.trash.bias", "start": -9.0, "end": -4.0}}


@pytest.mark.parametrize(
    ("arguments", "term", "sleeps"),
    [({}, None, True), ({"threshold": -4.0}, None, False), ({}, CONTROLLER, False), ({}, RAMP, False)],
)
def test_a_trash_can_that_nothing_wakes_is_told_before_it_is_trained(
    tiny_base: Path, tmp_path: Path, arguments: dict[str, Any], term: dict[str, Any] | None, sleeps: bool
) -> None:
    recipe = loaded(
        tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled",
        surgery=[{**TRASH, "expect": "OlmoeSparseMoeBlock", "arguments": arguments}],
        adapter={"lora": {"r": 2, "target_modules": ["model.layers.*.self_attn.q_proj"]},
                 "train": ["model.layers.*.mlp.trash"]},
        objective=[{"loss": "model"}, *([term] if term is not None else [])],
    )  # fmt: skip
    planned = dry_run.plan(recipe)
    said = "model.layers.*.mlp: the trash can is asleep"
    assert [note[: len(said)] for note in planned.notes] == ([said] if sleeps else [])
    if sleeps:
        console = Console(file=StringIO(), width=400)
        for shown in views.plan(planned.document()):
            console.print(shown)
        assert "add the term solidify.losses:trash_controller" in console.file.getvalue()  # type: ignore[attr-defined]
