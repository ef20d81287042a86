"""A tokenizer that does not fit its model is refused, or named with what to set; one that fits is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava
import pico
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import solidify
from solidify.artifact import vocabulary
from solidify.errors import ArtifactError, RecipeError

WORDS = ["<eos>", "<pad>", "<bos>", *(f"w{i}" for i in range(125))]


def words(size: int = 128, **roles: Any) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate([*WORDS, *(f"x{i}" for i in range(size))][:size])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", "pad_token": "<pad>", **roles})


def llama(**settings: Any) -> PreTrainedModel:
    return pico.llama(**{"eos_token_id": 0, "bos_token_id": 2, **settings})


def judged(model: PreTrainedModel, tokenizer: Any) -> dict[str, bool | None]:
    return {finding.name: finding.passed for finding in vocabulary.findings(model, tokenizer)}


def added(*tokens: str, special: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = words()
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": list(tokens)})
    else:
        tokenizer.add_tokens(list(tokens))
    return tokenizer


UNFIT: dict[str, Callable[[], Any]] = {
    "added tokens": lambda: added("<think>", "</think>"),
    "added special tokens": lambda: added("<tool>", special=True),
    "larger vocabulary": lambda: words(140),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_ids_without_an_embedding_are_refused(kind: str, tmp_path: Path) -> None:
    model = llama()
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    with pytest.raises(
        ArtifactError, match=r"tokenizer does not fit.*\(id 128\).*128 rows.*resize_token_embeddings\(1"
    ):
        solidify.build(model, edits, tmp_path / "out", tokenizer=UNFIT[kind]())
    assert not (tmp_path / "out").exists()


def test_a_resized_model_takes_them(tmp_path: Path) -> None:
    model, tokenizer = llama(), added("<think>", "</think>")
    model.resize_token_embeddings(130)
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    artifact = solidify.build(model, edits, tmp_path / "out", tokenizer=tokenizer)
    assert {f.name: f.passed for f in artifact.findings if f.name.startswith("tokenizer")} == {
        vocabulary.FITS: True,
        vocabulary.ENDS: True,
    }


def test_more_embeddings_than_ids_are_usual() -> None:
    assert judged(llama(vocab_size=192), words()) == {vocabulary.FITS: True, vocabulary.ENDS: True}


def test_a_tokenizer_without_padding_fits() -> None:
    assert judged(llama(), words(pad_token=None)) == {vocabulary.FITS: True, vocabulary.ENDS: True}


def test_places_of_images_beside_a_model_of_text_alone_are_named_not_refused() -> None:
    """Gemma 3's tokenizer has one such token more than its smallest model has embeddings."""
    tokenizer = words(extra_special_tokens={"image_token": "<image_soft_token>"})
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == 128
    assert judged(llama(), tokenizer) == {vocabulary.FITS: None, vocabulary.ENDS: True}
    tokenizer.add_tokens(["<think>"])
    assert judged(llama(), tokenizer)[vocabulary.FITS] is False


def test_an_end_token_at_which_the_model_does_not_stop_is_named() -> None:
    model = llama()
    (finding,) = [f for f in vocabulary.findings(model, words(eos_token="w9")) if f.name == vocabulary.ENDS]
    assert finding.passed is None
    assert "ends with 'w9' (id 12), and generation_config.eos_token_id is 0" in finding.evidence
    assert "generation_config.eos_token_id = [0, 12] stops there too" in finding.evidence
    model.generation_config.eos_token_id = [0, 12]
    model.config.eos_token_id = [0, 12]
    assert judged(model, words(eos_token="w9"))[vocabulary.ENDS] is True


def test_other_roles_are_compared_with_both_configurations() -> None:
    model = llama()
    model.generation_config.pad_token_id = 7
    (finding,) = [f for f in vocabulary.findings(model, words(bos_token="w1")) if f.name == vocabulary.ENDS]
    assert "pad_token is id 1 of the tokenizer and 7 in generation_config" in finding.evidence
    assert "bos_token is id 4 of the tokenizer and 2 in config" in finding.evidence


def test_embeddings_that_a_user_wraps_are_not_looked_at() -> None:
    model = llama()
    solidify.replace(model, "model.embed_tokens", pico.wrappers.Scaled)
    (finding,) = [f for f in vocabulary.findings(model, added("<think>")) if f.name == vocabulary.FITS]
    assert finding.verdict == "not looked at" and finding.evidence == "a Scaled takes the ids"


def test_a_processor_is_judged_by_the_tokenizer_that_it_holds() -> None:
    processor = llava.processor()
    model = llava.model(processor)
    assert judged(model, processor)[vocabulary.FITS] is True
    processor.tokenizer.add_tokens([f"new{i}" for i in range(model.get_input_embeddings().num_embeddings)])
    assert judged(model, processor)[vocabulary.FITS] is False
    assert vocabulary.findings(model, processor.image_processor) == []


def test_check_finds_it_too(tmp_path: Path) -> None:
    """An artifact that was built with a tokenizer of its base, or before the tokenizer was looked at."""
    model = llama()
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    pico.artifact(model, edits, tmp_path / "out", tokenizer=words(eos_token="w9"))
    found = {finding.name: finding for finding in solidify.check(tmp_path / "out").findings}
    assert found[vocabulary.FITS].passed is True
    assert found[vocabulary.ENDS].passed is None and "(id 12)" in found[vocabulary.ENDS].evidence


def test_a_bases_own_tokenizer_is_judged_as_well(tmp_path: Path) -> None:
    """By `build`, where no tokenizer is given and the base's travels, and by `plan`."""
    llama().save_pretrained(tmp_path / "base")
    added("<think>").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    edits = solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    with pytest.raises(ArtifactError, match="'<think>'"):
        solidify.build(model, edits, tmp_path / "out")
    step = {
        "replace": "**.mlp",
        "expect": "LlamaMLP",
        "count": 2,
        "with": f"{pico.HERE}/user_modules/wrappers.py:Scaled",
    }
    recipe = solidify.Recipe.model_validate({"base": {"model": str(tmp_path / "base")}, "surgery": [step]})
    with pytest.raises(RecipeError, match=r"'<think>' \(id 128\).*for a recipe: then save model and tokenizer"):
        solidify.plan(recipe)
    words().save_pretrained(tmp_path / "base")
    solidify.plan(recipe)
