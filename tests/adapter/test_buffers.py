"""Buffers that move in training belong to what was trained: saved, loaded, switched, merged; elsewhere refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moving
import pico
import pytest
import torch
from memory_merge import merge_in_memory
from peft import PeftModel
from transformers import AutoModelForCausalLM

import solidify
from solidify.adapter import base_state, lookup
from solidify.errors import AdapterError, SolidifyError
from solidify.model import anatomy

MLP = "model.layers.*.mlp"
LORA: dict[str, Any] = {"r": 2, "target_modules": ["**.q_proj"]}


def build(directory: Path, module: type, **arguments: Any) -> Path:
    model = pico.llama()
    edits = solidify.replace(model, MLP, module, arguments=arguments)
    pico.artifact(model, edits, directory)
    return directory


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("normed") / "artifact", moving.Normed)


@pytest.fixture(scope="module")
def unscaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("unscaled") / "artifact", moving.Unscaled)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("averaged") / "artifact", moving.Averaged)


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    """Trains for real, so that all that moves in training moves."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()
    for step in range(steps):
        batch = pico.tokens(4, 10, seed=step)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens()})


WAYS: dict[str, dict[str, Any]] = {
    "under frozen modules": {"lora": LORA},
    "in a module trained in full": {"train": [MLP]},
    "beside single parameters": {"train": ["**.norm.weight", "**.norm.bias"]},
    "the module itself in full": {"lora": LORA, "train": ["**.mlp.norm"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_running_statistics_come_back_switch_and_merge(normed: Path, tmp_path: Path, way: str) -> None:
    base = logits(solidify.load(normed))
    model = trained(solidify.attach(solidify.load(normed), **WAYS[way]))
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load(normed, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), base)
    plain = PeftModel.from_pretrained(solidify.load(normed), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), expected)
    solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    in_memory = merge_in_memory(again)
    assert torch.allclose(logits(in_memory), expected, atol=1e-5)
    assert set(in_memory.state_dict()) == set(solidify.load(normed).state_dict())


@pytest.mark.slow
def test_buffers_without_parameters_beside_them_come_back_and_merge(unscaled: Path, tmp_path: Path) -> None:
    for name, way in {"lora": {"lora": LORA}, "full": {"train": [MLP]}}.items():
        model = trained(solidify.attach(solidify.load(unscaled), **way))
        expected = logits(model)
        solidify.save_adapter(model, tmp_path / name)
        assert torch.equal(logits(solidify.load(unscaled, tmp_path / name)), expected)
        solidify.merge(tmp_path / name, tmp_path / f"{name}-merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged", trust_remote_code=True).eval()
        assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_a_buffer_that_is_put_there_anew_comes_back(averaged: Path, tmp_path: Path) -> None:
    base = logits(solidify.load(averaged))
    model = trained(solidify.attach(solidify.load(averaged), lora=LORA))
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    solidify.save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(averaged, tmp_path / "adapter")), expected)


def test_every_adapter_has_its_own_buffers(normed: Path, tmp_path: Path) -> None:
    model = trained(solidify.attach(solidify.load(normed), name="one", lora=LORA))
    one = logits(model)
    model = solidify.attach(model, name="two", train=["**.norm.weight"])
    assert torch.equal(logits(model.eval()), logits(solidify.load(normed)))
    two = logits(trained(model, 5))
    for name, expected in (("one", one), ("two", two), ("one", one)):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected)
        solidify.save_adapter(model, tmp_path / name, name=name)
    model = solidify.load_adapter(solidify.load(normed, tmp_path / "one"), tmp_path / "two", name="two")
    assert torch.equal(logits(model), two)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.delete_adapter("two")
    assert torch.equal(logits(model), one)
    assert torch.equal(logits(model.unload()), logits(solidify.load(normed)))


def test_training_goes_on_from_the_buffers_that_were_saved(normed: Path, tmp_path: Path) -> None:
    model = trained(solidify.attach(solidify.load(normed), lora=LORA), 2)
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load_adapter(solidify.load(normed), tmp_path / "adapter", trainable=True)
    with torch.no_grad():
        for m in (model, again.train()):
            m.train()(input_ids=pico.tokens(seed=9))
    assert torch.equal(logits(again), logits(model))


def test_nothing_is_stored_of_buffers_that_did_not_move(normed: Path, tmp_path: Path) -> None:
    model = solidify.attach(solidify.load(normed), lora=LORA)
    directory = solidify.save_adapter(model, tmp_path / "adapter")
    from safetensors.torch import load_file

    assert not any("running" in key for key in load_file(directory / "adapter_model.safetensors"))


