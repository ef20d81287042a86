from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from solidify.errors import DataError
from solidify.training import data

TEXTS = ["one two three", "a much longer text, " * 20, ""]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "parquet"])
def test_common_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    texts = ["first", "second"]
    made = data.from_texts(texts, "text")
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts))
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in texts]))
    elif kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "csv":
        path.write_text("text,id\nfirst,1\nsecond,2\n")
    else:
        made.to_parquet(str(path))
    read = data.read(path, "text")
    assert read["text"][:] == texts
    assert read.column_names == ["text"]


def test_files_that_cannot_be_read_as_asked_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "broken.json").write_text('{"text": ')
    (tmp_path / "x.docx").write_text("a")
    for name, words in (
        ("none.jsonl", "does not exist"),
        ("x.docx", r"known: .jsonl"),
        ("x.jsonl", "has no column 'text'; it has: body"),
        ("broken.json", "cannot be read as json"),
    ):
        with pytest.raises(DataError, match=words):
            data.read(tmp_path / name, "text")


def test_no_token_of_a_text_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = data.tokenize(data.from_texts(TEXTS, "text"), tokenizer, text="text", max_length=16)
    tokens = [token for row in examples["input_ids"] for token in row]
    expected = [t for text in TEXTS[:2] for t in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    lost = [
        len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS[:2] if (len(tokenizer(text)["input_ids"]) + 1) % 16 == 1
    ]
    assert len(expected) - len(tokens) == len(lost)  # a window of one token has nothing to predict
    assert examples["labels"][:] == examples["input_ids"][:]
    assert max(map(len, examples["input_ids"])) == 16


def test_the_end_token_is_learned_though_padding_is_not(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.pad_token = None
    collate = data.collator(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    end = tokenizer.eos_token_id
    batch = collate([{"input_ids": [5, 6, end], "labels": [5, 6, end]}, {"input_ids": [5] * 5, "labels": [5] * 5}])
    assert batch["labels"][0].tolist() == [5, 6, end, -100, -100]


def test_texts_without_anything_to_predict_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="nothing to predict"):
        data.tokenize(data.from_texts([""], "text"), tokenizer, text="text", max_length=8)


def test_the_mean_loss_counts_every_token_once(tiny_base: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    examples = data.tokenize(data.from_texts(TEXTS, "text"), tokenizer, text="text", max_length=32)
    collate = data.collator(tokenizer)
    single = data.mean_loss(model, examples, collate, batch_size=1)
    assert data.mean_loss(model, examples, collate, batch_size=5) == pytest.approx(single, rel=1e-5)
