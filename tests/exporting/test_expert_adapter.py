"""`solidify export ADAPTER --as LAYOUT`: what is written means the updates that the adapter had."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import solidify
from solidify.__main__ import main
from solidify.adapter import expert_layouts, expert_writing
from solidify.errors import AdapterError, ArtifactError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYOUTS = tuple(expert_layouts.NAMES)


def olmoe() -> PreTrainedModel:
    return pico.olmoe(num_experts=7, intermediate_size=20)


def mixtral() -> PreTrainedModel:
    values = {**pico.SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 5}
    return pico.make("MixtralForCausalLM", **values, num_experts_per_tok=2)


def gpt_oss() -> PreTrainedModel:
    values = {**pico.SIZES, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 5}
    return pico.make("GptOssForCausalLM", **values, num_experts_per_tok=2)


MODELS = {"olmoe": olmoe, "mixtral": mixtral}


def trained(make: Callable[[], PreTrainedModel], directory: Path, **fields: object) -> Path:
    """A plain adapter on experts and attention, with numbers in all factors, and its base beside it."""
    base = directory / "base"
    make().save_pretrained(base)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"q_proj": 2},
        **fields,  # type: ignore[arg-type]
    )
    model = get_peft_model(make(), lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    model.save_pretrained(directory / "adapter")
    return directory / "adapter"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(pico.tokens()).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_every_layout_is_read_as_the_adapter_that_it_was(
    family: str, layout: str, fields: dict[str, object], tmp_path: Path
) -> None:
    make = MODELS[family]
    adapter = trained(make, tmp_path, **fields)
    made = solidify.export(adapter, tmp_path / layout, layout)
    assert made.manifest is None and [finding.passed for finding in made.findings] == [True]
    expected = logits(solidify.load_adapter(make(), adapter))
    assert torch.equal(logits(solidify.load_adapter(make(), tmp_path / layout)), expected)
    assert float((expected - logits(make())).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("family", "path", "names"),
    [
        ("olmoe", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_single_experts_have_the_names_and_the_updates_of_the_familys_checkpoints(
    family: str, path: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    """Computed by hand, in float64, from what PEFT's own fused layout means."""
    adapter = trained(MODELS[family], tmp_path)
    solidify.export(adapter, tmp_path / "lists", "lists")
    fused, single = load_file(adapter / WEIGHTS), load_file(tmp_path / "lists" / WEIGHTS)
    config = json.loads((tmp_path / "lists" / CONFIG).read_text())
    assert not config["target_parameters"] and (config["r"], config["lora_alpha"]) == (3, 5)
    for wrapped, projections in ((".base_layer", names[:2]), ("", names[2:])):
        a, b = (fused[f"base_model.model.model.layers.1.mlp.experts{wrapped}.lora_{x}.weight"].double() for x in "AB")
        experts = len(a) // 3
        for e in range(experts):
            expected = sum(torch.outer(b[:, k * experts + e], a[e * 3 + k]) for k in range(3))
            keys = [f"base_model.model.model.layers.1.{path}.{e}.{name}.lora_" for name in projections]
            found = torch.cat([single[f"{k}B.weight"].double() @ single[f"{k}A.weight"].double() for k in keys])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_command_writes_a_layout_and_the_other_one_is_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(olmoe, tmp_path)
    command = ["solidify", "export", str(adapter), "--as", "grouped", "--output", str(tmp_path / "grouped")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "read back, every update is the same" in " ".join("".join(capsys.readouterr()).split())
    key = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    before, after = load_file(adapter / WEIGHTS)[key], load_file(tmp_path / "grouped" / WEIGHTS)[key]
    assert not torch.equal(before, after)
    assert torch.equal(before.reshape(-1, 3, 7).mT.reshape(before.shape), after)


def test_what_is_not_read_back_as_it_was_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, pack = trained(olmoe, tmp_path), expert_layouts.pack

    def spoilt(factors: expert_layouts.Factors, order: str = "peft") -> tuple[torch.Tensor, torch.Tensor]:
        a, b = pack(factors, order)
        return (a, b * 1.001) if order == "grouped" else (a, b)

    monkeypatch.setattr(expert_writing.layouts, "pack", spoilt)
    with pytest.raises(AdapterError, match=r"was not read back as it was from grouped: base_model\.model\.model"):
        solidify.export(adapter, tmp_path / "grouped", "grouped")
    assert not (tmp_path / "grouped").exists()


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        ("stock", "is an adapter, which cannot be exported as 'stock'; there are peft, grouped, lists, stacked"),
        ("lists", "checkpoints of its base's family have no modules of single experts"),
    ],
)
def test_what_cannot_be_written_is_refused(form: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=sentence):
        solidify.export(trained(gpt_oss, tmp_path), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_a_model_has_no_layout_of_an_adapter(wrapped_artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"grouped is a layout of an adapter's experts, and .* is no adapter"):
        solidify.export(wrapped_artifact, tmp_path / "out", "grouped")


def test_an_export_over_an_earlier_one_says_why_it_cannot_be_told_apart(tmp_path: Path) -> None:
    adapter = trained(olmoe, tmp_path)
    solidify.export(adapter, tmp_path / "out", "lists")
    before = (tmp_path / "out" / WEIGHTS).read_bytes()
    with pytest.raises(AdapterError, match=r"carries no solidify.json: whether it is an earlier export .* remove it"):
        solidify.export(adapter, tmp_path / "out", "grouped")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == before


def lose_factor(state: dict[str, torch.Tensor]) -> None:
    del state[next(key for key in state if "experts" in key and ".lora_A." in key)]


def lose_update(state: dict[str, torch.Tensor]) -> None:
    first = next(key for key in state if "experts" in key and ".lora_A." in key)
    del state[first], state[first.replace(".lora_A.", ".lora_B.")]


def add_key(state: dict[str, torch.Tensor]) -> None:
    state[f"{next(key for key in state if 'experts' in key).partition('.lora_')[0]}.lora_A.extra"] = torch.ones(1)


def spoil_number(state: dict[str, torch.Tensor]) -> None:
    next(iter(state.values())).view(-1)[0] = float("nan")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose_factor, "lacks .*lora_A|its experts|lora_A"),
        (lose_update, "lacks .*lora_A"),
        (add_key, "lora_A.extra"),
        (spoil_number, "holds numbers that are not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_not_written_anew(
    tmp_path: Path, layout: str, spoil: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    adapter = trained(olmoe, tmp_path)
    state = load_file(adapter / WEIGHTS)
    spoil(state)
    save_file(state, adapter / WEIGHTS, {"format": "pt"})
    with pytest.raises(AdapterError, match=words) as caught:
        solidify.export(adapter, tmp_path / "out", layout)
    assert "partial" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["lists", "stacked"])
def test_biases_are_told_to_have_no_place(tmp_path: Path, layout: str) -> None:
    adapter = trained(olmoe, tmp_path, bias="lora_only")
    with pytest.raises(AdapterError, match=r"bias") as caught:
        solidify.export(adapter, tmp_path / "out", layout)
    assert "partial" not in str(caught.value)
