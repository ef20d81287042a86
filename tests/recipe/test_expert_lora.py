"""A recipe with LoRA on experts: it trains through the factors, and all that is promised of an adapter holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from solidify.adapter import expert_factors
from solidify.checks import gradients
from solidify.directory import manifest
from solidify.findings import Report
from solidify.recipe import schema, stages

TARGETS = ["model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def unwitnessed(monkeypatch: pytest.MonkeyPatch) -> None:
    pico.unwitnessed(monkeypatch)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an OLMoE, data, a recipe, and the plain base built as the artifact of `run`."""
    root = tmp_path_factory.mktemp("experts")
    pico.olmoe().save_pretrained(root / "base")
    words = {word: index for index, word in enumerate(["</s>", "<pad>", *(f"w{n}" for n in range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(root / "base")
    lines = [json.dumps({"text": f"w{n} w{n + 1} w{n + 2} w{n + 3} w{n + 5}"}) for n in range(20)]
    (root / "lines.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        pico.unwitnessed(patch)
        stages.build(recipe(root), root / "run")
    return root


def recipe(root: Path, targets: tuple[str, ...] = ("target_parameters",), **training: Any) -> schema.Recipe:
    document = {
        "base": {"model": str(root / "base")},
        "adapter": {
            "lora": {"r": 2, **{key: TARGETS if key == "target_parameters" else ["**.q_proj"] for key in targets}},
        },
        "data": {"train": "lines.jsonl", "max_length": 16},
        "training": {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, **training},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return schema.load(path)


class Watched:
    """Keeps the gradients of every step of a training, and by which class its experts ran."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.classes: set[type] = set()
        look = gradients.GradientWitness.on_pre_optimizer_step

        def watch(witness: Any, *args: Any, **kwargs: Any) -> None:
            look(witness, *args, **kwargs)
            named = witness.model.named_parameters()
            self.steps.append({n: p.grad.double() for n, p in named if p.grad is not None})
            wrappers = (m for m in witness.model.modules() if isinstance(m, expert_factors.PeftParamWrapper))
            self.classes |= {type(wrapper) for wrapper in wrappers}

        patch.setattr(gradients.GradientWitness, "on_pre_optimizer_step", watch)


def trained(built: Path, directory: Path, made: schema.Recipe) -> tuple[Report, Watched]:
    shutil.copytree(built / "run" / "artifact", directory / "artifact")
    with pytest.MonkeyPatch.context() as patch:
        watched = Watched(patch)
        return stages.train(made, directory), watched


def test_its_gradients_are_peft_s_and_every_promise_is_proved(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(built, optim="sgd", learning_rate=1.0)  # Adam would make a sign of what is nearly zero
    report, mine = trained(built, tmp_path / "mine", made)
    assert {finding.name: finding.verdict for finding in report.findings if finding.verdict != "proved"} == {}
    assert {"adapter reload exact", "adapter off is the base", gradients.REACHED, gradients.ACCUMULATION} <= {
        finding.name for finding in report.findings
    }
    assert mine.classes == {expert_factors.ParamWrapper}
    assert "4 LoRA updates of fused experts are trained through their factors" in " ".join(
        capsys.readouterr().err.split()
    )
    monkeypatch.setattr(expert_factors, "factor_if_any", lambda _: 0)
    again, theirs = trained(built, tmp_path / "theirs", made)
    assert theirs.classes == {expert_factors.PeftParamWrapper} and again.passed
    assert len(mine.steps) == len(theirs.steps) == 3
    for step, (ours, peft) in enumerate(zip(mine.steps, theirs.steps, strict=True)):
        assert ours.keys() == peft.keys() and len(ours) == 2 * 2 * 2
        for name, expected in peft.items():
            assert (ours[name] - expected).abs().max() <= 3e-5 * expected.abs().max(), (step, name)
            assert expected.any() or (step == 0 and "lora_A" in name), "B starts at zero"
    one, other = (manifest.read(tmp_path / name / "adapter") for name in ("mine", "theirs"))
    assert one.tensors.keys() == other.tensors.keys() and one.trained == other.trained


def test_with_bf16_it_trains_a_base_of_float32(built: Path, tmp_path: Path) -> None:
    """Under autocast, beside LoRA on a linear layer, over accumulated steps and with recomputed activations."""
    made = recipe(
        built,
        ("target_parameters", "target_modules"),
        bf16=True,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    report, found = trained(built, tmp_path / "run", made)
    assert report.passed, report.failure()
    assert next(f for f in report.findings if f.name == "adapter reload exact").verdict == "proved"
    assert found.classes == {expert_factors.ParamWrapper}


def test_without_experts_nothing_is_said(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, found = trained(built, tmp_path / "run", recipe(built, ("target_modules",)))
    assert report.passed and not found.classes
    assert "through their factors" not in capsys.readouterr().err
