"""Traps of saving and loading: each test shows the plain way failing, and ours working or refusing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pico
import pytest
import torch
from pico import wrappers
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

import solidify
from solidify.errors import ArtifactError
from solidify.model import anatomy
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.recipe import references

sys.path.insert(0, str(Path(__file__).parent))

import plain_models as plain

pytestmark = pytest.mark.slow

DROPPED = ("model_type", "architectures", "transformers_version")


def custom_config(base: OlmoeConfig) -> plain.TrashConfig:
    return plain.TrashConfig(**{k: v for k, v in base.to_dict().items() if k not in DROPPED})


def dirty_the_heap() -> None:
    """Fills memory that is free now, so that what is never initialised cannot be right by luck."""
    blocks = [torch.full((n,), 7e8) for n in (1, 16, 32, 64, 512, 1024) for _ in range(200)]
    del blocks


def test_weights_loaded_in_a_constructor_are_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = pico.olmoe()
    state = plain.PlainMLP(base.config).state_dict()
    torch.save(state, tmp_path / "mlp.pth")
    monkeypatch.setenv("CUSTOM_MODULE_WEIGHTS_PATH", str(tmp_path / "mlp.pth"))
    made = plain.LoadsInConstructor(custom_config(base.config))
    assert not torch.equal(made.model.layers[0].mlp.up.weight, state["up.weight"])
    assert not made.model.layers[0].mlp.up.bias.any()

    solidify.replace(base, "model.layers.0.mlp", wrappers.PlainMLP, weights=tmp_path / "mlp.pth")
    assert torch.equal(base.model.layers[0].mlp.up.weight, state["up.weight"])
    assert torch.equal(base.model.layers[0].mlp.up.bias, state["up.bias"])


def test_save_pretrained_does_not_copy_code_by_itself(trash_artifact: Path, tmp_path: Path) -> None:
    plain.TrashModel(custom_config(pico.olmoe().config)).save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")

    assert {p.name for p in trash_artifact.glob("*.py")} >= {"modeling_solid_olmoe.py", "trashcan_moe.py"}
    assert "AutoModelForCausalLM" in json.loads((trash_artifact / "config.json").read_text())["auto_map"]


def test_a_bare_model_has_none_of_a_heads_abilities(trash_artifact: Path) -> None:
    from peft import LoraConfig, get_peft_model

    bare = plain.BareModel(plain.BareConfig())
    with pytest.raises(AttributeError, match="generate"):
        bare.generate(pico.tokens())
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        get_peft_model(bare, LoraConfig(task_type="CAUSAL_LM", target_modules=["internal_linear_1"]))

    assert solidify.load(trash_artifact).generate(pico.tokens(1, 4), max_new_tokens=2).shape == (1, 6)


def test_buffers_that_are_not_saved_come_back_as_garbage(tmp_path: Path) -> None:
    plain.TrashConfig.register_for_auto_class("AutoConfig")
    plain.ForgetfulModel.register_for_auto_class("AutoModelForCausalLM")
    made = plain.ForgetfulModel(custom_config(pico.olmoe().config))
    made.save_pretrained(tmp_path / "plain_buffer")
    dirty_the_heap()
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain_buffer", trust_remote_code=True, output_loading_info=True
    )
    assert not torch.equal(again.model.layers[0].mlp.table, made.model.layers[0].mlp.table)
    assert again.model.layers[0].mlp.number.is_meta
    assert not info["missing_keys"]  # nothing is said

    for how in ("buffer", "attribute"):
        model = pico.olmoe()
        edits = solidify.replace(
            model, "model.layers.0.mlp", wrappers.Forgetful, declares={"half_precision": False}, arguments={"how": how}
        )
        with pytest.raises(ArtifactError, match="a parameter or a persistent buffer"):
            solidify.build(model, edits, tmp_path / "ours")


def test_a_declared_parameter_is_not_what_was_declared(tmp_path: Path) -> None:
    pico.olmoe().save_pretrained(tmp_path / "base")
    dirty_the_heap()
    loaded = plain.GatedModel.from_pretrained(tmp_path / "base")
    assert not torch.equal(loaded.model.layers[0].mlp.trash_bias, torch.full((32,), 0.5))

    model = pico.olmoe()
    solidify.replace(model, "model.layers.*.mlp", TrashCanMoE, arguments={"threshold": -3.0})
    assert float(model.model.layers[0].mlp.trash.bias) == -3.0


def test_a_type_of_its_own_turns_the_conversion_of_expert_weights_off(tmp_path: Path) -> None:
    base = pico.olmoe()
    base.save_pretrained(tmp_path / "base")
    loaded, info = plain.TrashModel.from_pretrained(
        tmp_path / "base", config=custom_config(base.config), output_loading_info=True
    )
    kept = loaded.model.layers[1].mlp.experts
    assert any("experts.0" in key for key in info["unexpected_keys"])
    assert not torch.equal(kept.gate_up_proj, base.model.layers[1].mlp.experts.gate_up_proj)

    edits = solidify.replace(base, "model.layers.0.mlp", wrappers.PlainMLP)
    pico.artifact(base, edits, tmp_path / "ours")
    ours = solidify.load(tmp_path / "ours").model.layers[1].mlp.experts
    assert torch.equal(ours.gate_up_proj, base.model.layers[1].mlp.experts.gate_up_proj)


def test_an_instance_keeps_the_old_type_while_its_class_says_the_new_one(tmp_path: Path) -> None:
    base = pico.olmoe()
    base.save_pretrained(tmp_path / "base")
    config = plain.TrashConfig.from_pretrained(tmp_path / "base")
    assert (config.model_type, type(config).model_type) == ("olmoe", "plain-trash-olmoe")
    loaded = plain.TrashModel.from_pretrained(tmp_path / "base", config=config)
    experts = loaded.model.layers[1].mlp.experts.gate_up_proj.clone()
    assert torch.equal(experts, base.model.layers[1].mlp.experts.gate_up_proj)  # right now, all is well
    loaded.save_pretrained(tmp_path / "plain_type")
    again = plain.TrashModel.from_pretrained(tmp_path / "plain_type")
    assert not torch.equal(again.model.layers[1].mlp.experts.gate_up_proj, experts)

    edits = solidify.replace(base, "model.layers.0.mlp", wrappers.PlainMLP)
    pico.artifact(base, edits, tmp_path / "ours")
    ours = solidify.load(tmp_path / "ours")
    assert ours.config.model_type == type(ours.config).model_type
    ours.save_pretrained(tmp_path / "saved again")
    assert torch.equal(
        solidify.load(tmp_path / "ours").model.layers[1].mlp.experts.gate_up_proj,
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved again", trust_remote_code=True)
        .model.layers[1]
        .mlp.experts.gate_up_proj,
    )


def test_an_old_weight_of_the_same_name_slips_into_the_new_module(tmp_path: Path) -> None:
    base = pico.olmoe()
    base.save_pretrained(tmp_path / "base")
    loaded = plain.SameNamesModel.from_pretrained(tmp_path / "base")
    assert torch.equal(loaded.model.layers[0].mlp.gate.weight, base.model.layers[0].mlp.gate.weight)

    router = base.model.layers[0].mlp.gate.weight.clone()
    edits = solidify.replace(base, "model.layers.0.mlp", wrappers.SameNames)
    assert not torch.equal(base.model.layers[0].mlp.gate.weight, router)
    assert edits[0].tensors["model.layers.0.mlp.gate.weight"] is None
    assert "model.layers.0.mlp.gate.weight" in edits[0].dropped


def test_surgery_in_memory_is_not_saved(tmp_path: Path) -> None:
    model = pico.olmoe()
    model.set_submodule("model.layers.0.mlp", wrappers.PlainMLP(model.config))
    logits = anatomy.run(model, {"input_ids": pico.tokens()})
    model.save_pretrained(tmp_path / "plain")
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert type(again.model.layers[0].mlp).__name__ == "OlmoeSparseMoeBlock"
    assert not torch.equal(anatomy.run(again, {"input_ids": pico.tokens()}), logits)

    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", wrappers.PlainMLP)
    logits = anatomy.run(model, {"input_ids": pico.tokens()})
    pico.artifact(model, edits, tmp_path / "ours")
    assert torch.equal(anatomy.run(solidify.load(tmp_path / "ours"), {"input_ids": pico.tokens()}), logits)


SOURCE = """
{imports}
from torch import nn
from transformers import OlmoeConfig, OlmoeForCausalLM

