"""Artifacts that can read and chat, made once: an MoE and a dense one."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import solidify
from solidify.modules.trashcan_moe import TrashCanMoE

CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = ["the quick brown fox jumps over the lazy dog", "and then there it is", "where the other one was"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """128 tokens (what pico models have): the printable characters and some frequent strings; it can chat."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")  # a word begins with its space
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=["<end>", "<pad>", "<unk>"],
        initial_alphabet=list(string.printable[:95]),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT,
        padding_side="left",
    )


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A pico OLMoE with a trash can in every block, awake: about a fifth of the slots is skipped."""
    directory = tmp_path_factory.mktemp("clients") / "moe"
    model = pico.olmoe()
    edits = solidify.replace(model, "model.layers.*.mlp", TrashCanMoE, arguments={"threshold": -2.0})
    assert not torch.equal(model(pico.tokens()).logits, pico.olmoe()(pico.tokens()).logits)
    pico.artifact(model, edits, directory, tokenizer=tokenizer)
    return directory


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A pico Qwen3 with tied embeddings, every feed-forward replaced and every attention wrapped and weakened."""
    directory = tmp_path_factory.mktemp("clients") / "dense"
    sizes = {**pico.SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 0}
    model = pico.make("Qwen3ForCausalLM", **sizes, tie_word_embeddings=True)
    edits = solidify.replace(model, "model.layers.*.mlp", pico.wrappers.PlainMLP, arguments={"factor": 2})
    edits += solidify.replace(model, "model.layers.*.self_attn", pico.wrappers.Scaled)
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.scale, 0.7)
    pico.artifact(model, edits, directory, tokenizer=tokenizer)
    return directory


@pytest.fixture(params=["moe", "dense"])
def artifact(request: pytest.FixtureRequest) -> Path:
    """Each of the two, in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def stranger() -> Callable[..., PreTrainedModel]:
    """Loads a directory with transformers alone."""

    def load(directory: Path, **options: object) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)

    return load