def test_what_moves_and_is_not_saved_is_refused_by_name(tmp_path: Path) -> None:
    artifact = build(tmp_path / "artifact", moving.Unsaved)
    model = solidify.attach(solidify.load(artifact), lora=LORA)
    with pytest.raises(SolidifyError, match=r"mlp\.mean"):
        trained(model)
        solidify.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_buffers_that_moved_without_an_adapter_make_another_base(normed: Path) -> None:
    model = solidify.load(normed)
    with torch.no_grad():
        model.train()(input_ids=pico.tokens())
    with pytest.raises(AdapterError, match="running_mean has other values"):
        solidify.attach(model.eval(), lora=LORA)


def test_what_a_copy_of_the_model_holds_moves_alone(normed: Path) -> None:
    from copy import deepcopy

    model = solidify.attach(solidify.load(normed), lora=LORA)
    before = logits(model.eval())
    copy = trained(deepcopy(model))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(copy), before)
    with copy.disable_adapter():
        assert torch.equal(logits(copy), logits(solidify.load(normed)))


def test_a_model_may_change_its_dtype_under_its_adapter(normed: Path) -> None:
    model = trained(solidify.attach(solidify.load(normed), lora=LORA)).double()
    expected = logits(model)
    with model.disable_adapter():
        off = logits(model)
    assert torch.equal(logits(model), expected)
    assert torch.equal(off, logits(solidify.load(normed).double()))


def test_the_base_in_memory_stays_the_artifact(normed: Path) -> None:
    model = trained(solidify.attach(solidify.load(normed), lora=LORA))
    base = base_state.require(model)
    base_state.refuse_changed(model, base)
    kinds = {name: kind for kind, name, _ in lookup.named_buffers(model) if "running_mean" in name}
    assert kinds
    assert {"base", "full"} == {k for k, n, _ in lookup.named_buffers(model) if "running_mean" in n}


@pytest.mark.slow
def test_accuracy_in_memory_is_accuracy_in_a_fresh_process(normed: Path, tmp_path: Path) -> None:
    model = trained(solidify.attach(solidify.load(normed), lora=LORA), 6)
    solidify.save_adapter(model, tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = (
        "import sys, torch, pico, solidify\n"
        "from solidify.model import anatomy\n"
        "model = solidify.load(sys.argv[1], sys.argv[2])\n"
        "found = anatomy.run(model, {'input_ids': pico.tokens()})\n"
        "sys.exit(0 if torch.equal(found, torch.load(sys.argv[3])) else 1)\n"
    )
    arguments = [str(normed), str(tmp_path / "adapter"), str(tmp_path / "expected.pt")]
    environment = {**os.environ, "PYTHONPATH": str(Path(pico.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, env=environment)
    assert done.returncode == 0


def test_peft_s_own_loading_takes_the_buffers_that_a_file_holds(normed: Path, tmp_path: Path) -> None:
    other = trained(solidify.attach(solidify.load(normed), lora=LORA))
    expected = logits(other)
    other.save_pretrained(tmp_path / "plain")
    model = trained(solidify.attach(solidify.load(normed), lora=LORA), steps=1)
    before = logits(model)
    model.load_adapter(str(tmp_path / "plain"), "three")
    assert torch.equal(logits(model), before)
    model.set_adapter("three")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_peft_s_own_loading_of_a_file_without_buffers_leaves_the_base_s(normed: Path, tmp_path: Path) -> None:
    still = solidify.attach(solidify.load(normed), lora=LORA)
    with torch.no_grad():
        for parameter in (p for p in still.parameters() if p.requires_grad):
            parameter.add_(0.1)
    still.eval()
    expected = logits(still)
    solidify.save_adapter(still, tmp_path / "still")
    model = trained(solidify.attach(solidify.load(normed), lora=LORA))
    before = logits(model)
    model.load_adapter(str(tmp_path / "still"), "three")
    model.set_adapter("three")
    assert torch.equal(logits(model), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)


def test_peft_s_own_loading_of_our_moved_buffers_is_refused_and_leaves_nothing(normed: Path, tmp_path: Path) -> None:
    solidify.save_adapter(trained(solidify.attach(solidify.load(normed), lora=LORA)), tmp_path / "moved")
    model = trained(solidify.attach(solidify.load(normed), lora=LORA), steps=1)
    before, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"norm.running_mean.* load it with solidify.load_adapter"):
        model.load_adapter(str(tmp_path / "moved"), "three")
    assert set(model.peft_config) == {"default"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert state.keys() == model.state_dict().keys() and torch.equal(logits(model), before)


def test_a_copy_and_buffers_that_another_adapter_moved_inside_it_do_not_run_together(normed: Path) -> None:
    model = solidify.attach(solidify.load(normed), train=["model.layers.1.mlp"])
    model = solidify.attach(model, lora=LORA, name="two")
    model.base_model.set_adapter(["default", "two"])  # nothing has moved yet
    model.set_adapter("two")
    trained(model)
    with pytest.raises(AdapterError, match=r"cannot be active together: .*model.layers.1.mlp.norm.running_mean"):
        model.base_model.set_adapter(["default", "two"])
    assert model.active_adapters == ["two"]
