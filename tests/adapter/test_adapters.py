"""Attach, save, load, switch, disable and merge, for every way of training, alone and together."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from memory_merge import merge_in_memory
from peft import PeftModel
from safetensors.torch import load_file, save_file

import solidify
from solidify.adapter import adapters, lookup, storage
from solidify.errors import AdapterError, ArtifactError
from solidify.model import anatomy
from training import awake

Q = "model.layers.*.self_attn.q_proj"
INNER = ["**.o_proj.down", "**.o_proj.up"]

WAYS: dict[str, dict[str, Any]] = {
    "LoRA on the base's layers": {"lora": {"r": 4, "target_modules": [Q]}},
    "LoRA on the new module's own layers": {"lora": {"r": 4, "target_modules": INNER}},
    "a module in full, no LoRA": {"train": ["**.o_proj.up"]},
    "a whole new module in full": {"train": ["model.layers.*.self_attn.o_proj"]},
    "bare parameters, no LoRA": {"train": ["**.o_proj.scale", "**.mlp.scale"]},
    "bare parameter beside LoRA in the same module": {
        "lora": {"r": 4, "target_modules": INNER},
        "train": ["**.o_proj.scale"],
    },
    "everything together": {
        "lora": {"r": 4, "target_modules": [Q, *INNER]},
        "train": ["**.o_proj.scale", "model.norm", "model.layers.1.mlp.original.gate.weight"],
    },
    "a bias of a LoRA target": {
        "lora": {"r": 4, "target_modules": ["**.o_proj.down"]},
        "train": ["**.o_proj.down.bias"],
    },
    "LoRA on fused experts": {
        "lora": {"r": 2, "target_parameters": ["**.experts.gate_up_proj", "**.experts.down_proj"]},
        "train": ["**.o_proj.scale"],
    },
    "rsLoRA and DoRA": {"lora": {"r": 4, "use_rslora": True, "use_dora": True, "target_modules": [Q]}},
    "embeddings": {"lora": {"r": 4, "target_modules": ["model.embed_tokens"]}, "train": ["lm_head"]},
}


def attached(artifact: Path, seed: int = 0, name: str = "default", **declared: Any) -> PeftModel:
    """Attaches an adapter and gives everything it trains random values, as training would."""
    model = solidify.attach(solidify.load(artifact), name=name, **declared)
    return perturb(model, seed)


def perturb(model: PeftModel, seed: int = 0) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens()})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_comes_back_and_merges(wrapped_artifact: Path, tmp_path: Path, way: str) -> None:
    base = logits(solidify.load(wrapped_artifact))
    model = attached(wrapped_artifact, **WAYS[way])
    trained = logits(model)
    assert not torch.equal(trained, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), trained)
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load(wrapped_artifact, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    plain = PeftModel.from_pretrained(solidify.load(wrapped_artifact), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), trained)
    merged = merge_in_memory(again)
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    assert set(merged.state_dict()) == set(solidify.load(wrapped_artifact).state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_a_trainable_adapter_can_be_loaded_to_go_on(wrapped_artifact: Path, tmp_path: Path, way: str) -> None:
    model = attached(wrapped_artifact, **WAYS[way])
    names = {(kind, name) for kind, name, p in lookup.named_parameters(model) if p.requires_grad}
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load_adapter(solidify.load(wrapped_artifact), tmp_path / "adapter", trainable=True)
    assert {(kind, name) for kind, name, p in lookup.named_parameters(again) if p.requires_grad} == names


def test_training_moves_only_what_was_declared(wrapped_artifact: Path) -> None:
    model = solidify.attach(solidify.load(wrapped_artifact), **WAYS["everything together"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # in the first step LoRA's A has no gradient, because B is zero
        model(input_ids=pico.tokens(), labels=pico.tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name


def test_two_adapters_are_switched_exactly(wrapped_artifact: Path, tmp_path: Path) -> None:
    ways = {
        "one": {"lora": {"r": 4, "target_modules": [Q]}, "train": ["**.o_proj.scale", "model.norm"]},
        "two": {"lora": {"r": 2, "target_modules": ["**.v_proj"]}, "train": ["**.mlp.scale"]},
    }
    expected = {}
    for seed, (name, way) in enumerate(ways.items()):
        model = attached(wrapped_artifact, seed, **way)
        expected[name] = logits(model)
        solidify.save_adapter(model, tmp_path / name)
    model = solidify.load(wrapped_artifact)
    base = logits(model)
    for name in ways:
        model = solidify.load_adapter(model, tmp_path / name, name=name)
        assert torch.equal(logits(model), expected[name])
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), expected[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
    model.delete_adapter("two")
    model.set_adapter("one")
    assert torch.equal(logits(model), expected["one"])
    with pytest.raises(AdapterError, match="already has an adapter 'one'"):
        solidify.load_adapter(model, tmp_path / "one", name="one")


def test_an_adapter_of_another_name_is_saved_alone(wrapped_artifact: Path, tmp_path: Path) -> None:
    model = attached(wrapped_artifact, name="first", lora={"r": 2, "target_modules": [Q]})
    first = logits(model)
    model = solidify.attach(model, name="second", train=["**.mlp.scale"])
    perturb(model, 5)
    solidify.save_adapter(model, tmp_path / "first", name="first")
    assert torch.equal(logits(solidify.load(wrapped_artifact, tmp_path / "first")), first)
    with pytest.raises(AdapterError, match="no adapter 'third'; it has: first, second"):
        solidify.save_adapter(model, tmp_path / "third", name="third")


def test_generation_follows_the_adapter(wrapped_artifact: Path, tmp_path: Path) -> None:
    model = attached(wrapped_artifact, **WAYS["everything together"])
    prompt = pico.tokens(1, 6)

    def text(m: torch.nn.Module) -> list[int]:
        return m.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0].tolist()

    with_adapter = text(model)
    with model.disable_adapter():
        without = text(model)
    assert without == text(solidify.load(wrapped_artifact))
    assert with_adapter != without
    solidify.save_adapter(model, tmp_path / "adapter")
    assert text(solidify.load(wrapped_artifact, tmp_path / "adapter")) == with_adapter


def test_a_new_adapter_changes_nothing_until_it_is_trained(wrapped_artifact: Path) -> None:
    for way in WAYS.values():
        model = solidify.attach(solidify.load(wrapped_artifact), **way)
        assert torch.equal(logits(model.eval()), logits(solidify.load(wrapped_artifact)))


@pytest.fixture
def saved(wrapped_artifact: Path, tmp_path: Path) -> Path:
    return solidify.save_adapter(attached(wrapped_artifact, **WAYS["everything together"]), tmp_path / "adapter")


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None], *, forge: bool) -> None:
    """Changes the adapter's tensors; with `forge`, its manifest agrees."""
    from solidify.artifact import tensors
    from solidify.directory import manifest
    from solidify.weights import format

    state = load_file(directory / storage.WEIGHTS)
    change(state)
    save_file(state, directory / storage.WEIGHTS, metadata={"format": "pt"})
    if forge:
        record = manifest.read(directory)
        header = {storage.WEIGHTS: format.header_digest(directory / storage.WEIGHTS)}
        replace(record, tensors=tensors.digests(state.items()), headers=header).write(directory)


