"""Text comes out of an artifact as out of any model: every cache, every search, and through `pipeline`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

PROMPTS = ["the fox", "a lazy dog jumps over"]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 20},
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {"use_cache": True},
    "static": {"cache_implementation": "static"},
}


def generate(model: PreTrainedModel, batch: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(**batch, max_new_tokens=16, **options)


@pytest.fixture
def batch(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Two prompts of different lengths, padded on the left."""
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("search", SEARCHES)
def test_generating_with_a_cache_equals_without(
    artifact: Path, stranger: Callable[..., PreTrainedModel], batch: Any, search: str, cache: str
) -> None:
    model = stranger(artifact)
    without = generate(model, batch, use_cache=False, **SEARCHES[search])
    assert without.shape[0] == len(PROMPTS) * SEARCHES[search].get("num_return_sequences", 1)
    assert torch.equal(generate(model, batch, **CACHES[cache], **SEARCHES[search]), without)


def test_the_distributions_with_a_cache_are_those_of_one_forward(
    artifact: Path, stranger: Callable[..., PreTrainedModel], batch: Any
) -> None:
    """The tolerance is rounding: float32 sums of 32 terms, over one position or over all."""
    model = stranger(artifact)
    found = generate(model, batch, do_sample=False, return_dict_in_generate=True, output_logits=True)
    length = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 16, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(input_ids=found.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits  # type: ignore[attr-defined]
    torch.testing.assert_close(torch.stack(found.logits, dim=1), whole[:, length - 1 : -1], rtol=1e-5, atol=1e-6)  # type: ignore[attr-defined]


def test_a_row_of_a_padded_batch_generates_what_it_generates_alone(
    artifact: Path, stranger: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, batch: Any
) -> None:
    model = stranger(artifact)
    together = tokenizer.batch_decode(generate(model, batch, do_sample=False), skip_special_tokens=True)
    for prompt, text in zip(PROMPTS, together, strict=True):
        alone = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert tokenizer.decode(generate(model, alone, do_sample=False)[0], skip_special_tokens=True) == text


def test_the_text_generation_pipeline_writes_what_generate_writes(
    artifact: Path, stranger: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    writer = pipeline("text-generation", model=str(artifact), trust_remote_code=True, device="cpu")
    chat = [{"role": "user", "content": "where is the fox?"}]
    wanted = []
    for prompt in (PROMPTS[0], tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        tokens = generate(stranger(artifact), inputs, do_sample=False)[0]
        wanted.append(tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert all(wanted)
    text = writer(PROMPTS[0], max_new_tokens=16, do_sample=False, return_full_text=False)
    assert text == [{"generated_text": wanted[0]}]
    answer = writer(chat, max_new_tokens=16, do_sample=False)[0]["generated_text"]
    assert answer == [*chat, {"role": "assistant", "content": wanted[1]}]
