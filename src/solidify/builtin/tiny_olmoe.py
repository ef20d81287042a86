"""The embedded base model: a tiny OLMoE, trained at first use on `corpus.py`, kept in the user's cache.

It is small (2.1 million parameters, 4 layers, 16 experts of which 4 run) but genuinely trained: its held-out loss is
far below that of a unigram model. The same machine and versions give the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from solidify.builtin import corpus, names
from solidify.directory import writing
from solidify.system import console, disk
from solidify.weights.hashing import digest_values

NAME = names.TINY_OLMOE
REPORT = ".report.json"  # hidden, so that it does not travel with the files of the model
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
TRAINING = {
    "steps": 450,
    "batch_size": 16,
    "length": 128,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "seed": 0,
}
END, PADDING = "<|endoftext|>", "<|padding|>"


def directory() -> Path:
    """Returns where the model stands, training it first when the cache does not have it (a minute or two)."""
    train, heldout = corpus.texts("train"), corpus.texts("heldout")
    key = digest_values([CONFIG, TRAINING, train, heldout, torch.__version__, REPORT])[:8]
    path = disk.cache() / "models" / f"tiny-olmoe-{key}"
    if not (path / REPORT).is_file():
        disk.cache_for("models")
        with filelock.FileLock(f"{path}.lock"):  # of several processes one trains it, the others wait
            if not (path / REPORT).is_file():
                with writing.staged(path) as staging:
                    _make_model(staging, train, heldout)
    return path


def report() -> dict[str, float]:
    """Returns the model's held-out loss and a unigram model's, in nats per token."""
    figures: dict[str, float] = json.loads((directory() / REPORT).read_text(encoding="utf-8"))
    return figures


def _make_model(staging: Path, train: Sequence[str], heldout: Sequence[str]) -> None:
    tokenizer = _train_tokenizer(train)
    tokens, unseen = _encode_texts(tokenizer, train), _encode_texts(tokenizer, heldout)
    training = "Training builtin:tiny-olmoe, once (a minute or two of two quiet cores)"
    with console.stage(training), torch.random.fork_rng():
        torch.manual_seed(int(TRAINING["seed"]))
        model = OlmoeForCausalLM(OlmoeConfig(**CONFIG, bos_token_id=None))
        _train_model(model, tokens)
    figures = {
        "heldout_loss": heldout_loss(model, unseen),
        "unigram_loss": _unigram_loss(tokens, unseen),
        "train_tokens": len(tokens),
        "heldout_tokens": len(unseen),
    }
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    (staging / REPORT).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=CONFIG["max_position_embeddings"],
    )


def _encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Returns all texts as one row of tokens, each closed by the end token."""
    encode = tokenizer.backend_tokenizer.encode
    return torch.tensor([i for text in texts for i in (*encode(text).ids, CONFIG["eos_token_id"])])


def _train_model(model: OlmoeForCausalLM, tokens: torch.Tensor) -> None:
    steps, batch_size, length = (int(TRAINING[k]) for k in ("steps", "batch_size", "length"))
    rate = float(TRAINING["learning_rate"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rate, weight_decay=float(TRAINING["weight_decay"]), betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(int(TRAINING["seed"]))
    model.train()
    with console.progress("Training", steps) as advance:
        for _ in range(steps):
            starts = torch.randint(0, len(tokens) - length, (batch_size,), generator=generator)
            batch = torch.stack([tokens[start : start + length] for start in starts])
            loss = model(input_ids=batch, labels=batch, output_router_logits=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance(f"loss {loss.item():.2f}")
    model.eval()


def heldout_loss(model: torch.nn.Module, tokens: torch.Tensor, *, length: int = 128) -> float:
    """Returns the mean next-token loss in nats over windows of `length` tokens."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    with torch.no_grad():
        losses = [float(model(input_ids=w, labels=w).loss) * len(w) for w in torch.split(windows, 16)]
    return sum(losses) / len(windows)


def _unigram_loss(tokens: torch.Tensor, unseen: torch.Tensor) -> float:
    """Returns the held-out loss of token frequencies with one added to every count."""
    counts = torch.bincount(tokens, minlength=CONFIG["vocab_size"]).double() + 1
    return float(-(counts / counts.sum()).log()[unseen].mean())