@pytest.mark.parametrize("forge", [False, True])
@pytest.mark.parametrize("change", ["missing LoRA", "missing full", "additional"])
def test_an_adapter_with_missing_or_additional_tensors_is_refused(
    saved: Path, wrapped_artifact: Path, forge: bool, change: str
) -> None:
    def apply(state: dict[str, torch.Tensor]) -> None:
        if change == "additional":
            state["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.zeros(2)
        else:
            ending = "lora_A.weight" if change == "missing LoRA" else "norm.weight"
            del state[next(key for key in state if key.endswith(ending))]

    rewrite(saved, apply, forge=forge)
    with pytest.raises(AdapterError):
        solidify.load(wrapped_artifact, saved)


def test_a_changed_number_is_refused(saved: Path, wrapped_artifact: Path) -> None:
    def nudge(state: dict[str, torch.Tensor]) -> None:
        next(iter(state.values())).view(-1)[0].add_(1e-6)

    rewrite(saved, nudge, forge=False)
    with pytest.raises(AdapterError, match="its digest differs"):
        solidify.load(wrapped_artifact, saved)


def test_another_base_is_refused_with_what_differs(saved: Path, tmp_path: Path) -> None:
    from pico import wrappers

    def other(name: str, seed: int, width: int) -> Path:
        model = pico.olmoe(seed=seed)
        edits = solidify.replace(model, "**.o_proj", wrappers.Bottleneck, arguments={"width": width})
        edits += solidify.replace(model, "model.layers.*.mlp", wrappers.Scaled)
        pico.artifact(model, edits, tmp_path / name)
        return tmp_path / name

    with pytest.raises(AdapterError, match="the weights differ"):
        solidify.load(other("weights", 1, 4), saved)
    with pytest.raises(AdapterError, match=r"the configuration differs(.|\n)*the source code of the modules differs"):
        solidify.load(other("configuration", 0, 6), saved)


def test_a_stock_model_is_refused_as_a_base(saved: Path, tmp_path: Path) -> None:
    pico.olmoe().save_pretrained(tmp_path / "stock")
    from transformers import AutoModelForCausalLM

    for model in (pico.olmoe(), AutoModelForCausalLM.from_pretrained(tmp_path / "stock")):
        with pytest.raises(AdapterError, match="is not an artifact"):
            solidify.load_adapter(model, saved)
    peft_model = solidify.attach(pico.olmoe(), lora={"r": 2, "target_modules": [Q]})
    with pytest.raises(AdapterError, match="build a changed model and load it with"):
        solidify.save_adapter(peft_model, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_merge_of_what_is_not_finite_is_refused(wrapped_artifact: Path) -> None:
    for way in ("a module in full, no LoRA", "bare parameters, no LoRA", "LoRA on the base's layers"):
        model = attached(wrapped_artifact, **WAYS[way])
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("nan")
        with pytest.raises(AdapterError, match=r"NaN|not finite"):
            merge_in_memory(model)


def test_plain_peft_can_merge_what_we_attached(wrapped_artifact: Path) -> None:
    model = attached(wrapped_artifact, **WAYS["everything together"])
    trained = logits(model)
    assert torch.allclose(logits(model.merge_and_unload()), trained, atol=1e-5)


def test_names_that_peft_would_read_as_endings_hit_only_what_was_named() -> None:
    model = pico.olmoe(12)
    peft_model = solidify.attach(model, train=["model.layers.1.mlp"])
    wrapped = {name for kind, name, p in lookup.named_parameters(peft_model) if p.requires_grad}
    assert all(name.startswith("model.layers.1.mlp.") for name in wrapped)
    nested = torch.nn.Module()
    nested.add_module("outer", torch.nn.Module())
    nested.outer.add_module("lin", torch.nn.Linear(4, 4))
    nested.add_module("lin", torch.nn.Linear(4, 4))
    assert adapters._match_exactly(["lin"], nested) == "lin"
    assert adapters._match_exactly(["outer.lin"], nested) == ["outer.lin"]


def test_a_tied_pair_stays_tied_when_it_is_trained(tmp_path: Path) -> None:
    from pico import wrappers

    model = pico.llama(tie_word_embeddings=True)
    edits = solidify.replace(model, "model.layers.*.mlp", wrappers.Scaled)
    pico.artifact(model, edits, tmp_path / "tied")
    trained = attached(tmp_path / "tied", train=["model.embed_tokens"])
    plain = lookup.plain_model(trained)
    embedding = plain.get_input_embeddings().weight
    assert plain.get_output_embeddings().weight is embedding
    expected = logits(trained)
    solidify.save_adapter(trained, tmp_path / "adapter")
    assert torch.equal(logits(solidify.load(tmp_path / "tied", tmp_path / "adapter")), expected)


def test_the_adapter_finds_its_base_from_any_directory(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = json.loads((saved / "adapter_config.json").read_text())
    assert os.path.isabs(config["base_model_name_or_path"])
    assert (Path(config["base_model_name_or_path"]) / "solidify.json").is_file()


def test_what_a_module_froze_itself_stays_frozen(tmp_path: Path) -> None:
    """Also after switching, and in an adapter that is loaded to go on."""
    from pico import wrappers

    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", wrappers.PartlyFrozen)
    pico.artifact(model, edits, tmp_path / "frozen")
    model = solidify.attach(solidify.load(tmp_path / "frozen"), train=["model.layers.*.mlp"])

    def trained() -> set[str]:
        found = {n for _, n, p in lookup.named_parameters(model) if p.requires_grad}
        return {name.split("mlp.")[1] for name in found}

    assert trained() == {"free.weight", "free.bias"}
    with adapters.switched_off(model):
        logits(model)
    assert trained() == {"free.weight", "free.bias"}
    model.set_adapter("default")
    assert trained() == {"free.weight", "free.bias"}
    solidify.save_adapter(model, tmp_path / "adapter")
    model = solidify.load_adapter(solidify.load(tmp_path / "frozen"), tmp_path / "adapter", trainable=True)
    assert trained() == {"free.weight", "free.bias"}


def test_saving_leaves_nothing_half_written(saved: Path, wrapped_artifact: Path, tmp_path: Path) -> None:
    model = attached(wrapped_artifact, **WAYS["bare parameters, no LoRA"])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x").write_text("x")
    with pytest.raises(ArtifactError, match="exists and is a directory that solidify did not make"):
        solidify.save_adapter(model, tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "theirs"]
    shutil.rmtree(saved)


def resident(directory: Path) -> int:
    """Returns how many kB of an artifact's weight files are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(directory) in line and line.endswith(".safetensors")
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux says what is in memory")
def test_what_is_trained_in_full_is_in_memory_once(trash_artifact: Path, tmp_path: Path) -> None:
    """The base's own values are given back to their file, and read from there when the adapter is off."""
    model = solidify.load(trash_artifact)
    inputs = {"input_ids": pico.tokens()}
    before = anatomy.run(model, inputs)
    held = resident(trash_artifact)
    copied = sum(p.nbytes for p in model.model.layers.parameters()) // 1024
    tuned = solidify.attach(model, train=["model.layers.*.mlp", "model.layers.*.self_attn.q_norm.weight"])
    inside = sum(p.nbytes for layer in model.model.layers for p in layer.mlp.parameters()) // 2048  # two of each
    assert held - resident(trash_artifact) > inside / 2, f"{held} kB before, of {copied} kB"
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.equal(anatomy.run(tuned, inputs), before)
    with tuned.disable_adapter():
        assert torch.equal(anatomy.run(tuned, inputs), before)
    path = solidify.save_adapter(tuned, tmp_path / "adapter")
    again = solidify.load(trash_artifact, path)
    assert torch.equal(anatomy.run(again, inputs), anatomy.run(tuned, inputs))


def test_nothing_that_only_upstream_can_change_is_warned_of(trash_artifact: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solidify.save_adapter(awake(trash_artifact), tmp_path / "adapter")
        solidify.load(trash_artifact, tmp_path / "adapter")
        solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    assert not [str(each.message) for each in caught if issubclass(each.category, FutureWarning)]
