from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor
from words import CHATS, tokenizer

import solidify
from solidify.artifact import loading
from solidify.errors import DataError, RecipeError
from solidify.recipe import datasets, dry_run, first_batch, stages, trainers
from solidify.recipe.schema import Recipe
from solidify.training import packing
from solidify.training.collating import Packed

STEP = {"replace": "model.layers.0.mlp", "expect": "LlamaMLP", "with": "x.py:X"}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def recipe(directory: Path, data: dict[str, Any], **more: Any) -> Recipe:
    made = {"base": {"model": "none"}, "surgery": [STEP], "data": data, "directory": directory, **more}
    return Recipe.model_validate(made)


def test_rows_keep_their_columns_and_get_the_recipes_names(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"q": "1+1", "a": "2", "level": 3}])
    written(tmp_path / "b.jsonl", [{"prompt": "2+2", "completion": "4", "level": 1}])
    first = {"path": "a.jsonl", "columns": {"prompt": "q", "completion": "a"}}
    train, held_out = datasets.read_rows(recipe(tmp_path, {"train": [first, "b.jsonl"], "eval": "b.jsonl"}))
    assert train.to_list() == [
        {"prompt": "1+1", "completion": "2", "level": 3},
        {"prompt": "2+2", "completion": "4", "level": 1},
    ]
    assert held_out.to_list() == [{"prompt": "2+2", "completion": "4", "level": 1}]
    with pytest.raises(DataError, match=r"a.jsonl has no column 'question'; it has: q, a, level"):
        datasets.read_rows(recipe(tmp_path, {"train": "a.jsonl", "columns": {"prompt": "question"}}))


def test_a_plan_tries_a_batch_of_each_part(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("train.jsonl", "the sum of a train"), ("eval.jsonl", "another cat is held out")):
        written(tmp_path / name, [{"text": text}] * 3)
    data = {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 8}
    loaded = loading.load_base(str(tiny_base))
    made, tried = recipe(tmp_path, data, adapter={"train": ["**.norm"]}), []
    monkeypatch.setattr(first_batch, "_run_on_meta", lambda _, batch: tried.append(batch["input_ids"][0].tolist()))
    first_batch.rehearse(made, loaded.tokenizer, loaded.model)
    texts = [loaded.tokenizer.decode(ids) for ids in tried]
    assert len(texts) == 2 and "train" in texts[0] and "another" in texts[1]


def test_weights_say_how_often_a_source_is_read_and_no_row_is_left_out(tmp_path: Path) -> None:
    for name in "ab":
        written(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(60)])
    sources = [{"path": "a.jsonl", "weight": 3}, "b.jsonl"]
    rows = {
        seed: datasets.read_rows(recipe(tmp_path, {"train": sources, "seed": seed}))[0]["text"][:] for seed in (1, 2)
    }
    assert len(set(rows[1])) == 120
    assert 2 < sum(text.startswith("a") for text in rows[1]) / sum(text.startswith("b") for text in rows[1]) < 4
    assert rows[1] != rows[2]
    again = datasets.read_rows(recipe(tmp_path, {"train": sources, "seed": 1}))[0]["text"][:]
    assert again == rows[1]


