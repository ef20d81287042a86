"""Each class has one number: in every source, in training and in evaluation."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import datasets
import pico
import pytest
from PIL import Image
from transformers import ViTImageProcessor
from words import tokenizer

from solidify.errors import DataError
from solidify.recipe import datasets as recipe_data
from solidify.recipe import showing
from solidify.recipe.schema import Recipe
from solidify.training import sources

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = {**pico.SIZES, "intermediate_size": 48, "pad_token_id": 0}
COLOURS = {"cat": 40, "dog": 90, "fish": 140, "wolf": 190}


def pictures(directory: Path, *names: str, each: int = 3) -> str:
    """Makes a folder of images whose colour says what they show, and returns its name."""
    for name in names:
        (directory / name).mkdir(parents=True)
        for n in range(each):
            Image.new("RGB", (16, 16), (COLOURS[name], n, 0)).save(directory / name / f"{n}.png")
    return directory.name


def shown(example: Any) -> str:
    image = example["image"]
    red = (Image.open(image) if isinstance(image, str) else image).getpixel((0, 0))[0]
    return next(name for name, colour in COLOURS.items() if colour == red)


def numbers(examples: Any) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for example in examples:
        found.setdefault(shown(example), set()).add(example["labels"])
    return found


def recipe_of(directory: Path, data: dict[str, Any], base: str = "none") -> Recipe:
    said = {"base": {"model": base}, "adapter": {"train": "x"}, "training": {"max_steps": 1}, "data": data}
    return Recipe.model_validate({**said, "directory": directory})


def prepared(directory: Path, data: dict[str, Any], **settings: Any) -> Any:
    model = pico.make("ViTForImageClassification", **SMALL, image_size=16, **(settings or {"num_labels": 4}))
    return recipe_data.prepare(recipe_of(directory, data), ViTImageProcessor(size={"height": 16, "width": 16}), model)


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_has_the_numbers_of_training(tmp_path: Path, streaming: bool) -> None:
    pictures(tmp_path / "train", "cat", "dog", "fish")
    pictures(tmp_path / "eval", "cat", "fish")
    made = prepared(tmp_path, {"train": "train", "eval": "eval", "streaming": streaming})
    assert numbers(made.train) == {"cat": {0}, "dog": {1}, "fish": {2}}
    assert numbers(made.held_out) == {"cat": {0}, "fish": {2}}


def test_a_class_that_training_has_not_is_refused_by_name(tmp_path: Path) -> None:
    pictures(tmp_path / "train", "cat", "dog")
    pictures(tmp_path / "eval", "cat", "wolf")
    with pytest.raises(DataError, match=r"(?s)data.eval: .*its label is 'wolf', and the classes are cat, dog"):
        prepared(tmp_path, {"train": "train", "eval": "eval"}, num_labels=2)


def test_a_class_for_which_the_model_has_no_output_is_refused_by_name(tmp_path: Path) -> None:
    pictures(tmp_path / "train", "cat", "dog", "fish")
    with pytest.raises(DataError, match=r"(?s)data.train: .*its label is 'fish', and the classes are cat, dog"):
        prepared(tmp_path, {"train": "train"}, num_labels=2)


@pytest.mark.parametrize("names", ["labels", "id2label"])
def test_what_the_recipe_or_the_base_says_of_classes_comes_first(tmp_path: Path, names: str) -> None:
    listed = ["fish", "wolf", "cat"]
    pictures(tmp_path / "train", "cat", "fish")
    pictures(tmp_path / "eval", "fish", "wolf")
    said: dict[str, Any] = {"labels": listed} if names == "labels" else {}
    settings: dict[str, Any] = {"num_labels": 3} if names == "labels" else {"id2label": dict(enumerate(listed))}
    made = prepared(tmp_path, {"train": "train", "eval": "eval", **said}, **settings)
    assert numbers(made.train) == {"cat": {2}, "fish": {0}}
    assert numbers(made.held_out) == {"fish": {0}, "wolf": {1}}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weights", [(None, None), (3, 1)])
def test_all_sources_of_training_have_one_numbering(tmp_path: Path, weights: Any, streaming: bool) -> None:
    pictures(tmp_path / "one", "dog", "fish")
    pictures(tmp_path / "two", "cat", "fish", "wolf")
    pictures(tmp_path / "eval", "fish", "wolf")
    given = [{"path": name, **({"weight": w} if w else {})} for name, w in zip(("one", "two"), weights, strict=True)]
    made = prepared(tmp_path, {"train": given, "eval": "eval", "streaming": streaming})
    assert numbers(made.train) == {"dog": {0}, "fish": {1}, "cat": {2}, "wolf": {3}}
    assert numbers(made.held_out) == {"fish": {1}, "wolf": {3}}


def test_sources_that_number_the_same_tags_otherwise_are_put_together_by_name() -> None:
    def tagged(names: list[str], tags: list[int]) -> datasets.Dataset:
        kinds = {
            "words": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=names)),
        }
        return datasets.Dataset.from_dict({"words": [["a"] * len(tags)], "tags": [tags]}, datasets.Features(kinds))

    for streaming in (False, True):
        parts = [tagged(["O", "B"], [0, 1, -100]), tagged(["B", "I", "O"], [0, 1, 2])]
        parts = [part.to_iterable_dataset() for part in parts] if streaming else parts
        mixed = sources.mix(parts, [None, None], seed=1)
        assert {tuple(row["tags"]) for row in mixed} == {(0, 1, -100), (1, 2, 0)}
        assert mixed.features["tags"].feature.names == ["O", "B", "I"]


def test_names_of_evaluation_alone_are_refused(tmp_path: Path) -> None:
    """Training has numbers only: nothing says which of them a name of the evaluation rows is."""
    pictures(tmp_path / "eval", "cat", "dog")
    (tmp_path / "rows.csv").write_text("image,label\neval/cat/0.png,1\neval/dog/0.png,0\n")
    with pytest.raises(DataError, match=r"data.eval: the rows name their classes \(cat, dog\), and those of training"):
        prepared(tmp_path, {"train": "rows.csv", "eval": "eval"}, num_labels=2)
    made = prepared(tmp_path, {"train": "rows.csv", "eval": "eval", "labels": ["dog", "cat"]}, num_labels=2)
    assert numbers(made.train) == numbers([made.held_out[0], made.held_out[3]]) == {"cat": {1}, "dog": {0}}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves a csv of which it read a part
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_images_that_a_streamed_file_names_are_found_beside_it(tmp_path: Path, kind: str) -> None:
    """Of a stream of csv nothing says which columns it has, but its first row."""
    pictures(tmp_path / "images", "cat", "dog")
    lines = {
        "jsonl": '{"image": "images/cat/0.png", "label": 1}\n{"image": "images/dog/0.png", "label": 0}\n',
        "csv": "image,label\nimages/cat/0.png,1\nimages/dog/0.png,0\n",
    }
    (tmp_path / f"rows.{kind}").write_text(lines[kind])
    made = prepared(tmp_path, {"train": f"rows.{kind}", "streaming": True})
    assert numbers(made.train) == {"cat": {1}, "dog": {0}}
    gc.collect()  # while its warning is not an error


def test_rows_are_shown_with_the_names_that_they_have(tmp_path: Path) -> None:
    pico.make("BertForSequenceClassification", **TEXT, id2label={0: "yes", 1: "no"}).save_pretrained(tmp_path / "base")
    tokenizer(wrapped=True).save_pretrained(tmp_path / "base")
    kinds = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    rows = datasets.Dataset.from_dict({"text": ["a b", "c"], "label": [0, 1]}, datasets.Features(kinds))
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    found = showing.show(recipe_of(tmp_path, {"train": "rows.parquet"}, str(tmp_path / "base")))
    assert [row["label"] for row in found["rows"]] == ["no", "yes"]


def test_a_number_that_a_head_of_one_output_learns_is_no_class(tmp_path: Path) -> None:
    kinds = {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["one star", "two stars", "three stars"]),
    }
    rows = datasets.Dataset.from_dict({"text": ["a b", "c"], "label": [2, 0]}, datasets.Features(kinds))
    model = pico.make("BertForSequenceClassification", **TEXT, id2label={0: "stars"})
    how = recipe_data.open_reading(recipe_of(tmp_path, {"train": "rows"}), rows, tokenizer(wrapped=True), model)
    made, _ = recipe_data.examples.make(rows, how)
    assert made["labels"][:] == [2.0, 0.0]


@pytest.mark.slow
def test_a_stream_of_named_images_keeps_the_names_of_its_classes(tmp_path: Path) -> None:
    pictures(tmp_path / "images", "cat", "dog")
    kinds = {"image": datasets.Value("string"), "label": datasets.ClassLabel(names=["dog", "cat"])}
    rows = {"image": ["images/cat/0.png", "images/dog/0.png"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, datasets.Features(kinds)).to_parquet(str(tmp_path / "rows.parquet"))
    made = prepared(tmp_path, {"train": "rows.parquet", "streaming": True}, id2label={0: "cat", 1: "dog"})
    assert numbers(made.train) == {"cat": {0}, "dog": {1}}
