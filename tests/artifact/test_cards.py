"""What the hub reads of a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import solidify
from solidify.artifact import cards, companions, loading, stock
from solidify.directory import manifest
from solidify.directory.manifest import Manifest


def values(base: Any, auto: str = "AutoModelForCausalLM", **step: Any) -> dict[str, Any]:
    record = Manifest("artifact", {}, lineage=[{"step": "training", "datasets": [], "measured": {}, **step}])
    origin = {"model": base}
    read: dict[str, Any] = yaml.safe_load(cards.metadata("transformers", ["solidify"], origin, auto, record))
    return read


def test_what_is_known_is_said() -> None:
    assert values("allenai/OLMoE", datasets=["a/b"], measured={"heldout_loss": 2.0}) == {
        "library_name": "transformers",
        "base_model": "allenai/OLMoE",
        "pipeline_tag": "text-generation",
        "tags": ["solidify"],
        "datasets": ["a/b"],
        "metrics": ["perplexity"],
    }


@pytest.mark.parametrize(
    "name", ["/home/me/base", "../base", "builtin:tiny-olmoe", "C:\\base", "~/base", None, "a/b/c"]
)
def test_a_base_that_is_not_on_the_hub_is_left_out(name: str | None) -> None:
    assert set(values(name)) == {"library_name", "pipeline_tag", "tags"}


def test_a_directory_of_that_name_is_no_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "base_model" in values("me/base")
    (tmp_path / "me" / "base").mkdir(parents=True)
    assert "base_model" not in values("me/base")


BASE_CARD = """---
license: apache-2.0
license_link: LICENSE
base_model: somebody/else
---
# The base itself
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A plain model as it stands in the hub's cache, with a card that speaks of it."""
    directory = tmp_path / "models--owner--name" / "snapshots" / "0123"
    pico.llama().save_pretrained(directory)
    (directory / "README.md").write_text(BASE_CARD)
    return directory


def read(directory: Path) -> tuple[dict[str, Any], str]:
    text = (directory / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_merged_model_does_not_claim_to_be_its_base_and_keeps_its_licence(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    solidify.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    values, text = read(tmp_path / "merged")
    assert values == {
        "library_name": "transformers",
        "base_model": "owner/name",
        "license": "apache-2.0",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["solidify"],
    }
    assert "The base itself" not in text and str(tmp_path) not in text and "adapter `" in text
    assert "# LlamaForCausalLM, fine-tuned" in text and "AutoTokenizer" not in text
    assert manifest.faults(tmp_path / "merged", manifest.read(tmp_path / "merged")) == []


def test_a_base_as_it_stands_keeps_its_own_card(base: Path, tmp_path: Path) -> None:
    loaded = loading.load_base(str(base))
    stock.build(loaded, tmp_path / "same")
    assert (tmp_path / "same" / "README.md").read_text() == BASE_CARD
    stock.build(loading.load_base(str(base), dtype="bfloat16"), tmp_path / "other")
    values, text = read(tmp_path / "other")
    assert values["license"] == "apache-2.0" and "nothing was trained" in text and "bfloat16" in text


@pytest.mark.parametrize("how", ["command", "python"])
def test_a_licence_holds_of_what_is_made_by_surgery(
    base: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    read_base = loading.load_base(str(base))
    edits = solidify.replace(read_base.model, "model.layers.*.mlp", pico.wrappers.Scaled)
    more = {"base": read_base.origin} if how == "command" else {}
    pico.artifact(read_base.model, edits, tmp_path / "artifact", **more)
    assert read(tmp_path / "artifact")[0]["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text", ["", "no header", "---\n- a list\n---\n", "---\nlicense: [a]\n---\n", "---\n: :\n---\n", BASE_CARD[:20]]
)
def test_a_card_that_says_nothing_of_a_licence_is_no_fault(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert companions.rights_in(tmp_path) == {} and companions.rights_in(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("auto", "expected"),
    [("AutoModelForCausalLM", ["perplexity", "accuracy"]), ("AutoModelForSequenceClassification", ["accuracy"])],
)
def test_only_a_loss_of_tokens_has_a_perplexity(auto: str, expected: list[str]) -> None:
    measured = {"heldout_loss_trained": 0.7, "heldout_accuracy_trained": 0.5}
    assert values(None, auto, measured=measured)["metrics"] == expected


def test_data_on_the_hub_is_told_and_files_are_not() -> None:
    data = {"train": [{"dataset": "owner/chats", "split": "train"}, "me/rows.jsonl"], "eval": "builtin:pydoc-heldout"}
    step = cards.training_step({"data": data}, {"heldout_loss": 1.0, "history": []})
    assert step == {"step": "training", "datasets": ["owner/chats"], "measured": {"heldout_loss": 1.0}}


def test_a_checkpoints_card_names_no_path(tmp_path: Path) -> None:
    card = cards.checkpoint_card(7, str(tmp_path / "base"))
    assert str(tmp_path) not in card and "step 7" in card and "`base`" in card
