"""Modules of plain torch become models of transformers: built, reloaded without us, adapted, trained, merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pico
import plain_nets
import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, TrainingArguments

import solidify
from solidify.errors import ModelError, SolidifyError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PLAN = [8, "M", 16, "M"]


def make_sequential() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return nn.Sequential(*layers)


CASES: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, dict[str, Any], str]] = {
    "vgg": (lambda: plain_nets.VGG(PLAN), IMAGES, {}, "module.features.0"),
    "alexnet": (
        lambda: plain_nets.AlexNet(dropout=0.2),
        IMAGES,
        {"arguments": {"dropout": 0.2}},
        "module.classifier.1",
    ),
    "resnet": (
        lambda: plain_nets.ResNet(plain_nets.Block, [1, 2]),
        IMAGES,
        {"arguments": {"block": plain_nets.Block, "layers": [1, 2]}},
        "module.layers.*.0.conv",
    ),
    "sequential": (make_sequential, IMAGES, {}, "module.0"),
    "features": (lambda: nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4)), torch.randn(3, 12), {}, "module.0"),
    "tokens": (lambda: plain_nets.Words(50, 8), torch.randint(0, 50, (2, 7)), {}, "module.head"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_changed_and_comes_back(tmp_path: Path, case: str) -> None:
    make, example, options, target = CASES[case]
    module = make()
    with torch.no_grad():
        expected = module.eval()(example)
    model = solidify.wrap(module, example, **options)
    with torch.no_grad():
        assert torch.equal(model(example).logits, expected)
    edits = solidify.replace(model, target, plain_nets.Gated)
    pico.artifact(model, edits, tmp_path / "made")
    again = solidify.load(tmp_path / "made")
    with torch.no_grad():
        torch.testing.assert_close(again(example).logits, expected, rtol=0, atol=1e-5)
    assert type(again.get_submodule(edits[0].name)).__name__ == "Gated"


def test_a_second_surgery_adds_to_the_first(tmp_path: Path) -> None:
    model = solidify.wrap(
        plain_nets.ResNet(plain_nets.Block, [1]), IMAGES, arguments={"block": plain_nets.Block, "layers": [1]}
    )
    pico.artifact(model, solidify.replace(model, "module.stem", plain_nets.Gated), tmp_path / "first")
    model = solidify.load(tmp_path / "first")
    pico.artifact(model, solidify.replace(model, "module.fc", plain_nets.Gated), tmp_path / "second")
    again = solidify.load(tmp_path / "second")
    with torch.no_grad():
        torch.testing.assert_close(again(IMAGES).logits, model(IMAGES).logits, rtol=0, atol=1e-5)
    assert [entry["operation"] for entry in again.config.surgery] == ["wrap", "replace", "replace"]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without an edit, and verified in a fresh process that knows neither us nor the class."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("vgg") / "artifact"
    made = solidify.build(solidify.wrap(plain_nets.VGG(PLAN), IMAGES), [], directory)
    assert any(finding.name == "loads without us" and finding.passed for finding in made.findings)
    return directory


def test_it_carries_its_code_and_says_how_it_is_made(vgg: Path) -> None:
    config = json.loads((vgg / "config.json").read_text())
    assert config["surgery"][0]["arguments"]["arguments"] == {"plan": PLAN}
    assert len(config["id2label"]) == 10
    assert (vgg / "plain_nets.py").is_file() and (vgg / "wrapped_module.py").is_file()
    assert "solidify" not in (vgg / "wrapped_module.py").read_text().split("import", 1)[1]
    found = AutoModelForImageClassification.from_pretrained(vgg, trust_remote_code=True)
    card = (vgg / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "FLOPs" not in card  # those of convolutions are not counted
    assert found(IMAGES, labels=torch.tensor([1, 2, 3, 4])).loss > 0


@pytest.mark.slow
def test_lora_on_convolutions_learns_labels_and_merges(vgg: Path, tmp_path: Path) -> None:
    model = solidify.load(vgg)
    peft_model = solidify.attach(model, lora={"r": 4, "target_modules": ["module.features.0", "module.head"]})
    rows = [{"pixel_values": image, "labels": torch.tensor(n)} for n, image in enumerate(IMAGES)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=30, learning_rate=3e-2, report_to="none", use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = solidify.ObjectiveTrainer(
        model=peft_model, args=arguments, train_dataset=rows, objective=solidify.Objective([solidify.Term("model")])
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0] / 2
    solidify.save_adapter(peft_model, tmp_path / "adapter")
    with torch.no_grad():
        attached = peft_model.eval()(IMAGES).logits
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(solidify.load(tmp_path / "merged")(IMAGES).logits, attached, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trainer", ["auto", "classification", "sft"])
def test_a_recipe_that_would_train_it_says_what_to_do(vgg: Path, tmp_path: Path, trainer: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "label": 0}\n')
    document = {
        "base": {"model": str(vgg)},
        "adapter": {"train": ["module.head"]},
        "data": {"train": "rows.jsonl"},
        "trainer": trainer,
        "training": {"max_steps": 1},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(document))
    with pytest.raises(SolidifyError) as caught:
        solidify.plan(tmp_path / "r.yaml")
    said = str(caught.value)
    assert "is a module that solidify.wrap made a model of, which no rows of a recipe teach; train it from" in said
    assert "give solidify.ObjectiveTrainer a data set of `pixel_values` and `labels`" in said


def patch_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x.flatten(1)  # type: ignore[method-assign]
    return module


def add_hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("module", "example", "words"),
    [
        (lambda: patch_forward(nn.Linear(4, 4)), torch.randn(2, 4), "module has a forward of its own"),
        (lambda: add_hook(nn.Linear(4, 4)), torch.randn(2, 4), "module has hooks"),
        (lambda: nn.LSTM(4, 4), torch.randn(2, 3, 4), "LSTM returns tuple; a module that is wrapped returns one"),
        (lambda: nn.Linear(4, 4), torch.randn(2, 5), "does not run on example_inputs"),
        (lambda: nn.Linear(4, 4), {"a": torch.randn(2, 4)}, "wrap takes one of pixel_values, input_ids, inputs"),
        (pico.llama, torch.randn(2, 4), "LlamaForCausalLM is a model of transformers already"),
    ],
)
def test_what_would_not_come_back_is_refused(module: Callable[[], nn.Module], example: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        solidify.wrap(module(), example)


def test_told_arguments_that_make_another_are_refused() -> None:
    with pytest.raises(ModelError, match=r"with the arguments that were told(.|\n)*module.classifier.0 is p=0.2, in"):
        solidify.wrap(plain_nets.AlexNet(dropout=0.2), IMAGES, arguments={"dropout": 0.5})


def test_labels_of_what_is_no_classifier_are_refused() -> None:
    model = solidify.wrap(nn.Conv2d(3, 2, 3), IMAGES)
    with pytest.raises(ValueError, match=r"labels are for a module that returns \(batch_size, num_labels\)"):
        model(IMAGES, labels=torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize("width", [8, 10])
def test_inputs_that_a_file_does_not_align_are_those_of_memory(tmp_path: Path, width: int) -> None:
    """Kernels give other last bits for other alignments: an honest module was refused."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)).eval()
    solidify.build(solidify.wrap(module, {"inputs": torch.randn(4, width)}), [], tmp_path / "net")


