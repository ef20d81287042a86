"""Every start, field and kind of PEFT is right to the merge, or refused; docs/adapter_kinds.md is made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapter_kinds
import pico
import pytest
import torch
from adapter_kinds import OFFERED, STEPS, Q
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import solidify
from solidify.adapter import kinds, start_kinds
from solidify.errors import AdapterError

PAGE = Path(solidify.__file__).parents[2] / "docs" / "adapter_kinds.md"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters of these kinds


def said(model: nn.Module, lora: Any, train: Any = ()) -> str:
    with pytest.raises(AdapterError) as caught:
        solidify.attach(model, lora=lora, train=train)
    return str(caught.value)


def test_pefts_lists_are_decided() -> None:
    assert adapter_kinds.undecided() == {"starts": set(), "fields": set(), "kinds": set()}
    assert {"lora_ga", "mica", "pissa", "olora"} <= adapter_kinds.starts()


def test_what_peft_adds_is_refused_until_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(start_kinds.REFUSED_STARTS, "loftq")
    monkeypatch.delitem(kinds.REFUSED_FIELDS, "kasa_config")
    monkeypatch.delitem(kinds.REFUSED_KINDS, "IA3")
    assert adapter_kinds.undecided() == {"starts": {"loftq"}, "fields": {"kasa_config"}, "kinds": {"IA3"}}
    model = pico.llama()
    assert "init_lora_weights='loftq' is not supported: PEFT has no such start, or solidify" in said(
        model, {**Q, "init_lora_weights": "loftq"}
    )
    assert "kasa_config is not supported: solidify does not know it yet" in said(model, {**Q, "kasa_config": {"x": 1}})
    assert "the kind IA3 is not supported: solidify does not know" in said(model, {**Q, "peft_type": "IA3"})


def test_the_page_says_what_is_refused_now() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [line for line in adapter_kinds.refused_lines() if line not in text] == []
    assert "was attached" not in text
    for kind in OFFERED:
        assert f"| {kind.name} | {' | '.join(['yes'] * len(STEPS))} |" in text
    assert "**no**" not in text


@pytest.mark.parametrize("name", ["init_lora_weights='mica'", "use_bdlora, B by blocks", "all of these at once"])
def test_kinds_are_right_until_they_are_merged(wrapped_artifact: Path, tmp_path: Path, name: str) -> None:
    kind = next(kind for kind in OFFERED if kind.name == name)
    assert adapter_kinds.tried(kind, wrapped_artifact, tmp_path, merge=False).right == list(STEPS[:-1])


@pytest.mark.slow
def test_every_kind_is_right_to_the_merge_and_the_page_that_says_so(wrapped_artifact: Path, tmp_path: Path) -> None:
    found = {}
    for place, kind in enumerate(OFFERED):
        found[kind.name] = adapter_kinds.tried(kind, wrapped_artifact, tmp_path / str(place))
    PAGE.write_text(adapter_kinds.page(found), encoding="utf-8")
    assert {name: row for name, row in found.items() if row.right != list(STEPS)} == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"init_lora_weights": "loftq"},
            "init_lora_weights='loftq' is not supported: it rounds the base's weights to a few bits",
        ),
        ({"init_lora_weights": "pissa_niter_few"}, "init_lora_weights='pissa_niter_few' is not supported: PEFT has"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 is not supported: PEFT has no such start"),
        ({"init_lora_weights": None}, "init_lora_weights=None is not supported"),
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": True}, "r must be a whole number of at least 1, not True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number other than 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number from 0 to below 1"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern must be a mapping of names to whole numbers"),
        ({"target_modules": 5}, "target_modules must be a name or a list of names, not 5"),
        ({"use_dora": "yes"}, "use_dora must be true or false, not 'yes'"),
        ({"use_bdlora": {"nblock": 2}}, "use_bdlora has no 'nblock'"),
        ({"use_dora": True, "init_lora_weights": "mica"}, "use_dora and init_lora_weights='mica' cannot be combined"),
        ({"lora_bias": True}, "model.layers.0.self_attn.q_proj (Linear) has no bias to merge `lora_bias` into"),
        (
            {"target_modules": ["model.embed_tokens"], "use_bdlora": {"nblocks": 2}},
            "`use_bdlora` is for nn.Linear only",
        ),
    ],
)
def test_values_that_peft_trips_over_are_named(given: dict[str, Any], words: str) -> None:
    assert words in said(pico.llama(), {**Q, **given})


def test_a_configuration_object_is_told_apart_by_its_kind() -> None:
    model = pico.llama()
    assert "the kind IA3 is not supported" in said(model, IA3Config(target_modules=["q_proj"]))
    assert "give LoraConfig's fields as a mapping" in said(model, LoraConfig(target_modules=["q_proj"]))


class Layers(nn.Module):
    """Layers whose low-rank update is not what they do, beside their honest twins."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4, max_norm=1.0)
        self.grouped = nn.Conv1d(4, 4, 3, groups=2)
        self.wide = nn.Conv2d(4, 4, 3, dilation=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.attention = nn.MultiheadAttention(4, 2)
        self.honest = nn.ModuleList([nn.Embedding(8, 4), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)])


def test_layers_that_the_update_does_not_follow_are_refused() -> None:
    names = ["words", "grouped", "wide", "mirrored", "attention.out_proj"]
    words = said(Layers(), {"r": 2, "target_modules": names})
    for fault in ("max_norm=1.0", "groups=2", "dilation=(2, 2)", "padding_mode='reflect'", "which never calls it"):
        assert fault in words
    assert len(words.splitlines()) == 6
    assert kinds.layer_fault("x", nn.Conv1d(4, 4, 3, padding=1), None, {}) is None
    attached = get_peft_model(Layers(), LoraConfig(r=2, target_modules=["honest.0", "honest.1"]))
    assert attached is not None


def test_a_layer_whose_attributes_are_read_by_the_model_is_refused() -> None:
    """Whisper asks its convolutions for their stride, and PEFT's layer has none."""
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64, "max_source_positions": 16}
    words = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = pico.make("WhisperForConditionalGeneration", **sizes, **heads, **words, max_target_positions=16)
    words_said = said(model, {"r": 2, "target_modules": ["model.encoder.conv1"]})
    assert "does not run with the adapter on, though it does without: AttributeError" in words_said
    solidify.attach(model, lora={"r": 2, "target_modules": ["**.q_proj"]})


def test_a_start_that_changes_the_base_is_not_saved(wrapped_artifact: Path, tmp_path: Path) -> None:
    """Attached by PEFT itself, past our door."""
    model = solidify.load(wrapped_artifact)
    configuration = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="olora")
    attached = get_peft_model(model, configuration)
    with pytest.raises(AdapterError, match=r"the adapter 'default' cannot be saved: .*'olora' is not supported"):
        solidify.save_adapter(attached, tmp_path / "adapter")


def test_what_a_full_configuration_says_by_default_is_no_fault() -> None:
    """A user may copy all fields of a plain adapter."""
    given = {**LoraConfig(**{**Q, "target_modules": ["x"]}).to_dict(), **Q}
    assert kinds.faults(given) == []
    solidify.attach(pico.llama(), lora=given)
    assert torch.get_default_dtype() == torch.float32