def test_a_directory_is_read_whole(tmp_path: Path) -> None:
    written(tmp_path / "many" / "a.jsonl", [{"text": "one"}])
    written(tmp_path / "many" / "deep" / "b.jsonl", [{"text": "two"}])
    assert datasets.read_rows(recipe(tmp_path, {"train": "many"}))[0]["text"][:] == ["one", "two"]
    (tmp_path / "many" / "c.csv").write_text("text\nthree\n")
    with pytest.raises(DataError, match=r"several kinds \(2 of json, 1 of csv\)"):
        datasets.read_rows(recipe(tmp_path, {"train": "many"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file of a known kind"):
        datasets.read_rows(recipe(tmp_path, {"train": "empty"}))


def test_a_stream_is_shuffled_by_its_seed_and_needs_a_length(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(50)])

    def read(**more: Any) -> list[str]:
        rows, _ = datasets.read_rows(recipe(tmp_path, {"train": "a.jsonl", "streaming": True, **more}))
        return [row["text"] for row in rows]

    assert sorted(read(), key=int) == [str(i) for i in range(50)]
    assert read(seed=1) == read(seed=1) != read(seed=2)
    assert read(shuffle=False) == [str(i) for i in range(50)]
    with pytest.raises(ValueError, match=r"give `training.max_steps`"):
        recipe(tmp_path, {"train": "a.jsonl", "streaming": True}, adapter={"train": "x"})
    recipe(tmp_path, {"train": "a.jsonl", "streaming": True}, adapter={"train": "x"}, training={"max_steps": 2})


def test_a_stream_whose_columns_its_rows_alone_tell_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    train, _ = datasets.read_texts(recipe(tmp_path, {"train": "a.txt", "streaming": True, "shuffle": False}))
    assert list(train) == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(DataError, match=r"has no column 'body'; it has: text$"):
        datasets.read_texts(recipe(tmp_path, {"train": "a.txt", "streaming": True, "text": "body"}))


def test_a_directory_of_images_is_streamed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "x.png")
    train, _ = datasets.read_rows(recipe(tmp_path, {"train": "images", "streaming": True}))
    assert sorted(row["label"] for row in train) == [0, 1]


def test_images_among_text_are_not_streamed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`image` opens what all rows name, and `streaming` has none before they come"):
        recipe(tmp_path, {"train": "a.jsonl", "image": "picture", "streaming": True})


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("none.jsonl", DataError, "none.jsonl does not exist"),
        ("owner/name", DataError, "owner/name is no file or directory beside the recipe, and as a data set of the hub"),
        ({"path": "owner/name", "split": "test", "revision": "v2"}, DataError, "split 'test' at revision v2 cannot be"),
        ("a/b/c", DataError, "a data set of the hub is called owner/name"),
        ({"path": "a.jsonl", "split": "train"}, RecipeError, "are of the hub"),
        ("builtin:nothing", RecipeError, "built in: builtin:pydoc"),
    ],
)
def test_a_source_that_is_not_there_is_named(tmp_path: Path, source: Any, kind: type[Exception], words: str) -> None:
    written(tmp_path / "a.jsonl", [{"text": "one"}])
    with pytest.raises(kind, match=words):
        datasets.read_rows(recipe(tmp_path, {"train": source}))


def test_an_evaluation_split_of_the_hub_is_said(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", [{"text": "one"}])
    with pytest.raises(RecipeError, match="say which split of owner/name is read"):
        datasets.read_rows(recipe(tmp_path, {"train": "a.jsonl", "eval": "owner/name"}))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (5, "data.train: give a name, a mapping with `path`, or a list of these; found 5"),
        ({"pth": "a"}, "data.train.pth: unknown key; did you mean 'path'?"),
        (["a", {"path": "b", "weight": 0}], "data.train.1.weight: Input should be greater than 0"),
        ([], "data.train: List should have at least 1 item"),
    ],
)
def test_a_source_that_is_written_wrongly_is_named(tmp_path: Path, train: Any, words: str) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps({"base": {"model": "x"}, "surgery": [STEP], "data": {"train": train}}))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert words in str(caught.value)