TOKENS = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(1))


def tie_by_hand() -> nn.Module:
    module = plain_nets.Untied()
    module.head.weight = module.table.weight
    return module


TIED: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "by its constructor": (
        plain_nets.Tied,
        {"module.layers.2.weight": "module.layers.0.weight", "module.head.weight": "module.table.weight"},
    ),
    "by hand": (tie_by_hand, {"module.head.weight": "module.table.weight"}),
}


@pytest.mark.parametrize("case", TIED)
def test_a_parameter_at_two_places_stays_one(tmp_path: Path, case: str) -> None:
    make, ties = TIED[case]
    torch.manual_seed(2)
    module = make().eval()
    made = solidify.build(solidify.wrap(module, {"inputs": TOKENS}), [], tmp_path / "artifact")
    assert any(finding.name == "loads without us" and finding.passed for finding in made.findings)
    again = solidify.load(made.directory)
    named = dict(again.named_parameters(remove_duplicate=False))
    assert all(named[name] is named[first] for name, first in ties.items())
    assert torch.equal(again(TOKENS).logits, module(TOKENS))
    assert len(list(again.parameters())) == len(list(module.parameters()))


def test_lora_beside_ties_is_learned_and_merged(tmp_path: Path) -> None:
    torch.manual_seed(2)
    artifact = pico.artifact(solidify.wrap(plain_nets.Tied(), {"inputs": TOKENS}), [], tmp_path / "artifact")
    for more in ({}, {"ensure_weight_tying": False}):
        with pytest.raises(SolidifyError, match=r"module.head and module.table are tied .* name none of them"):
            solidify.attach(solidify.load(artifact), lora={"r": 2, "target_modules": ["module.head"], **more})
    model = solidify.attach(solidify.load(artifact), lora={"r": 2, "target_modules": ["module.mix"]}).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    expected = model(TOKENS).logits.detach()
    solidify.merge(solidify.save_adapter(model, tmp_path / "adapter"), tmp_path / "merged")
    merged = solidify.load(tmp_path / "merged")
    torch.testing.assert_close(merged(TOKENS).logits.detach(), expected, rtol=0, atol=1e-4)
    assert merged.module.layers[2].weight is merged.module.layers[0].weight
    assert merged.module.head.weight is merged.module.table.weight


def test_views_of_one_memory_are_refused_with_what_to_do() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(module[0].weight.data)
    with pytest.raises(ModelError, match=r"module\.1\.weight and module\.0\.weight are views of one memory; make them"):
        solidify.wrap(module, torch.randn(2, 4))


def test_inputs_have_the_dtype_of_the_example(tmp_path: Path) -> None:
    """And not that of the first parameter, which is another here; each keeps its own."""
    torch.manual_seed(2)
    module, example = plain_nets.Mixed().eval(), torch.randn(3, 8)
    made = solidify.build(solidify.wrap(module, {"inputs": example}), [], tmp_path / "artifact")
    assert any(finding.name == "loads without us" and finding.passed for finding in made.findings)
    again = solidify.load(made.directory)
    assert torch.equal(again(example).logits, module(example))
    assert again.module.offset.dtype == torch.float64 and again.module.layer.weight.dtype == torch.float32
