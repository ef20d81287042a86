"""Tokens that are added: which rows they get and where these start, in which families, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import solidify
from solidify.artifact import vocabulary
from solidify.errors import ArtifactError, RecipeError, SurgeryError
from solidify.model import anatomy, operations
from solidify.recipe.schema import Recipe
from solidify.surgery import catalogue


def words(size: int = 128, **roles: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of words `w3`, `w4`, ... in lower case."""
    ids = {"<eos>": 0, "<pad>": 1, "<bos>": 2, **{f"w{number}": number for number in range(3, size)}}
    made = Tokenizer(models.WordLevel(ids, unk_token="w3"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<eos>", "pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "w3", **roles}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def llama(**settings: Any) -> PreTrainedModel:
    return pico.llama(**{"eos_token_id": 0, "bos_token_id": 2, **settings})


ASKED: list[Any] = [
    "<Mean>",
    {"token": "<copy>", "start": {"copy": "w9"}},
    {"token": "<text>", "start": {"text": "w4 w5 w5"}},
]
FAMILIES = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "t5": lambda: families.tiny("t5", "AutoModelForSeq2SeqLM"),
    "bart": lambda: families.tiny("bart", "AutoModelForSeq2SeqLM"),
    "bert": lambda: families.tiny("bert", "AutoModelForMaskedLM"),
    "gemma3n": lambda: families.tiny("gemma3n_text"),
    "no head": lambda: families.tiny("bert", "AutoModelForSequenceClassification"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_with_rows_of_tokens_grows_and_starts_from_its_own_rows(family: str) -> None:
    model, tokenizer = FAMILIES[family](), words()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    edits = solidify.add_tokens(model, tokenizer, ASKED, pad_to_multiple_of=8)
    grown = {f"{edit.name}.{key}".lstrip("."): axis for edit in edits for key, axis in edit.settings["tensors"].items()}
    assert all(edit.identical and edit.probed for edit in edits)
    for name, tensor in model.state_dict().items():
        if name not in grown:
            assert torch.equal(tensor, before[name]), name
            continue
        new, old = tensor.movedim(grown[name], 0), before[name].movedim(grown[name], 0)
        assert len(new) == 136 and torch.equal(new[:128], old)
        mean = old.double().mean(0).to(old.dtype)
        expected = [mean, old[9], old[[4, 5, 5]].double().mean(0).to(old.dtype), *[mean] * 5]
        torch.testing.assert_close(new[128:], torch.stack(expected), rtol=1e-6, atol=1e-7)
    assert [tokenizer.convert_tokens_to_ids(text) for text in ("<Mean>", "<copy>", "<text>")] == [128, 129, 130]
    assert tokenizer("w4 <copy> w5").input_ids == [4, 129, 5]
    assert model.config.get_text_config(decoder=True).vocab_size == 136
    if family in ("tied", "t5", "bart"):
        assert len({p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False) if n in grown}) == 1


def test_a_second_table_that_is_shorter_grows_to_the_same_number() -> None:
    model = families.tiny("gemma3n_text")
    narrow = model.config.get_text_config().to_dict() | {"vocab_size_per_layer_input": 96}
    model = type(model)(type(model.config)(**narrow)).eval()
    solidify.add_tokens(model, words(), ["<a>"])
    assert model.model.embed_tokens_per_layer.weight.shape[0] == model.model.embed_tokens.weight.shape[0] == 129


def test_spare_rows_are_used_first() -> None:
    model, tokenizer = llama(), words(100)
    spare = model.lm_head.weight[100:103].clone()
    edits = solidify.add_tokens(model, tokenizer, ASKED)
    assert edits[0].settings["rows"] == 128 and model.config.vocab_size == 128
    assert not torch.equal(model.lm_head.weight[100:103], spare)
    assert torch.equal(model.lm_head.weight[101], model.lm_head.weight[9])
    assert all(edit.identical for edit in edits)  # of all other ids


def test_a_token_that_only_the_model_lacks_is_given_its_row() -> None:
    model, tokenizer = llama(), words()
    tokenizer.add_tokens(["<mine>"])
    solidify.add_tokens(model, tokenizer, ["<mine>"])
    assert model.lm_head.out_features == len(tokenizer) == 129


def test_special_tokens_are_left_out_of_what_is_decoded() -> None:
    tokenizer = words()
    solidify.add_tokens(llama(), tokenizer, ["<tool>"], special=True)
    assert tokenizer.decode([4, 128, 5], skip_special_tokens=True).split() == ["w4", "w5"]


def with_replaced_head() -> PreTrainedModel:
    model = llama()
    solidify.replace(model, "lm_head", pico.wrappers.Scaled)
    return model


class Clamping(LlamaForCausalLM):
    """Reads ids from 128 on as something else, as families do that put images among the tokens."""

    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        return super().forward(input_ids=input_ids.clamp(max=127), **options)


REFUSED: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "known": (llama, ["w7"], {}, r"'w7' is a token already \(id 7\)"),
    "twice": (llama, ["<a>", "<a>"], {}, "'<a>' is listed twice"),
    "no text": (llama, ["  "], {}, "'  ' is no token"),
    "no list": (llama, "<a>", {}, "give a list of tokens"),
    "strange key": (llama, [{"token": "<a>", "begin": "mean"}], {}, "is no token: write its text, or"),
    "strange start": (llama, ["<a>"], {"start": "zero"}, "a start is 'mean', 'text'.* not 'zero'"),
    "unknown copy": (llama, ["<a>"], {"start": {"copy": "<z>"}}, "a copy of '<z>', which is no token"),
    "unknown text": (llama, ["<a>"], {"start": {"text": "zzz"}}, "'zzz', of which the tokenizer knows no piece"),
    "replaced head": (with_replaced_head, ["<a>"], {}, "an earlier step has replaced lm_head.*add tokens before it"),
    "ids that are no text": (
        lambda: Clamping(llama().config).eval(),
        ["<a>"],
        {},
        "does not read the id 128 as text: with the rows of",
    ),
    "special id without a row": (
        lambda: llama(pad_token_id=None, eos_token_id=500),
        ["<a>"],
        {},
        "eos_token_id of the model is 500, and the model would have 129 rows",
    ),
    "no embeddings": (
        lambda: families.tiny("vit", "AutoModelForImageClassification"),
        ["<a>"],
        {},
        "no rows of tokens",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_added_is_refused_and_nothing_is_changed(kind: str) -> None:
    make, tokens, options, sentence = REFUSED[kind]
    model, tokenizer = make(), words()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    with pytest.raises(SurgeryError, match=sentence):
        solidify.add_tokens(model, tokenizer, tokens, **options)
    assert len(tokenizer) == 128 and model.config.to_dict() == config
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_without_a_tokenizer_nothing_is_added() -> None:
    with pytest.raises(SurgeryError, match="a model and its tokenizer, and there is none"):
        solidify.add_tokens(llama(), None, ["<a>"])  # type: ignore[arg-type]


def test_a_file_lists_tokens_by_line_or_as_json(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("<a>\n\n<b>\n")
    (tmp_path / "tokens.json").write_text(json.dumps(["<a>", {"token": "<b>", "start": {"copy": "w5"}}]))
    for name in ("tokens.txt", "tokens.json"):
        tokenizer = words()
        solidify.add_tokens(llama(), tokenizer, tmp_path / name)
        assert tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [128, 129]


_READ = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<Mean>", "<copy>", "<text>")]
print(json.dumps(ids + tokenizer("w4 <copy>").input_ids))
"""


@pytest.mark.slow
def test_an_artifact_carries_the_tokens_and_a_second_surgery_adds_more(tmp_path: Path) -> None:
    model, tokenizer = llama(tie_word_embeddings=True), words()
    edits = solidify.add_tokens(model, tokenizer, ASKED, pad_to_multiple_of=8)
    artifact = solidify.build(model, edits, tmp_path / "one", tokenizer=tokenizer)
    verdicts = {finding.name: finding.passed for finding in artifact.findings}
    assert verdicts[vocabulary.ADDED] and verdicts[vocabulary.SPECIAL] and all(verdicts.values())
    read = subprocess.run([sys.executable, "-c", _READ, str(tmp_path / "one")], capture_output=True, text=True)
    assert json.loads(read.stdout.splitlines()[-1]) == [128, 129, 130, 4, 129]
    again = solidify.load(tmp_path / "one")
    more = solidify.add_tokens(again, tokenizer, [f"<x{number}>" for number in range(9)])
    scaled = solidify.replace(again, "**.mlp", pico.wrappers.Scaled)
    pico.artifact(again, [*more, *scaled], tmp_path / "two", tokenizer=tokenizer)
    third = solidify.load(tmp_path / "two")
    assert third.lm_head.weight is third.model.embed_tokens.weight and third.config.vocab_size == 140
    assert torch.equal(
        anatomy.run(third, {"input_ids": pico.tokens()}), anatomy.run(again, {"input_ids": pico.tokens()})
    )


def test_a_tokenizer_without_the_added_tokens_is_refused(tmp_path: Path) -> None:
    model, tokenizer = llama(), words()
    edits = solidify.add_tokens(model, tokenizer, ["<a>"])
    for other, sentence in ((words(), "'<a>' is no token of it, and was added as id 128"), (None, "no tokenizer goes")):
        with pytest.raises(ArtifactError, match=sentence):
            solidify.build(model, edits, tmp_path / "out", tokenizer=other)
    assert not (tmp_path / "out").exists()


def test_check_compares_the_ids_of_what_stands_there(tmp_path: Path) -> None:
    model, tokenizer = llama(), words()
    edits = [edit.document() for edit in solidify.add_tokens(model, tokenizer, ["<a>"])]
    assert [f.passed for f in vocabulary.findings(model, tokenizer, edits) if f.name == vocabulary.ADDED] == [True]
    other = words()
    other.add_tokens(["<b>", "<a>"])
    found = {f.name: f for f in vocabulary.findings(model, other, edits)}
    assert found[vocabulary.ADDED].passed is False and "is id 129 of it" in found[vocabulary.ADDED].evidence
    model.generation_config.eos_token_id = [0, 700]
    special = {f.name: f for f in vocabulary.findings(model, tokenizer, edits)}[vocabulary.SPECIAL]
    assert special.passed is False and "generation_config.eos_token_id is 700" in special.evidence


def test_a_changed_number_of_rows_is_found() -> None:
    model = llama()
    record = solidify.add_tokens(model, words(), ["<a>"])[0].document()
    inspect = catalogue.of(record).inspect
    assert inspect(model.model.embed_tokens, record) == ("has rows for 129 tokens", [])
    assert inspect(nn.Embedding(128, 32), record)[1] == ["weight has 128 rows, not 129"]


def test_a_part_without_the_head_takes_rows_too() -> None:
    """As AutoModel builds it: names lack the prefix, and what is the head's is passed over."""
    model = llama()
    edits = solidify.add_tokens(model, words(), ["<a>"])
    part = llama().model
    for edit in edits[:1]:
        catalogue.of(edit.document()).carried()(part, ["embed_tokens"], {**edit.settings, "prefix": "model."}, {})  # type: ignore[misc]
    assert part.embed_tokens.num_embeddings == part.vocab_size == 129 and operations.layer_index(model, "x") is None


def recipe(directory: Path, step: str) -> Recipe:
    path = directory / "recipe.yaml"
    path.write_text(f"base: {{model: 'builtin:tiny-olmoe'}}\nsurgery:\n  - {step}\n")
    return Recipe.load(path)


def test_rows_of_new_tokens_are_planned_before_there_is_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "<tool> call"}\n' * 4)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "base: {model: 'builtin:tiny-olmoe'}\nsurgery:\n  - {add_tokens: ['<tool>', '<end>']}\n"
        "adapter: {lora: {trainable_token_indices: {model.embed_tokens: new, lm_head: ['<end>', 5]}}}\n"
        "data: {train: rows.jsonl, max_length: 16}\n"
    )
    planned = solidify.plan(path)
    width = planned.trainable["tokens model.embed_tokens"] // 2
    assert planned.trainable == {"tokens model.embed_tokens": 2 * width, "tokens lm_head": 2 * width}


def test_a_recipe_plans_and_refuses(tmp_path: Path) -> None:
    planned = solidify.plan(
        recipe(tmp_path, "{add_tokens: ['<tool>', {token: '</tool>', start: {text: end}}], special: true}")
    )
    assert planned.edits[0].name == "model.embed_tokens" and planned.counts["new"] == 2
    with pytest.raises(RecipeError, match=r"surgery\.0.*special"):
        recipe(tmp_path, "{add_tokens: ['<a>'], special: perhaps}")
    with pytest.raises(RecipeError, match=r"unknown key.*did you mean 'special'"):
        recipe(tmp_path, "{add_tokens: ['<a>'], specials: true}")
    with pytest.raises(SurgeryError, match="is a token already"):
        solidify.plan(recipe(tmp_path, "{add_tokens: ['the']}"))
