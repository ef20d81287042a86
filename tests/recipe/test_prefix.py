"""`cache_prefix` in recipes: planned, refused where no batch comes again, and the same bits after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from solidify.command import views
from solidify.directory import ours
from solidify.errors import ObjectiveError, RecipeError
from solidify.recipe import datasets, dry_run, schema, stages
from solidify.training.trainer import ObjectiveTrainer

SEQUENTIAL = {"train_sampling_strategy": "sequential"}


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base of four layers, and ten rows."""
    pico.unwitnessed(monkeypatch)
    pico.llama(num_hidden_layers=4, eos_token_id=2).save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(128)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w1", eos_token="w2", unk_token="w3")
    wrapped.save_pretrained(tmp_path / "base")
    rows = [" ".join(f"w{n + place}" for place in range(4 + n % 5)) for n in range(5, 15)]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return tmp_path


def load(beside: Path, training: dict[str, Any] | None = None, **changes: Any) -> schema.Recipe:
    document = {
        "base": {"model": "base"},
        "adapter": {"train": ["model.layers.3.mlp"]},
        "data": {"train": "lines.jsonl", "max_length": 16},
        "cache_prefix": True,
        "training": {
            "max_steps": 9,  # three epochs of ten rows, two and then four to a step
            "save_steps": 2,
            "learning_rate": 0.01,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            **SEQUENTIAL,
            **(training or {}),
        },
        **changes,
    }
    (beside / "recipe.yaml").write_text(yaml.safe_dump(document))
    return schema.load(beside / "recipe.yaml")


def learned(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def test_an_interrupted_training_goes_on_to_the_same_bits(
    beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cached, at_once = tmp_path / "plain", tmp_path / "cached", tmp_path / "at_once"
    stages.build(made := load(beside, cache_prefix=None), plain)
    stages.train(made, plain)
    stages.build(made := load(beside), cached)
    with monkeypatch.context() as patch:
        own = ObjectiveTrainer.after_step

        def after_step(self: Any) -> Any:
            if self.state.global_step == 5:
                raise KeyboardInterrupt
            return own(self)

        patch.setattr(ObjectiveTrainer, "after_step", after_step)
        with pytest.raises(KeyboardInterrupt):
            stages.train(made, cached)
    kept = cached / "checkpoints" / ours.PREFIX
    assert len(list(kept.iterdir())) == 5  # batches of an epoch
    assert stages.train(made, cached, resume=True).passed
    assert not kept.exists()
    stages.build(made, at_once)
    stages.train(made, at_once)
    expected = learned(plain)
    for output in (cached, at_once):
        found = learned(output)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_finding_says_how_many_reads_were_compared(beside: Path, tmp_path: Path) -> None:
    stages.build(made := load(beside), tmp_path / "run")
    report = stages.train(made, tmp_path / "run")
    found = next(each for each in report.findings if each.name == "frozen layers are read as they are computed")
    assert (found.verdict, found.evidence) == ("measured", "6 of 10 reads were computed again, all bit-equal")


def test_what_changes_unseen_leaves_no_adapter(beside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "run"
    stages.build(made := load(beside), output)
    own, silu = ObjectiveTrainer.after_step, functional.silu

    def after_step(self: Any) -> Any:
        if self.state.global_step == 7:
            monkeypatch.setattr(functional, "silu", lambda *args, **kwargs: 3 * silu(*args, **kwargs))
        return own(self)

    monkeypatch.setattr(ObjectiveTrainer, "after_step", after_step)
    with pytest.raises(ObjectiveError, match=r"returns something else than .* since step 6, .*train without"):
        stages.train(made, output)
    assert not (output / "adapter").exists()
    assert [path.name for path in sorted((output / "checkpoints").iterdir())] == [f"checkpoint-{n}" for n in (2, 4, 6)]


def test_a_plan_says_which_layers_and_how_many_bytes(beside: Path) -> None:
    document = dry_run.plan(made := load(beside)).document()
    found = document["prefix"]
    examples, _ = datasets.make_examples(made, AutoTokenizer.from_pretrained(beside / "base"))
    tokens = sum(len(row["input_ids"]) for row in examples)
    assert found == {"layers": ["3 of 4 layers of model.layers"], "bytes": tokens * 32 * 4}
    assert document["data"]["tokens"] == tokens
    assert any(f"(about {tokens:,} tokens in all; at most " in str(each) for each in views.plan(document))
    assert "prefix" not in dry_run.plan(load(beside, cache_prefix=None)).document()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"train_sampling_strategy": "random"}}, "set train_sampling_strategy: sequential"),
        ({"data": {"train": "lines.jsonl", "group_by": ["length"]}}, "group_by puts other rows together"),
        ({"data": {"train": "lines.jsonl", "streaming": True}}, r"data\.streaming gives rows as a stream"),
        ({"adapter": {"train": ["model.layers.0.mlp"]}}, r"model\.layers\.0\.mlp\S* learns"),
    ],
)
def test_what_cannot_be_cached_is_refused_in_a_plan(beside: Path, changes: dict[str, Any], words: str) -> None:
    if "group_by" in str(changes):
        changes = {**changes, "training": {"train_sampling_strategy": "random"}}
    with pytest.raises(RecipeError, match=f"cache_prefix: .*{words}"):
        dry_run.plan(load(beside, **changes))


def test_it_needs_an_adapter() -> None:
    step = {"replace": "model.layers.*.mlp", "expect": "LlamaMLP", "with": "wrappers.py:Scaled"}
    document = {"base": {"model": "base"}, "surgery": [step], "cache_prefix": True}
    with pytest.raises(RecipeError, match="`cache_prefix` needs an `adapter`"):
        schema.judge(document, Path("recipe.yaml"))
    schema.judge({**document, "cache_prefix": False}, Path("recipe.yaml"))
