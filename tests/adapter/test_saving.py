"""save_adapter says that it is saved when what it wrote came back; what cannot come back is refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moving
import pico
import pytest
import torch
from peft import PeftModel
from torch import nn

import solidify
from solidify.adapter import adapter_tensors, lookup, readback
from solidify.errors import AdapterError
from solidify.model import anatomy

Q = "model.layers.*.self_attn.q_proj"
LORA: dict[str, Any] = {"r": 2, "target_modules": ["**.q_proj"]}


def noise(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens()})


HEADS = {
    "LlamaForCausalLM": ("model.layers.*.mlp", "**.q_proj"),
    "LlamaForSequenceClassification": ("model.layers.*.mlp", "**.q_proj"),
    "LlamaForTokenClassification": ("model.layers.*.mlp", "**.q_proj"),
    "BertForSequenceClassification": ("bert.encoder.layer.*.output.dense", "**.query"),
}


@pytest.fixture(scope="module", params=HEADS)
def headed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    sizes = {**pico.SIZES, "intermediate_size": 48}
    model = pico.make(request.param, **({**sizes, "num_key_value_heads": 2} if "Llama" in request.param else sizes))
    place, target = HEADS[request.param]
    directory = tmp_path_factory.mktemp(request.param) / "artifact"
    pico.artifact(model, solidify.replace(model, place, moving.Scored), directory)
    return directory, place, target


def head_of(model: Any) -> str:
    names = [name for name, _ in model.named_children()]
    return next(name for name in ("lm_head", "score", "qa_outputs", "classifier") if name in names)


def test_heads_and_modules_of_the_same_names_come_back(headed: tuple[Path, str, str], tmp_path: Path) -> None:
    directory, place, target = headed
    head = head_of(solidify.load(directory))
    lora = {"r": 2, "target_modules": [target]}
    inner = [f"{place}.score", f"{place}.classifier"]
    ways: dict[str, dict[str, Any]] = {
        "lora": {"lora": lora},
        "module": {"lora": lora, "train": [place]},
        "head": {"lora": lora, "train": [head]},
        "inner": {"train": [head, f"{place}.score"]},
        "inner lora": {"lora": {"r": 2, "target_modules": inner}, "train": [head]},
    }
    base = outputs(solidify.load(directory))
    for name, way in ways.items():
        model = noise(solidify.attach(solidify.load(directory), **way))
        expected = outputs(model)
        with model.disable_adapter():
            assert torch.equal(outputs(model), base)
        solidify.save_adapter(model, tmp_path / name)
        assert torch.equal(outputs(solidify.load(directory, tmp_path / name)), expected), name
        plain = PeftModel.from_pretrained(solidify.load(directory), tmp_path / name).eval()
        assert torch.equal(outputs(plain), expected), name


def test_task_types_by_which_peft_trains_heads_undeclared_are_left_out(wrapped_artifact: Path) -> None:
    for task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        model = solidify.attach(solidify.load(wrapped_artifact), lora={**LORA, "task_type": task})
        assert model.peft_config["default"].modules_to_save is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_named_and_nothing_is_written(
    wrapped_artifact: Path, tmp_path: Path, value: float
) -> None:
    ways: dict[str, dict[str, Any]] = {
        "lora_A": {"lora": {"r": 2, "target_modules": [Q]}},
        "norm.weight": {"train": ["model.norm"]},
        "mlp.scale": {"train": ["**.mlp.scale"]},
    }
    for words, way in ways.items():
        model = noise(solidify.attach(solidify.load(wrapped_artifact), **way))
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = value
        with pytest.raises(AdapterError, match=rf"has diverged: .*{words}.* holds NaN or infinity \(1 of"):
            solidify.save_adapter(model, tmp_path / "adapter")
        assert not list(tmp_path.iterdir())


def test_what_is_written_otherwise_is_found_before_it_is_called_saved(
    wrapped_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is put where the file is written: a tensor less, or other numbers."""
    model = noise(solidify.attach(solidify.load(wrapped_artifact), lora=LORA, train=["model.norm"]))
    held = adapter_tensors.held

    def spoilt(*args: Any) -> dict[str, torch.Tensor]:
        found = held(*args)
        key = next(key for key in found if key.endswith("norm.weight"))
        return {**found, key: found[key].detach() + 1}

    def lacking(*args: Any) -> dict[str, torch.Tensor]:
        found = held(*args)
        return {key: tensor for key, tensor in found.items() if not key.endswith("norm.weight")}

    for fault, words in ((spoilt, "has other values"), (lacking, "the file lacks")):
        calls = iter([fault])
        monkeypatch.setattr(adapter_tensors, "held", lambda *args, calls=calls: next(calls, held)(*args))
        with pytest.raises(AdapterError, match=words):
            solidify.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
    monkeypatch.undo()
    solidify.save_adapter(model, tmp_path / "adapter")