class Config{n}(OlmoeConfig):
    model_type = "plain-code"

class Signed(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original
    def forward(self, x):
        return {sign} self.original(x)

class Model{n}(OlmoeForCausalLM):
    config_class = Config{n}
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = Signed(self.model.layers[0].mlp)
        self.post_init()
"""

CONFIGURATION = """
from transformers import OlmoeConfig

class Config(OlmoeConfig):
    model_type = "plain-code"
"""

MODELLING = """
from torch import nn
from transformers import OlmoeForCausalLM
from .configuration_code import Config

class Signed(nn.Module):
    def __init__(self, original):
        super().__init__()
        self.original = original
    def forward(self, x):
        return {sign} self.original(x)

class Model(OlmoeForCausalLM):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = Signed(self.model.layers[0].mlp)
        self.post_init()
"""


def hand_made(directory: Path, sign: str, state: dict[str, torch.Tensor], config: dict[str, object]) -> None:
    """Writes a remote-code model by hand."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    (directory / "configuration_code.py").write_text(CONFIGURATION)
    (directory / "modeling_code.py").write_text(MODELLING.format(sign=sign))
    auto_map = {"AutoConfig": "configuration_code.Config", "AutoModelForCausalLM": "modeling_code.Model"}
    values = {**config, "model_type": "plain-code", "architectures": ["Model"], "auto_map": auto_map}
    (directory / "config.json").write_text(json.dumps(values))
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def wrapped_state() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    model = pico.olmoe()
    state = {k.replace("layers.0.mlp.", "layers.0.mlp.original."): t for k, t in model.state_dict().items()}
    return state, json.loads(model.config.to_json_string())


def test_two_models_in_directories_of_one_name_run_the_first_ones_code(tmp_path: Path) -> None:
    outputs = []
    for sign in ("", "-"):
        hand_made(tmp_path / f"place{sign}" / "model", sign, *wrapped_state())
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"place{sign}" / "model", trust_remote_code=True)
        outputs.append(anatomy.run(loaded, {"input_ids": pico.tokens()}))
    assert torch.equal(*outputs)  # the second should differ: its sign is another

    ours = []
    for sign in ("", "-"):
        place = tmp_path / f"ours{sign}"
        place.mkdir()
        (place / "mine.py").write_text(SOURCE.format(imports="", sign=sign, n=""))
        model = pico.olmoe()
        edits = solidify.replace(model, "model.layers.0.mlp", references.resolve("mine.py:Signed", place))
        pico.artifact(model, edits, place / "same_name")
        ours.append(anatomy.run(solidify.load(place / "same_name"), {"input_ids": pico.tokens()}))
    assert not torch.equal(*ours)


