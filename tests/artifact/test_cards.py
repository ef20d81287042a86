"""What the hub reads of a card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from solidify.artifact import cards
from solidify.directory.manifest import Manifest


def values(base: Any, auto: str = "AutoModelForCausalLM", **step: Any) -> dict[str, Any]:
    record = Manifest("artifact", {}, lineage=[{"step": "training", "datasets": [], "measured": {}, **step}])
    read: dict[str, Any] = yaml.safe_load(cards.metadata("transformers", ["solidify"], base, auto, record))
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


def test_data_on_the_hub_is_told_and_files_are_not() -> None:
    data = {"train": [{"dataset": "owner/chats", "split": "train"}, "me/rows.jsonl"], "eval": "builtin:pydoc-heldout"}
    step = cards.training_step({"data": data}, {"heldout_loss": 1.0, "history": []})
    assert step == {"step": "training", "datasets": ["owner/chats"], "measured": {"heldout_loss": 1.0}}


def test_a_checkpoints_card_names_no_path(tmp_path: Path) -> None:
    card = cards.checkpoint_card(7, str(tmp_path / "base"))
    assert str(tmp_path) not in card and "step 7" in card and "`base`" in card
