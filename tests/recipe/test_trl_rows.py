"""What a recipe asks of TRL's SFTTrainer happens to its rows, or is refused; what is cut off is said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from transformers import AutoTokenizer

import solidify
from solidify.errors import RecipeError
from solidify.recipe import dry_run, schema, stages, trainers

USER = Path(pico.__file__).parent / "user_modules"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
WORDS = [f"A list is a thing of {n} values" for n in range(8)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"{w} {'and more ' * 20 * (n == 0)}"} for n, w in enumerate(WORDS)],
    "prompt_completion": [{"prompt": w, "completion": f" has {n} values."} for n, w in enumerate(WORDS)],
    "messages": [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "more " * (40 if n else 2)}]}
        for n, w in enumerate(WORDS)
    ],
    "preference": [{"prompt": w, "chosen": " good " * 30, "rejected": " bad"} for w in WORDS],
}


def asked(directory: Path, form: str, training: dict[str, Any], *, trainer: str = "sft", **more: Any) -> schema.Recipe:
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[form])))
    sizes = {**pico.SIZES, "vocab_size": 1024, "intermediate_size": 48, "num_key_value_heads": 2}
    base = directory / "base"
    if not base.exists():
        pico.make(more.pop("head", "LlamaForCausalLM"), **sizes).save_pretrained(base)
        AutoTokenizer.from_pretrained(more.pop("tokenizer")).save_pretrained(base)
    more.pop("tokenizer", None)
    data = {"train": "rows.jsonl", "max_length": 32, "chat_template": TEMPLATE, **more.pop("data", {})}
    document = {
        "base": {"model": str(base)},
        "trainer": trainer,
        "surgery": [{"replace": "model.layers.*.mlp", "expect": "LlamaMLP", "with": f"{USER}/wrappers.py:Scaled"}],
        "adapter": {"train": ["model.layers.*.mlp.scale"]},
        "data": {name: value for name, value in data.items() if value is not None},
        "training": {"max_steps": 1, "learning_rate": 1e-3, "bf16": False, **training},
        **more,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(document))
    return schema.load(directory / "recipe.yaml")


# By case: the format of the rows, fields of `training`, of `data`, and words of the refusal (None: it is planned).
FIELDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None]] = {
    "all of a prompt": (
        "prompt_completion",
        {"completion_only_loss": False},
        {},
        "training.completion_only_loss: the completion alone counts in such rows; for other labels write the rows as",
    ),
    "the completion": ("prompt_completion", {"completion_only_loss": True}, {}, None),
    "a completion of text": ("text", {"completion_only_loss": True}, {}, "all tokens of plain text count"),
    "turns": ("messages", {"completion_only_loss": True}, {}, "data.loss_on says which tokens of a conversation"),
    "assistants": ("messages", {"assistant_only_loss": True}, {}, "data.loss_on says which tokens of a conversation"),
    "another end": ("messages", {"eos_token": "x"}, {}, "training.eos_token: rows of messages end as data.chat_t"),
    "a template": ("messages", {"chat_template_path": "x"}, {}, "data.chat_template how conversations are written"),
    "a template for text": ("text", {"chat_template_path": "x"}, {}, "write that"),
    "the end of a row": ("messages", {"truncation_mode": "keep_end"}, {}, "rows of messages keep their start"),
    "another column": ("text", {"dataset_text_field": "body"}, {}, "write data.text: body"),
    "unprepared": ("text", {"dataset_kwargs": {"skip_prepare_dataset": True}}, {}, "rows are always prepared"),
    "two lengths": ("messages", {"max_length": 16}, {}, "max_length is 16, and data.max_length is 32; write data.max"),
    "a length twice": ("messages", {"max_length": 32}, {}, None),
    "TRL's length": ("messages", {"max_length": 16}, {"max_length": None}, "write data.max_length: 16"),
    "TRL's length of text": ("text", {"max_length": 16}, {"max_length": None}, None),
    "a formatting function": ("text", {"formatting_func": "x"}, {}, "training.formatting_func is not a field of"),
    "wrapped": ("text", {"packing": True, "packing_strategy": "wrapped"}, {}, "see those before it; write bfd"),
    "a packed evaluation": ("text", {"eval_packing": True}, {}, "documents of an evaluation see each other"),
    "padding free": ("messages", {"padding_free": True}, {}, "write training.max_length: null beside it"),
    "padding free, cut before": ("messages", {"padding_free": True, "max_length": None}, {}, None),
    "padding free text": ("text", {"padding_free": True, "max_length": None}, {}, "data.max_length asks for it"),
}


@pytest.mark.parametrize("trainer", ["sft", "auto"])
@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_would_do_nothing_is_refused(case: str, trainer: str, tiny_base: Path, tmp_path: Path) -> None:
    form, training, data, words = FIELDS[case]
    if trainer == "auto":
        training = {"activation_offloading": False, **training}
    recipe = asked(tmp_path, form, training, trainer=trainer, data=data, tokenizer=tiny_base)
    if words is None:
        planned = dry_run.plan(recipe)
        assert planned.trainer == "ObjectiveSFTTrainer" and planned.data is not None
        assert form != "text" or planned.data["max_length"] == training.get("max_length", 32)
        return
    with pytest.raises(RecipeError) as caught:
        dry_run.plan(recipe)
    assert words in str(caught.value)


def test_two_lengths_of_a_trainer_of_pairs_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"write data.max_length alone"):
        dry_run.plan(asked(tmp_path, "preference", {"max_length": 16}, trainer="dpo", tokenizer=tiny_base))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("text", r"data.train: text: 8 rows; 1 were cut at 32 tokens and lost \d+ tokens"),
        ("messages", r"data.train: messages: 8 rows, .* 7 rows were cut and lost \d+ tokens"),
        ("preference", r"data.train: preference: 16 answers; 8 were cut at 32 tokens and lost \d+ tokens"),
    ],
)
def test_what_is_cut_off_is_said(
    form: str,
    words: str,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pico.unwitnessed(monkeypatch)
    trainer = "dpo" if form == "preference" else "sft"
    recipe = asked(tmp_path, form, {}, trainer=trainer, tokenizer=tiny_base)
    make(recipe, tmp_path)
    assert re.search(words, " ".join(capsys.readouterr().err.split()))


def make(recipe: schema.Recipe, directory: Path) -> Any:
    stages.build(recipe, directory / "out")
    model = solidify.attach(solidify.load(directory / "out" / "artifact"), train=recipe.adapter.train)  # type: ignore[union-attr]
    return trainers.make_trainer(recipe, directory, model, AutoTokenizer.from_pretrained(directory / "base"))


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "data.packing": ({}, {"packing": True}),
    "training.packing": ({"packing": True}, {}),
    "training.padding_free": ({"padding_free": True, "max_length": None}, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_share_a_row_is_tried(
    way: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pico.unwitnessed(monkeypatch)
    training, data = WAYS[way]
    trainer = "auto" if way.startswith("data") else "sft"
    make(asked(tmp_path, "messages", training, trainer=trainer, data=data, tokenizer=tiny_base), tmp_path)
    assert f"{way}: no document of a window reaches another" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("way", WAYS)
def test_a_mean_over_sequences_is_refused_in_every_way(way: str, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "term.py").write_text(
        "def first(logits):\n    return logits[:, 0].square().sum(-1).mean()\n\n\nfirst.reduction = 'sequence_mean'\n"
    )
    training, data = WAYS[way]
    terms = [{"loss": "model"}, {"loss": "term.py:first"}]
    trainer = "auto" if way.startswith("data") else "sft"
    recipe = asked(tmp_path, "messages", training, trainer=trainer, data=data, tokenizer=tiny_base, objective=terms)
    with pytest.raises(RecipeError, match=rf"{way}: the term first is a mean over sequences"):
        dry_run.plan(recipe)