def test_code_that_was_edited_in_place_goes_unnoticed(tmp_path: Path, trash_artifact: Path) -> None:
    hand_made(tmp_path / "edited_in_place", "", *wrapped_state())
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "edited_in_place", trust_remote_code=True)
    (tmp_path / "edited_in_place" / "modeling_code.py").write_text(MODELLING.format(sign="-"))
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "edited_in_place", trust_remote_code=True)
    inputs = {"input_ids": pico.tokens()}
    assert torch.equal(anatomy.run(first, inputs), anatomy.run(second, inputs))

    import shutil

    ours = Path(shutil.copytree(trash_artifact, tmp_path / "ours"))
    solidify.load(ours)
    (ours / "trashcan_moe.py").write_text((ours / "trashcan_moe.py").read_text().replace(">= 0", "<= 0"))
    with pytest.raises(ArtifactError, match=r"trashcan_moe.py is not the file that was written"):
        solidify.load(ours)


def test_a_class_registered_in_the_process_wins_over_the_models_own_code(tmp_path: Path) -> None:
    hand_made(tmp_path / "registered", "-", *wrapped_state())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "registered", trust_remote_code=True)
    config_class = type(loaded.config)
    before = dict(AutoModelForCausalLM._model_mapping._extra_content)
    impostor = type("Model", (OlmoeForCausalLM,), {"config_class": config_class})
    AutoModelForCausalLM.register(config_class, impostor, exist_ok=True)
    try:
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "registered", trust_remote_code=True)
    finally:
        AutoModelForCausalLM._model_mapping._extra_content = before
    assert type(again) is impostor
    assert not torch.equal(
        anatomy.run(loaded, {"input_ids": pico.tokens()}), anatomy.run(again, {"input_ids": pico.tokens()})
    )