WRAPPERS = Path(pico.__file__).parent / "user_modules" / "wrappers.py"
SMALL = {**pico.SIZES, "intermediate_size": 48, "pad_token_id": 0, "eos_token_id": 1}
LLAMA = {**SMALL, "num_key_value_heads": 2}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 16}
T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
UP = ("model.layers.*.mlp.up_proj", "Linear")
DENSE = ("bert.encoder.layer.*.intermediate.dense", "Linear")
TALK = [{"role": role, "content": text} for role, text in CHATS[1]]
RUNS: dict[str, tuple[str, dict[str, Any], tuple[str, str], list[dict[str, Any]], dict[str, Any]]] = {
    "messages": ("LlamaForCausalLM", LLAMA, UP, [{"messages": TALK}, {"messages": TALK[1:3]}] * 8, {}),
    "prompt_completion": ("LlamaForCausalLM", LLAMA, UP, [{"prompt": "a b", "completion": " c d e"}] * 12, {}),
    "packed messages": (
        "LlamaForCausalLM",
        LLAMA,
        UP,
        [{"messages": TALK}, {"messages": TALK[1:3]}] * 8,
        {"packing": True},
    ),
    "streamed text": (
        "LlamaForCausalLM",
        LLAMA,
        UP,
        [{"text": f"a b c {'d ' * n}"} for n in range(16)],
        {"streaming": True},
    ),
    "classification": (
        "BertForSequenceClassification",
        {**SMALL, "id2label": {0: "no", 1: "yes"}},
        DENSE,
        [{"text": f"a b {'c ' * n}", "label": ["no", "yes"][n % 3 == 0]} for n in range(12)],
        {},
    ),
    "regression": (
        "BertForSequenceClassification",
        {**SMALL, "num_labels": 1},
        DENSE,
        [{"text": f"a b {'c ' * n}", "label": n / 3} for n in range(12)],
        {},
    ),
    "token_classification": (
        "BertForTokenClassification",
        {**SMALL, "num_labels": 3},
        DENSE,
        [{"words": ["ab", "c"], "tags": [1, 2]}, {"words": ["d"], "tags": [0]}] * 6,
        {},
    ),
    "masked": ("BertForMaskedLM", SMALL, DENSE, [{"text": f"a b {'c ' * n}"} for n in range(4, 16)], {}),
    "seq2seq": (
        "T5ForConditionalGeneration",
        {**T5, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        ("encoder.block.*.layer.0.SelfAttention.o", "Linear"),
        [{"source": "a b c", "target": "d e"}, {"source": "f", "target": "g h"}] * 6,
        {},
    ),
    "image_classification": (
        "ViTForImageClassification",
        {**VIT, "num_labels": 2},
        ("vit.layers.*.mlp.fc1", "Linear"),
        [{"image": f"{n % 3}.png", "label": n % 2} for n in range(12)],
        {},
    ),
}


FAST = ("packed messages", "streamed text", "classification")  # the rest take too long to be run each time


def prepared(directory: Path, case: str, **changes: Any) -> Recipe:
    """Writes a base with a tokenizer (or what prepares images), rows, and a recipe that wraps modules of it."""
    head, settings, (target, expect), rows, asked = RUNS[case]
    pico.make(head, **settings).save_pretrained(directory / "base")
    if "Image" in head:
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory / "base")
        for n in range(3):
            Image.new("RGB", (16, 16), (90 * n, 0, 0)).save(directory / f"{n}.png")
    else:
        tokenizer(wrapped="Bert" in head).save_pretrained(directory / "base")
    written(directory / "rows.jsonl", rows)
    document = {
        "base": {"model": str(directory / "base")},
        "surgery": [{"replace": target, "expect": expect, "with": f"{WRAPPERS}:Scaled"}],
        "adapter": {"lora": {"r": 2, "target_modules": [f"{target}.original"]}, "train": [f"{target}.scale"]},
        "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 32, **asked},
        "training": {"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8},
        **changes,
    }
    return Recipe.model_validate({**document, "directory": directory})


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in RUNS])
def test_a_recipe_trains_on_every_format(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pico.unwitnessed(monkeypatch)
    asked = prepared(tmp_path, case)
    planned = dry_run.plan(asked).document()["data"]
    assert planned["format"] == case.split()[-1]
    stages.build(asked, tmp_path / "out")
    report = stages.train(asked, tmp_path / "out")
    verdicts = {finding.name: finding.verdict for finding in report.findings}
    assert not report.failed
    assert verdicts["gradient does not depend on accumulation"] == "proved"
    assert report.measured["heldout_loss_trained"] > 0
    told = report.measured.get("heldout_accuracy_trained")
    assert (told is not None and 0 <= told <= 1) == (planned["format"].endswith("classification"))
    if "streamed" not in case:
        assert f"data.train: {planned['format']}: " in capsys.readouterr().err


def test_rows_that_a_head_does_not_learn_from_are_refused_in_the_plan(tmp_path: Path) -> None:
    asked = prepared(tmp_path, "classification")
    written(tmp_path / "rows.jsonl", RUNS["messages"][3])
    with pytest.raises(RecipeError) as caught:
        dry_run.plan(asked)
    assert "data: the rows have the columns messages, which make messages, but BertForSequenceClassification" in str(
        caught.value
    )
    assert "learns from classification (text, label); multi_label (text, label)" in str(caught.value)
    given = asked.model_copy(update={"data": asked.data.model_copy(update={"format": "messages"})})  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match=r"the rows are messages .turns of a conversation., but BertForSeq"):
        dry_run.plan(given)


