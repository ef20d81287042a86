"""Modules whose constructors keep nothing of what they were given are built part by part, in every artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import factory_nets
import pico
import plain_nets
import pytest
import torch
from torch import nn

import solidify
from solidify.errors import ModelError

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_staged() -> nn.Module:
    settings = factory_nets.Settings((4, 6), factory_nets.Pooling.MAX)
    return factory_nets.Staged(factory_nets.Residual, [1, 2], settings, partial(nn.BatchNorm2d, momentum=0.2))


def make_featured() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), *(nn.Conv2d(8, 8, 1 + 2 * (n % 2), padding=n % 2) for n in range(11)), nn.GELU()]
    return factory_nets.Featured(nn.Sequential(*layers), 7, dropout=0.2)


def grow(module: nn.Module) -> nn.Module:
    module.extra = nn.Linear(2, 2)
    return module


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "staged": (make_staged, "module.head"),
    "featured": (make_featured, "module.classifier.1"),
    "attending": (lambda: factory_nets.Attending(4, 3.0), "module.head"),
    "one module at two names": (lambda: factory_nets.Repeating(16), "module.first"),
    "numbers of tensors": (lambda: factory_nets.Scheduled(4, 0.2), "module.layers.1.0"),
    "another default": (lambda: plain_nets.AlexNet(dropout=0.2), "module.classifier.1"),
    "grown": (lambda: grow(make_featured()), "module.features.11"),
}
EXAMPLES = {"attending": torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("case", CASES)
def test_it_needs_no_argument_and_comes_back(tmp_path: Path, case: str) -> None:
    make, target = CASES[case]
    module, images = make().eval(), EXAMPLES.get(case, IMAGES)
    with torch.no_grad():
        expected = module(images)
    model = solidify.wrap(module, images)
    assert "part by part" in vars(model)["_wrapping"].settings["note"]
    edits = solidify.replace(model, target, plain_nets.Gated)
    pico.artifact(model, edits, tmp_path / "made")
    again = solidify.load(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(again(images).logits, expected)
    assert list(again.state_dict()) == list(model.state_dict())
    frozen = [name.removeprefix("module.") for name, p in model.named_parameters() if not p.requires_grad]
    assert again.config.surgery[0].get("frozen", []) == frozen


def patch_with_lambda(module: nn.Module) -> nn.Module:
    module.activation = lambda x: x
    return module


def test_a_function_without_a_name_is_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"nor part by part: module.activation is .*<lambda>, which no file .*`def`"):
        solidify.wrap(patch_with_lambda(make_featured()), IMAGES)


def test_children_come_back_in_their_order(tmp_path: Path) -> None:
    """transformers sorts the keys of a configuration: "10" before "2"."""
    model = solidify.wrap(nn.Sequential(*(nn.Linear(4 + n, 5 + n) for n in range(12))), torch.randn(2, 4))
    assert not vars(model)["_wrapping"].settings
    pico.artifact(model, [], tmp_path / "made")
    assert list(solidify.load(tmp_path / "made").module.state_dict()) == list(model.module.state_dict())


def test_it_learns_and_merges_and_loads_alone(tmp_path: Path) -> None:
    """Built and merged models are loaded by a fresh process that knows neither the package nor the class."""
    solidify.build(solidify.wrap(make_staged(), IMAGES), [], tmp_path / "made")
    model = solidify.attach(
        solidify.load(tmp_path / "made"),
        lora={"r": 2, "target_modules": ["module.stages.stage1.0.conv"]},
        train=["module.head"],
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(IMAGES, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    solidify.save_adapter(model, tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        expected = model.eval()(IMAGES).logits
    torch.save((IMAGES, expected), tmp_path / "expected.pt")
    script = (
        "import sys, torch\nfrom transformers import AutoModelForImageClassification as A\n"
        "images, wanted = torch.load('expected.pt')\n"
        "model = A.from_pretrained('merged', trust_remote_code=True).eval()\n"
        "torch.testing.assert_close(model(images).logits, wanted, rtol=0, atol=1e-4)\n"
        "assert 'solidify' not in sys.modules and 'factory_nets' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


REAL = {
    "torchvision": ["alexnet", "vgg11", "resnet18", "swin_t"],
    "timm": ["resnet18", "vit_tiny_patch16_224", "levit_128s"],
}


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in REAL.items() for name in names])
def test_models_of_torchvision_and_timm_require_their_package(tmp_path: Path, library: str, name: str) -> None:
    package: Any = pytest.importorskip("torchvision.models" if library == "torchvision" else "timm")
    make = package.get_model if library == "torchvision" else package.create_model
    module, images = make(name, num_classes=10).eval(), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = module(images)
    pico.artifact(solidify.wrap(module, images), [], tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(solidify.load(tmp_path / "made")(images).logits, expected)
    assert library in json.loads((tmp_path / "made" / "solidify.json").read_text())["requirements"]
