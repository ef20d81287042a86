"""EleutherAI's harness evaluates an artifact on tasks of the user's own, offline."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from clients import strangers

CHOOSING = [
    {"question": "the fox jumps over the", "choices": ["dog", "moon", "lazy table"], "answer": 0},
    {"question": "and then there it", "choices": ["is", "was not"], "answer": 1},
    {"question": "a quick brown", "choices": ["fox", "bread", "lazy dog"], "answer": 2},
]
WRITING = [{"question": "where was the other one?", "answer": "here"}, {"question": "the quick", "answer": "fox"}]


def write_tasks(directory: Path) -> None:
    """Writes two tasks: one of multiple choice, one of free text."""
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    own: dict[str, dict[str, Any]] = {
        "choosing": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", **mean}],
        },
        "writing": {
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    for name, rows in (("choosing", CHOOSING), ("writing", WRITING)):
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(data)}, "cache_dir": str(directory / "cache")}
        task = {"task": name, **common, **own[name], "dataset_kwargs": files}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


@pytest.fixture
def evaluated(artifact: Path, tmp_path: Path) -> dict[str, Any]:
    """What the harness found about an artifact, which it loads itself."""
    write_tasks(tmp_path)
    options = {"pretrained": str(artifact), "trust_remote_code": True, "dtype": "float32"}
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)  # its own tasks take seconds to index
    return lm_eval.simple_evaluate(
        model="hf",
        model_args=options,
        tasks=["choosing", "writing"],
        task_manager=manager,
        batch_size=2,
        device="cpu",
        log_samples=True,
    )


def samples(evaluated: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return sorted(evaluated["samples"][task], key=lambda sample: sample["doc_id"])


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, choice: str) -> float:
    """Returns log P(choice | context); the tokens of the choice are those behind the context's."""
    start = len(tokenizer(context)["input_ids"])
    tokens = torch.tensor([tokenizer(context + choice)["input_ids"]])
    with torch.no_grad():
        scores = torch.log_softmax(model(input_ids=tokens).logits[0, :-1].float(), dim=-1)
    return float(scores.gather(-1, tokens[0, 1:, None])[start - 1 :].sum())


def test_the_harness_sees_the_models_own_likelihoods(
    evaluated: dict[str, Any],
    artifact: Path,
    stranger: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The tolerance is rounding: the harness evaluates padded batches, here one row stands alone."""
    model = stranger(artifact)
    right = []
    for row, sample in zip(CHOOSING, samples(evaluated, "choosing"), strict=True):
        wanted = [log_likelihood(model, tokenizer, row["question"], f" {choice}") for choice in row["choices"]]  # type: ignore[attr-defined]
        assert [float(answer[0]) for answer in sample["filtered_resps"]] == pytest.approx(wanted, abs=1e-4)
        right.append(wanted.index(max(wanted)) == row["answer"])
    assert evaluated["results"]["choosing"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_the_harness_reads_what_the_model_writes(
    evaluated: dict[str, Any],
    artifact: Path,
    stranger: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = stranger(artifact)
    for row, sample in zip(WRITING, samples(evaluated, "writing"), strict=True):
        inputs = tokenizer(row["question"], return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(tokens, skip_special_tokens=True).split("\n")[0] != ""


@pytest.mark.slow
def test_the_harness_command_finds_the_same_where_solidify_is_not_installed(
    evaluated: dict[str, Any], artifact: Path, tmp_path: Path
) -> None:
    words = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={artifact},dtype=float32"]
    words += ["--trust_remote_code", "--device", "cpu", "--batch_size", "2", "--tasks", "choosing,writing"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    strangers.run([sys.executable, *words], tmp_path)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    for task, metric in (("choosing", "acc,none"), ("writing", "exact_match,none")):
        assert results[task][metric] == evaluated["results"][task][metric]