REFUSED: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]] | None, str]] = {
    "a label that is no class": (
        "classification",
        {},
        [{"text": "a", "label": "yes"}, {"text": "b", "label": "maybe"}],
        "data.train: the data does not fit: row 1: its label is 'maybe', and the classes are no, yes",
    ),
    "names in another order": (
        "classification",
        {"labels": ["yes", "no"]},
        None,
        "`labels` says that class 0 is 'yes', and the base's configuration (id2label) that it is 'no'; leave",
    ),
    "other names": (
        "classification",
        {"labels": ["no", "maybe"]},
        None,
        "that class 1 is 'maybe', and the base's conf",
    ),
    "a name twice": ("token_classification", {"labels": ["a", "b", "a"]}, None, "`labels` names 'a' twice; each class"),
    "too few names": ("token_classification", {"labels": ["a"]}, None, "`labels` names 1 classes, and the model has 3"),
    "too long": ("classification", {"max_length": 4000}, None, "max_length is 4000, and the model has positions for"),
    "a packed encoder": ("classification", {"packing": True}, None, "packing puts texts into one window, and the rows"),
    "no conversation": (
        "messages",
        {},
        [{"messages": [{"role": "user", "content": "a"}]}],
        "no tokens of an assistant",
    ),
    "a bad template": ("messages", {"chat_template": "{{ nothing() }}"}, None, "the chat template does not render it"),
    "no template": ("messages", {"chat_template": "none.jinja"}, None, "none.jinja cannot be read"),
    "no text": (
        "classification",
        {"text": "body"},
        [{"words": "a", "label": 1}],
        "the columns words, label, which make",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_rows_that_cannot_be_learned_are_refused_in_the_plan(fault: str, tmp_path: Path) -> None:
    case, changes, rows, words = REFUSED[fault]
    asked = prepared(tmp_path, case)
    assert asked.data is not None
    if rows is not None:
        written(tmp_path / "rows.jsonl", rows)
    data = {**asked.data.model_dump(exclude_unset=True), **changes}
    with pytest.raises((DataError, RecipeError)) as caught:
        dry_run.plan(asked.model_copy(update={"data": type(asked.data).model_validate(data)}))
    assert words in str(caught.value)


def test_a_column_of_another_name_is_the_text(tmp_path: Path) -> None:
    asked = prepared(tmp_path, "classification")
    assert asked.data is not None
    written(tmp_path / "rows.jsonl", [{"body": "a b", "label": "yes"}])
    data = type(asked.data)(train="rows.jsonl", text="body")
    found = dry_run.plan(asked.model_copy(update={"data": data})).data
    assert found == {"format": "classification", "max_length": 512, "tokens": 4}  # with those at both ends


def test_a_mean_over_sequences_is_no_term_of_packed_windows(tmp_path: Path) -> None:
    (tmp_path / "term.py").write_text(
        "def first(logits):\n    return logits[:, 0].square().sum(-1).mean()\n\n\nfirst.reduction = 'sequence_mean'\n"
    )
    terms = [{"loss": "model"}, {"loss": "term.py:first"}]
    dry_run.plan(prepared(tmp_path, "messages", objective=terms))
    with pytest.raises(RecipeError, match="the term first is a mean over sequences, and a packed window"):
        dry_run.plan(prepared(tmp_path, "packed messages", objective=terms))


def test_trls_trainer_reads_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that only SFTConfig has chooses it; how conversations are read, `data` says."""
    pico.unwitnessed(monkeypatch)
    asked = prepared(tmp_path, "messages")
    assert asked.data is not None
    training = {**asked.training, "truncation_mode": "keep_start"}
    stages.build(asked, tmp_path / "out")
    model = solidify.attach(
        solidify.load(tmp_path / "out" / "artifact"), lora={"target_modules": ["**.up_proj.original"]}
    )
    rows = {}
    for name, changes in (("ours", {}), ("trl", {"training": training})):
        trainer, made = trainers.make_trainer(asked.model_copy(update=changes), tmp_path / name, model, tokenizer())
        rows[name] = [(row["input_ids"], row["labels"]) for row in made]
    assert type(trainer).__name__ == "ObjectiveSFTTrainer"
    assert rows["trl"] == rows["ours"]
    packed = asked.model_copy(update={"training": training, "data": asked.data.model_copy(update={"packing": True})})
    with pytest.raises(RecipeError, match=r"write training.packing, or leave TRL's out"):
        trainers.make_trainer(packed, tmp_path / "packed", model, tokenizer())


def test_a_model_in_which_documents_reach_each_other_does_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.unwitnessed(monkeypatch)
    asked = prepared(tmp_path, "packed messages")
    stages.build(asked, tmp_path / "out")
    monkeypatch.setattr(packing, "Packed", Forgetful)
    with pytest.raises(DataError, match="one document of a window reaches the next"):
        stages.train(asked, tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()


class Forgetful(Packed):
    """Leaves out where documents begin."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def test_an_image_that_is_missing_is_named_in_the_plan(tmp_path: Path) -> None:
    asked = prepared(tmp_path, "image_classification")
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"row 1: there is no image '1.png'"):
        dry_run.plan(asked)
