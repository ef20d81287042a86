"""Nothing of a recipe fails after the build that `plan` could have known; the numbers of `plan` are those of `run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import pico
from solidify import dry_run, recipe
from solidify.errors import ObjectiveError, SolidifyError

USER = Path(pico.__file__).parent / "user_modules"


def loaded(directory: Path, base: Path, target: str, expect: str, module: str, **changes: Any) -> recipe.Recipe:
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
    return recipe.load(path)


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ([{"loss": "solidify.losses:hidden_match", "arguments": {"layers": ["model.layers.7"]}}], "looks into model.layers.7"),
        ([{"loss": "solidify.losses:trash_budget", "arguments": {"target": 0.5}}], "looks into TrashCan"),
        ([{"loss": "solidify.losses:weight_penalty", "arguments": {"parameters": "**.nothing"}}], "names no parameter"),
        ([{"loss": "solidify.losses:next_token", "arguments": {"chunk": 0}}], "chunk is a whole number"),
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
    made = loaded(tmp_path, tiny_base, "model.layers.*.mlp", "OlmoeSparseMoeBlock", "wrappers.py:Scaled", objective=terms)
    try:
        dry_run.plan(made)
    except SolidifyError as error:
        pytest.fail(str(error))
