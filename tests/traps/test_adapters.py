"""Traps of PEFT: each test shows the plain way failing, and ours working or refusing."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pico
import pytest
import torch
from memory_merge import merge_in_memory
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from pico import wrappers
from safetensors.torch import load_file, save_file

import solidify
from solidify.adapter import adapters, lookup, storage
from solidify.directory import manifest
from solidify.errors import AdapterError, ArtifactError
from solidify.model import anatomy
from training import awake

pytestmark = pytest.mark.slow

Q = "model.layers.*.self_attn.q_proj"
QS = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    return anatomy.run(model, {"input_ids": pico.tokens()})


def perturbed(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def lora_parents(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (LoraLayer, BaseTunerLayer)) and name}


def test_expert_conversion_hijacks_the_names_of_a_new_modules_layers(tmp_path: Path) -> None:
    model = pico.olmoe()
    model.set_submodule("model.layers.0.mlp", wrappers.RouterlessMoE(model.config))
    names = [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hijacked = get_peft_model(model, config)
    assert all(".layers.1.mlp.experts" in name for name in lora_parents(hijacked))

    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", wrappers.RouterlessMoE)
    with pytest.raises(AdapterError, match="PEFT did not do what was declared"):
        solidify.attach(model, lora={"r": 2, "target_modules": names})
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", wrappers.RouterlessMoE)
    pico.artifact(model, edits, tmp_path / "ours")
    ours = solidify.attach(solidify.load(tmp_path / "ours"), lora={"r": 2, "target_modules": names})
    assert {lookup.canonical(ours, name) for name in lora_parents(ours)} == set(names)


def test_only_a_new_module_and_no_lora_is_refused_by_peft(trash_artifact: Path) -> None:
    for nothing in ([], None):
        with pytest.raises(ValueError, match=r"No modules were targeted|No `target_modules` passed"):
            config = LoraConfig(target_modules=nothing, modules_to_save=["model.layers.0.mlp"])
            get_peft_model(pico.olmoe(), config)

    model = solidify.attach(solidify.load(trash_artifact), train=["model.layers.0.mlp.trash"])
    trained = {name for kind, name, p in lookup.named_parameters(model) if p.requires_grad}
    assert trained == {"model.layers.0.mlp.trash.weight"}


def test_modules_to_save_matches_endings_without_a_dot() -> None:
    config = LoraConfig(target_modules=QS, modules_to_save=["1.mlp"])
    model = get_peft_model(pico.olmoe(12), config)
    wrapped = {n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
    assert {name.split(".layers.")[1].split(".")[0] for name in wrapped} == {"1", "11"}

    model = solidify.attach(pico.olmoe(12), train=["model.layers.1.mlp"])
    trained = {name for kind, name, p in lookup.named_parameters(model) if p.requires_grad}
    assert {name.split(".")[2] for name in trained} == {"1"}
    with pytest.raises(AdapterError, match=r"'1.mlp' hits nothing"):
        solidify.attach(pico.olmoe(12), train=["1.mlp"])


def test_a_name_in_modules_to_save_that_hits_nothing_is_ignored() -> None:
    model = get_peft_model(pico.olmoe(), LoraConfig(target_modules=QS, modules_to_save=["model.norn"]))
    assert not any("modules_to_save" in name for name, _ in model.named_parameters())

    with pytest.raises(AdapterError, match=r"'model.norn' hits nothing; close to it: model.norm"):
        solidify.attach(pico.olmoe(), lora={"target_modules": [Q]}, train=["model.norn"])


def test_modules_to_save_cannot_name_a_single_parameter() -> None:
    config = LoraConfig(target_modules=QS, modules_to_save=["model.layers.0.mlp.gate.weight"])
    model = get_peft_model(pico.olmoe(), config)
    assert not any("gate.weight" in name for name, p in model.named_parameters() if p.requires_grad)

    ours = solidify.attach(pico.olmoe(), train=["model.layers.0.mlp.gate.weight"])
    assert {n for _, n, p in lookup.named_parameters(ours) if p.requires_grad} == {"model.layers.0.mlp.gate.weight"}


def test_modules_to_save_copies_and_the_totals_grow() -> None:
    model = pico.olmoe()
    before = sum(p.numel() for p in model.parameters())
    copied = get_peft_model(model, LoraConfig(target_modules=QS, modules_to_save=["model.layers.0.mlp"]))
    total = sum(p.numel() for p in copied.parameters())
    block = sum(p.numel() for p in pico.olmoe().model.layers[0].mlp.parameters())
    lora = 2 * 2 * 8 * 32
    assert total == before + block + lora  # not what the usual checklist expects

    ours = solidify.attach(pico.olmoe(), train=["model.layers.0.mlp.gate.weight"])
    assert sum(p.numel() for p in ours.parameters()) == before + 8 * 32  # only what is trained has a second version


def test_what_was_frozen_on_purpose_becomes_trainable(tmp_path: Path) -> None:
    model = pico.olmoe()
    model.set_submodule("model.layers.0.mlp", wrappers.PartlyFrozen(model.model.layers[0].mlp))
    plain = get_peft_model(model, LoraConfig(target_modules=QS, modules_to_save=["model.layers.0.mlp"]))
    assert any("fixed.weight" in n for n, p in plain.named_parameters() if p.requires_grad)

    model = pico.olmoe()
    solidify.replace(model, "model.layers.0.mlp", wrappers.PartlyFrozen)
    ours = solidify.attach(model, train=["model.layers.0.mlp"])
    trained = {name for _, name, p in lookup.named_parameters(ours) if p.requires_grad}
    assert trained == {"model.layers.0.mlp.free.weight", "model.layers.0.mlp.free.bias"}


def test_a_regulariser_over_modules_counts_the_frozen_twins_too(trash_artifact: Path) -> None:
    model = solidify.attach(solidify.load(trash_artifact), train=["model.layers.*.mlp"])
    found = [m for m in model.modules() if type(m).__name__ == "TrashCanMoE"]
    assert len(found) == 4  # two layers

    ours = [place for place in lookup.modules(model) if type(place.inner).__name__ == "TrashCanMoE"]
    assert [place.name for place in ours] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all(p.requires_grad for place in ours for p in place.inner.trash.parameters())


def test_isinstance_finds_nothing_in_a_model_with_remote_code(trash_artifact: Path) -> None:
    from solidify.modules.trashcan_moe import TrashCanMoE
    from solidify.objective.capture import Capture

    model = solidify.load(trash_artifact)
    assert not any(isinstance(module, TrashCanMoE) for module in model.modules())  # the regulariser would be zero

    assert len(Capture(class_name="TrashCanMoE", count=2).find(model)) == 2


def saved_by_peft(model: PeftModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def test_get_peft_model_does_not_load_an_adapter(trash_artifact: Path, tmp_path: Path) -> None:
    trained = perturbed(solidify.attach(solidify.load(trash_artifact), lora={"r": 2, "target_modules": [Q]}))
    expected, base = logits(trained), logits(solidify.load(trash_artifact))
    solidify.save_adapter(trained, tmp_path / "adapter")
    fresh = get_peft_model(solidify.load(trash_artifact), PeftConfig.from_pretrained(tmp_path / "adapter")).eval()
    assert torch.equal(logits(fresh), base)  # no error, no warning, no adapter

    assert torch.equal(logits(solidify.load(trash_artifact, tmp_path / "adapter")), expected)


def test_load_state_dict_of_an_adapter_file_does_nothing(trash_artifact: Path, tmp_path: Path) -> None:
    trained = perturbed(solidify.attach(solidify.load(trash_artifact), lora={"r": 2, "target_modules": [Q]}))
    solidify.save_adapter(trained, tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / storage.WEIGHTS)
    model = solidify.load(trash_artifact)
    base = logits(model)
    assert len(model.load_state_dict(state, strict=False).unexpected_keys) == len(state)
    assert torch.equal(logits(model), base)

    assert not torch.equal(logits(solidify.load(trash_artifact, tmp_path / "adapter")), base)


def test_missing_adapter_keys_are_only_a_warning_and_additional_ones_nothing(
    trash_artifact: Path, tmp_path: Path
) -> None:
    trained = perturbed(solidify.attach(solidify.load(trash_artifact), lora={"r": 2, "target_modules": [Q]}))
    directory = solidify.save_adapter(trained, tmp_path / "adapter")
    state = load_file(directory / storage.WEIGHTS)
    del state[next(iter(state))]
    state["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(state, directory / storage.WEIGHTS, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(solidify.load(trash_artifact), directory)

    with pytest.raises(AdapterError, match="is not what was written"):
        solidify.load(trash_artifact, directory)


def test_an_adapter_is_put_on_any_base_whose_names_agree(trash_artifact: Path, tmp_path: Path) -> None:
    trained = perturbed(solidify.attach(solidify.load(trash_artifact), lora={"r": 2, "target_modules": [Q]}))
    directory = solidify.save_adapter(trained, tmp_path / "adapter")
    expected = logits(trained)
    other_weights, other_code = pico.olmoe(seed=1), pico.olmoe()
    other_code.model.layers[0].mlp.forward = lambda hidden_states: -hidden_states
    for base in (other_weights, other_code):
        plain = PeftModel.from_pretrained(base, directory).eval()
        assert not torch.equal(logits(plain), expected)  # wrong, and nobody says so

    for base in (other_weights, other_code):
        with pytest.raises(AdapterError, match="is not an artifact, so solidify could not tell"):
            solidify.load_adapter(base, directory)
    # With artifacts as bases: tests/adapter/test_adapters.py::test_another_base_is_refused_with_what_differs


def test_an_adapter_of_an_edited_model_loses_its_custom_part_on_the_original(tmp_path: Path) -> None:
    edited = pico.olmoe()
    edited.set_submodule("model.layers.0.mlp", wrappers.PlainMLP(edited.config))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[*QS, "model.layers.0.mlp.up"])
    trained = perturbed(get_peft_model(edited, config))
    expected = logits(trained)
    directory = saved_by_peft(trained, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(pico.olmoe(), directory).eval()
    assert not torch.equal(logits(plain), expected)
    assert not any("mlp.up" in name for name, _ in plain.named_parameters())

    edited = pico.olmoe()
    solidify.replace(edited, "model.layers.0.mlp", wrappers.PlainMLP)
    peft_model = solidify.attach(edited, lora={"r": 2, "target_modules": [Q]})
    with pytest.raises(AdapterError, match="build a changed model and load it with"):
        solidify.save_adapter(peft_model, tmp_path / "ours")


def test_unload_leaves_the_trained_copy_in_place(trash_artifact: Path) -> None:
    base = logits(solidify.load(trash_artifact))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=QS, modules_to_save=["model.norm"])
    model = perturbed(get_peft_model(solidify.load(trash_artifact), config))
    assert not torch.equal(logits(model.unload()), base)

    model = perturbed(solidify.attach(solidify.load(trash_artifact), train=["model.norm"]))
    assert torch.equal(logits(model.unload()), base)
    model = perturbed(solidify.attach(solidify.load(trash_artifact), train=["model.norm"]))
    with adapters.switched_off(model):
        assert torch.equal(logits(model), base)


def test_a_safe_merge_does_not_look_at_modules_trained_in_full(trash_artifact: Path) -> None:
    def broken() -> PeftModel:
        model = solidify.attach(solidify.load(trash_artifact), train=["model.norm"])
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad)[0] = float("nan")
        return model

    assert torch.isnan(broken().merge_and_unload(safe_merge=True).model.norm.weight).any()

    with pytest.raises(AdapterError, match=r"model.norm.weight holds NaN or infinity"):
        merge_in_memory(broken())


def test_saving_the_base_out_of_a_peft_model_writes_a_wreck(tmp_path: Path) -> None:
    model = perturbed(get_peft_model(pico.olmoe(), LoraConfig(target_modules=QS, modules_to_save=["model.norm"])))
    expected = logits(model)
    model.get_base_model().save_pretrained(tmp_path / "plain")
    from transformers import OlmoeForCausalLM

    assert not torch.equal(logits(OlmoeForCausalLM.from_pretrained(tmp_path / "plain").eval()), expected)

    base = pico.olmoe()
    edits = solidify.replace(base, "model.layers.0.mlp", wrappers.PlainMLP)
    carrying = solidify.attach(base, lora={"r": 2, "target_modules": [Q]}).get_base_model()
    with pytest.raises(ArtifactError, match="the model carries an adapter"):
        solidify.build(carrying, edits, tmp_path / "ours")


def test_a_merged_model_in_the_adapters_directory_is_adapted_twice(trash_artifact: Path, tmp_path: Path) -> None:
    pico.olmoe().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM, OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(tmp_path / "base")
    trained = perturbed(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=QS)))
    expected = logits(trained)
    saved_by_peft(trained, tmp_path / "adapter")
    trained.merge_and_unload().save_pretrained(tmp_path / "adapter")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert float((logits(twice) - expected).abs().max()) > 1e-4

    ours = solidify.save_adapter(awake(trash_artifact), tmp_path / "ours")
    with pytest.raises(ArtifactError, match="is an input of the merge"):
        solidify.merge(ours, ours)


def test_an_adapter_forgets_where_its_base_is(
    trash_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trash_artifact, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)
    saved_by_peft(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=QS)), tmp_path / "plain")
    assert PeftConfig.from_pretrained(tmp_path / "plain").base_model_name_or_path == "base"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"base|connect"):
        AutoModelForCausalLM.from_pretrained("base", trust_remote_code=True)

    ours = solidify.save_adapter(awake(tmp_path / "base"), tmp_path / "ours")
    assert storage.find_base(manifest.read(ours), ours) == tmp_path / "base"