@pytest.mark.parametrize(
    ("line", "fails"),
    [
        ("from a_helper_of_mine import x", "at load"),
        pytest.param("from . import a_helper_of_mine", "at load", marks=pytest.mark.slow),
        ("from ..a_helper_of_mine import x", "at save"),
    ],
)
def test_imports_that_the_saver_does_not_follow_break_the_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, fails: str
) -> None:
    package = tmp_path / "outer_package" / "inner_package"
    package.mkdir(parents=True)
    for place in (package, package.parent):
        (place / "__init__.py").write_text("")
        (place / "a_helper_of_mine.py").write_text("x = 1\n")
    (package / "code_of_mine.py").write_text(SOURCE.format(imports=line, sign="", n="A"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(package))
    for name in [n for n in sys.modules if n.startswith("outer_package") or n == "a_helper_of_mine"]:
        monkeypatch.delitem(sys.modules, name)
    import importlib

    module = importlib.import_module("outer_package.inner_package.code_of_mine")
    module.ConfigA.register_for_auto_class("AutoConfig")
    module.ModelA.register_for_auto_class("AutoModelForCausalLM")
    values = {k: v for k, v in pico.olmoe().config.to_dict().items() if k not in DROPPED}
    made = module.ModelA(module.ConfigA(**values))
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", module.Signed)
    assert all(finding.passed for finding in solidify.build(model, edits, tmp_path / "ours").findings)

    target = tmp_path / f"saved_{abs(hash(line))}"
    if fails == "at save":
        with pytest.raises(FileNotFoundError):
            made.save_pretrained(target)
    else:
        made.save_pretrained(target)
        monkeypatch.undo()
        sys.modules.pop("a_helper_of_mine", None)
        with pytest.raises(ImportError):
            AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)


def test_a_class_typed_into_a_session_is_saved_without_its_code(tmp_path: Path) -> None:
    typed = type("Typed", (plain.TrashModel,), {"__module__": "__main__"})
    typed.register_for_auto_class("AutoModelForCausalLM")  # type: ignore[attr-defined]
    typed(custom_config(pico.olmoe().config)).save_pretrained(tmp_path / "plain")
    assert not any("class Typed" in path.read_text() for path in (tmp_path / "plain").glob("*.py"))
    assert "AutoModelForCausalLM" not in (tmp_path / "plain" / "config.json").read_text()

    module = type("TypedModule", (wrappers.Scaled,), {"__module__": "__main__"})
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.0.mlp", module)
    with pytest.raises(ArtifactError, match=r"TypedModule (was made at run time|is defined) in __main__"):
        solidify.build(model, edits, tmp_path / "ours")


def test_a_subclass_in_another_file_loses_the_fast_experts(
    trash_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = custom_config(pico.olmoe().config)
    for cls in OlmoeForCausalLM.__mro__:  # as in a process that has built no stock OLMoE before
        monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value", raising=False)
    made = plain.TrashModel(config)
    assert made.config._experts_implementation == "eager"
    assert not made._can_set_experts_implementation()

    assert solidify.load(trash_artifact).config._experts_implementation == "grouped_mm"
    assert solidify.load(trash_artifact)._can_set_experts_implementation()


def test_a_cast_after_loading_changes_what_is_computed_and_not_saved(tmp_path: Path) -> None:
    model = pico.olmoe().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    again = OlmoeForCausalLM.from_pretrained(tmp_path / "plain").eval()
    inputs = {"input_ids": pico.tokens()}
    assert model.model.rotary_emb.inv_freq.dtype != again.model.rotary_emb.inv_freq.dtype
    assert not torch.equal(anatomy.run(model, inputs), anatomy.run(again, inputs))

    edits = solidify.replace(model, "model.layers.0.mlp", TrashCanMoE)
    with pytest.raises(ArtifactError, match=r"was the model cast with .to\(dtype\)"):
        solidify.build(model, edits, tmp_path / "ours")


def test_a_scalar_among_the_weights_moves_all_matrices_behind_it_off_their_alignment(tmp_path: Path) -> None:
    """A mapped matrix at another alignment gives other last bits in some kernels; then no reload is bit-identical."""
    model = pico.olmoe()
    solidify.replace(model, "model.layers.*.mlp", TrashCanMoE)
    model.save_pretrained(tmp_path / "plain")
    from safetensors.torch import load_file

    from solidify.weights import store

    state = load_file(tmp_path / "plain" / "model.safetensors")
    assert any(t.data_ptr() % 64 for t in state.values() if t.ndim >= 2)

    store.store(model.state_dict(), tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    assert not any(t.data_ptr() % 64 for t in ours.values() if t.ndim >= 2)