def test_state_that_no_adapter_holds_is_found_and_named(wrapped_artifact: Path, tmp_path: Path) -> None:
    model = noise(solidify.attach(solidify.load(wrapped_artifact), lora=LORA))
    module = lookup.at(model, "model.layers.0.self_attn.o_proj")
    assert module is not None
    module.inner.bypass = True
    with pytest.raises(
        AdapterError, match=r"o_proj.bypass = True, where a fresh one has False(.|\n)*logits differs by"
    ):
        solidify.save_adapter(model, tmp_path / "adapter")
    module.inner.bypass = False
    handle = lookup.owner(model, "model.norm").register_forward_hook(lambda _m, _a, out: out + 0.01)
    with pytest.raises(AdapterError, match="loaded again, it computes something else"):
        solidify.save_adapter(model, tmp_path / "adapter")
    handle.remove()
    solidify.save_adapter(model, tmp_path / "adapter")


def test_saving_changes_nothing_in_the_model(wrapped_artifact: Path, tmp_path: Path) -> None:
    model = noise(solidify.attach(solidify.load(wrapped_artifact), lora=LORA, train=["model.norm", "**.mlp.scale"]))
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    solidify.save_adapter(model, tmp_path / "adapter")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_tensor_that_is_handed_on_transposed_compares_equal(tmp_path: Path) -> None:
    model = pico.llama()
    edits = solidify.replace(model, "model.layers.*.mlp", moving.Turned)
    pico.artifact(model, edits, tmp_path / "artifact")
    trained = solidify.attach(
        solidify.load(tmp_path / "artifact"), lora={"r": 4, "target_modules": ["**.mlp.mix", "**.down_proj"]}
    )
    trained = noise(trained).train()  # as a loop leaves it: it asks for gradients, the loaded one does not
    solidify.save_adapter(trained, tmp_path / "adapter")
    again = solidify.load(tmp_path / "artifact", tmp_path / "adapter")
    with readback.alike(trained), readback.alike(again):
        assert torch.equal(outputs(again), outputs(trained))


def test_trained_in_more_digits_than_stored_is_compared_as_stored(tmp_path: Path) -> None:
    model = pico.llama(dtype=torch.bfloat16)
    pico.artifact(model, solidify.replace(model, "model.layers.*.mlp", pico.wrappers.Scaled), tmp_path / "artifact")
    trained = solidify.attach(solidify.load(tmp_path / "artifact"), lora=LORA, train=["**.mlp.scale", "model.norm"])
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    noise(trained)
    before = {name: p.detach().clone() for name, p in trained.named_parameters() if p.requires_grad}
    solidify.save_adapter(trained, tmp_path / "adapter")
    after = dict(trained.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_large_model_is_compared_by_its_tensors_and_not_run(
    wrapped_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = noise(solidify.attach(solidify.load(wrapped_artifact), lora=LORA, train=["model.norm", "**.mlp.scale"]))
    runs: list[int] = []
    handle = lookup.plain_model(model).register_forward_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(anatomy, "LARGE", 1)
    solidify.save_adapter(model, tmp_path / "adapter")
    assert not runs
    monkeypatch.undo()
    handle.remove()
    assert torch.equal(outputs(solidify.load(wrapped_artifact, tmp_path / "adapter")), outputs(model))
