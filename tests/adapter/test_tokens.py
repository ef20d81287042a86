"""Rows of new tokens that are trained alone: attached, saved, loaded, switched off, continued, merged, built upon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pico
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import solidify
from solidify.adapter import lookup, tokens
from solidify.errors import AdapterError
from solidify.merging import mathematics
from solidify.model import anatomy

NEW = [128, 129]


def words() -> PreTrainedTokenizerFast:
    ids = {"<eos>": 0, "<pad>": 1, **{f"w{number}": number for number in range(2, 128)}}
    made = Tokenizer(models.WordLevel(ids, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def llama(**settings: Any) -> PreTrainedModel:
    return pico.llama(**{"eos_token_id": 0, "bos_token_id": None, **settings})


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "untied": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "encoder-decoder": lambda: families.tiny("t5", "AutoModelForSeq2SeqLM"),
}


def artifact(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    tokenizer = words()
    edits = solidify.add_tokens(model, tokenizer, ["<a>", "<b>"], **options)
    return pico.artifact(model, edits, directory, tokenizer=tokenizer)


def batch(model: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = pico.tokens(seed=seed, vocab_size=126)
    ids[:, 2], ids[:, 7] = NEW[0], NEW[1]
    decoder = {"decoder_input_ids": ids} if lookup.plain_model(model).config.is_encoder_decoder else {}
    return {"input_ids": ids, **decoder}


def trained(model: PeftModel, steps: int = 3) -> PeftModel:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for seed in range(steps):
        given = batch(model, seed)
        model(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    return anatomy.run(model, batch(model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_life(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = artifact(MODELS[kind](), tmp_path / "base", pad_to_multiple_of=8)
    model = solidify.load(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    peft_model = solidify.attach(model, lora={"trainable_token_indices": "new"})
    names = {name: p.shape for kind_, name, p in lookup.named_parameters(peft_model) if p.requires_grad and kind_}
    assert set(names.values()) == {(2, next(iter(names.values()))[1])}
    assert len(names) == (2 if kind == "untied" else 1)
    assert torch.equal(logits(peft_model), plain)
    changed = logits(trained(peft_model))
    assert not torch.equal(changed, plain)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), plain)
    solidify.save_adapter(peft_model, tmp_path / "adapter")
    again = solidify.load(base, tmp_path / "adapter")
    assert torch.equal(logits(again), changed)
    monkeypatch.setattr(mathematics, "_BLOCK", 4096)  # some rows at a time, as of a large table
    merged = solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    assert all(finding.passed is not False for finding in merged.findings)
    result = solidify.load(tmp_path / "merged")
    torch.testing.assert_close(logits(result), changed, rtol=1e-5, atol=1e-5)
    moved = {name for name, tensor in result.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.removesuffix(".weight") for name in moved} >= set(names)
    for name in moved:
        rows = (result.state_dict()[name] != before[name]).any(-1).nonzero().flatten().tolist()
        assert rows == NEW, name
    if kind == "tied":
        assert result.lm_head.weight is result.model.embed_tokens.weight
    second = solidify.add_tokens(result, tokenizer := solidify_tokenizer(tmp_path / "merged"), ["<c>"])
    on_it = solidify.load(pico.artifact(result, second, tmp_path / "second", tokenizer=tokenizer))
    assert torch.equal(on_it.get_input_embeddings().weight[128:130], result.get_input_embeddings().weight[128:130])


def solidify_tokenizer(directory: Path) -> Any:
    from solidify.artifact import loading

    return loading.load_tokenizer(directory)


def test_training_goes_on_where_it_was_left(tmp_path: Path) -> None:
    base = artifact(llama(tie_word_embeddings=True), tmp_path / "base")
    model = trained(solidify.attach(solidify.load(base), lora={"trainable_token_indices": "new"}))
    solidify.save_adapter(model, tmp_path / "adapter")
    again = solidify.load_adapter(solidify.load(base), tmp_path / "adapter", trainable=True)
    assert torch.equal(logits(trained(again)), logits(trained(model)))
    plain = PeftModel.from_pretrained(solidify.load(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), logits(solidify.load(base, tmp_path / "adapter")))


@pytest.mark.slow
def test_beside_low_rank_updates_and_by_name(tmp_path: Path) -> None:
    model = solidify.load(artifact(llama(), tmp_path / "base"))
    asked = {"r": 2, "target_modules": "**.q_proj", "trainable_token_indices": {"model.embed_tokens": ["<b>", 5]}}
    peft_model = solidify.attach(model, lora=asked)
    assert tokens.trained(peft_model, "default") == {"model.embed_tokens": [129, 5]}
    solidify.save_adapter(trained(peft_model), tmp_path / "adapter")
    merged = solidify.merge(tmp_path / "adapter", tmp_path / "merged")
    assert all(finding.passed is not False for finding in merged.findings)
    report = solidify.check(tmp_path / "adapter")
    assert report.passed, report.failure()


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "nothing new": (None, "new", "'new' stands for tokens that surgery has added"),
    "no list": (llama, 7, "give 'new', or a list of ids or of added tokens, not 7"),
    "beyond": (llama, [500], "500 is no id of model.embed_tokens, which has 130 rows"),
    "unknown": (llama, ["<z>"], r"'<z>' is no id of .*; added are <a>, <b>"),
    "twice": (llama, [5, 5], "5 is listed twice"),
    "no module": (llama, {"model.embed": [5]}, "'model.embed' hits nothing"),
    "no table": (llama, {"model.norm": [5]}, "model.norm is a LlamaRMSNorm, which has no rows"),
    "tied": (lambda: llama(tie_word_embeddings=True), {"lm_head": [5]}, "lm_head is tied to model.embed_tokens"),
    "bias": (lambda: families.tiny("bert", "AutoModelForMaskedLM"), "new", "decoder has a bias, which PEFT's layer"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_trained_so_is_refused(kind: str, tmp_path: Path) -> None:
    make, asked, sentence = FAULTS[kind]
    if make is None:
        model = llama()
        solidify.replace(model, "**.mlp", pico.wrappers.Scaled)
    else:
        model = solidify.load(artifact(make(), tmp_path / "base"))
    with pytest.raises(AdapterError, match=sentence):
        solidify.attach(model, lora={"trainable_token_indices": asked})
    assert not any(".token_adapter" in name for name, _ in model.named_modules())


def test_rows_and_the_whole_of_one_module_are_two_declarations(tmp_path: Path) -> None:
    model = solidify.load(artifact(llama(), tmp_path / "base"))
    for more in ({"train": "lm_head"}, {"train": "lm_head.weight"}):
        with pytest.raises(AdapterError, match="rows of lm_head would be trained, and it is trained otherwise too"):
            solidify.attach(model, lora={"trainable_token_indices": "new"}, **more)  # type: ignore[arg-type]


def test_two_adapters_of_the_same_rows_are_not_active_together(tmp_path: Path) -> None:
    model = solidify.load(artifact(llama(), tmp_path / "base"))
    peft_model = solidify.attach(model, lora={"trainable_token_indices": "new"})
    solidify.attach(peft_model, lora={"trainable_token_indices": "new"}, name="other")
    with pytest.raises(AdapterError, match="cannot be active together"):
        peft_model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="of lm_head adapter 'default' trains single rows"):
        solidify.attach(peft_model, train="lm_head", name="third")
