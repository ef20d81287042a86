"""`cache_prefix` changes no bit, in trainers and in loops of one's own, and layers are not run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract
import pico
import pytest
import torch
from frozen import batches
from frozen_trainer import BERT, Calls, Counted, adapted, losses_of, olmoe, trainer
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.models.bert.modeling_bert import BertAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from trl import DPOConfig

import solidify
from solidify import losses
from solidify.directory import ours
from solidify.errors import ObjectiveError
from solidify.modules.trashcan_moe import TrashCanMoE
from solidify.objective.objective import Objective, Term
from solidify.training.preference import ObjectiveDPOTrainer
from solidify.training.prefix.cached import cache_prefix
from solidify.training.prefix.store import Store
from training import arguments, pairs

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def replaced() -> Any:
    model = pico.olmoe(4)
    solidify.replace(model, "model.layers.3.mlp", TrashCanMoE, expect="OlmoeSparseMoeBlock", count=1)
    return adapted(model, train=["model.layers.3.mlp.trash", "model.layers.3.mlp.gate"])


def whole_layers() -> Any:
    return adapted(pico.llama(num_hidden_layers=4), train=["model.layers.2", "model.layers.3", "lm_head"])


def bert() -> Any:
    return adapted(
        pico.make("BertForSequenceClassification", **BERT, **STILL), train=["bert.encoder.layer.3", "classifier"]
    )


WAYS: dict[str, tuple[Callable[[], Any], type[nn.Module], list[Any]]] = {
    "LoRA on the last layer": (olmoe, OlmoeAttention, [Term("model")]),
    "LoRA, and the base as reference": (olmoe, OlmoeAttention, [Term("model"), Term(losses.forward_kl, 0.5)]),
    "a replaced module": (replaced, OlmoeAttention, [Term("model"), Term(losses.weight_penalty, 0.1)]),
    "whole layers": (whole_layers, LlamaAttention, [Term("model")]),
    "a classifier": (bert, BertAttention, [Term("model")]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_cached_prefix_changes_no_bit(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, kind, terms = WAYS[way]
    set_seed(0)
    plain = trainer(make(), tmp_path / "plain", terms=list(terms), cached=False)
    plain.train()
    set_seed(0)
    cached = trainer(make(), tmp_path / "cached", terms=list(terms))
    counted = Counted(Calls(monkeypatch, kind))
    cached.add_callback(counted)
    cached.train()
    for a, b in zip(plain.state.log_history, cached.state.log_history, strict=True):
        assert {k: v for k, v in a.items() if "runtime" not in k and "per_second" not in k} == {
            k: v for k, v in b.items() if "runtime" not in k and "per_second" not in k
        }
    expected, found = plain.model.state_dict(), cached.model.state_dict()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The last layers alone run from the second epoch on: four micro-batches (and four of the reference).
    layers = 2 if way == "whole layers" else 1
    passes = 8 if "reference" in way else 4
    evaluated = layers  # of the epoch before, whose batch came again
    # Computed again: the first batch of the epoch, the last one, the last one before the evaluation, and its own first.
    again = (7 if "reference" in way else 4) * (4 - layers)
    assert counted.by_epoch[2] == passes * layers + evaluated + again
    assert counted.by_epoch[0] > passes * 4
    assert not (tmp_path / "cached" / "prefix").exists()
    assert "forward" not in {key for module in cached.model.modules() for key in vars(module)}


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_what_is_kept_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    plain = trainer(olmoe(), tmp_path / "plain", cached=False, **saving)
    plain.train()
    first = trainer(olmoe(), tmp_path / "cached", **saving)
    first.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    kept = tmp_path / "cached" / "prefix"
    assert len(list(kept.iterdir())) == 5  # four micro-batches, and the batch of the evaluation
    assert "forward" not in {key for module in first.model.modules() for key in vars(module)}
    resumed = trainer(olmoe(), tmp_path / "cached", **saving)
    calls = Calls(monkeypatch, OlmoeAttention)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cached" / "checkpoint-3"))
    # All four layers, twice, for the first batch of training and of evaluation; else the last one alone, in proofs too.
    # Computed again: the first batch that is read, in training and in evaluation, and the last of all.
    assert calls.count == 2 * 2 * 4 + 2 + 5 + 1 + 3 * 3
    expected, found = plain.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not kept.exists()


def test_a_loop_of_ones_own_reads_what_it_computed(tmp_path: Path) -> None:
    found, cached = losses_of(olmoe(), tmp_path)
    assert found[:2] == found[2:]
    assert (cached.computed, cached.read) == (2, 2)
    again, cached = losses_of(olmoe(), tmp_path, rounds=1)
    assert again == found[:2]
    assert (cached.computed, cached.read) == (1, 1)  # the first batch is computed, and compared with what is kept


def t5() -> Any:
    sizes = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    settings = {"dropout_rate": 0.0, "pad_token_id": 1, "decoder_start_token_id": 0, "use_cache": False}
    model = pico.make("T5ForConditionalGeneration", **sizes, **settings)
    return adapted(model, train=["decoder.block.1"])


def test_a_call_of_another_kind_may_leave_a_prefix_out(tmp_path: Path) -> None:
    """Generation in a training runs the encoder by itself, and gives the model what it returned."""
    model, (first, second) = t5(), batches(2)
    with cache_prefix(model, tmp_path) as cached:
        for batch in (first, second):
            model(**batch).loss.backward()
        assert (cached.computed, cached.read) == (4, 0)
        with torch.no_grad():
            encoded = model.get_base_model().encoder(first["input_ids"])
            given = {"encoder_outputs": encoded, "decoder_input_ids": first["input_ids"]}
            found = [model(**given).logits for _ in range(2)]
        assert (cached.computed, cached.read) == (5, 1)
        model(**first).loss.backward()
        assert (cached.computed, cached.read) == (5, 3)
    assert torch.equal(*found)
    assert torch.equal(found[0], model(**given).logits)


def test_spoilt_files_are_computed_again_and_false_ones_refused(tmp_path: Path) -> None:
    found, _ = losses_of(olmoe(), tmp_path)
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    again, cached = losses_of(olmoe(), tmp_path, rounds=1)
    assert again == found[:2]
    assert cached.computed == 2
    store = Store(tmp_path)
    keys = [path.name.removesuffix(ours.ACTIVATIONS) for path in paths]
    held = [store.get(key, torch.device("cpu")) for key in keys]
    for key, other in zip(keys, reversed(held), strict=True):
        assert other is not None
        store.put(key, other)
    with pytest.raises(ObjectiveError, match=r"is not what model\.layers returns here for the same batch"):
        losses_of(olmoe(), tmp_path)


def test_other_weights_other_batches(tmp_path: Path) -> None:
    _, cached = losses_of(olmoe(), tmp_path)
    model = olmoe()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.gate.weight[0, 0] += 1e-3
    _, other = losses_of(model, tmp_path, rounds=1)
    assert (cached.computed, other.computed, other.read) == (2, 2, 0)


def test_weights_that_are_written_to_are_noticed(tmp_path: Path) -> None:
    model = olmoe()
    with cache_prefix(model, tmp_path) as cached:
        before = [float(model(**batch).loss.detach()) for batch in batches(2)]
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.gate.weight.mul_(-1)
        after = [float(model(**batch).loss.detach()) for batch in batches(2)]
        assert cached.read == 0
        assert cached.computed == 4
    assert before != after
    assert after == [float(model(**batch).loss.detach()) for batch in batches(2)]
    assert not tmp_path.exists()


def test_what_is_no_number_is_not_kept(tmp_path: Path) -> None:
    model = olmoe()
    embedding = model.get_base_model().get_input_embeddings()
    first = batches(2)[0]
    with torch.no_grad():
        before = embedding.weight.clone()
        embedding.weight[int(first["input_ids"][0, 0])] = float("nan")
    with cache_prefix(model, tmp_path, keep=True) as cached:
        model(**first)
        assert not list(tmp_path.iterdir())
        with torch.no_grad():
            embedding.weight.copy_(before)
        model(**first)
        assert cached.computed == 1


def test_preferences_and_their_reference_share_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def preferring(name: str, *, cached: bool) -> Any:
        set_seed(0)
        settings = {
            "max_steps": 4,
            "learning_rate": 0.01,
            "router_aux_loss_coef": 0.0,
            "activation_checkpointing": False,
        }
        kind: Any = ObjectiveDPOTrainer
        return kind(
            olmoe(),
            args=arguments(tmp_path / name, 4, 1, kind=DPOConfig, train_sampling_strategy="sequential", **settings),
            train_dataset=pairs(),
            processing_class=contract.tokenizer(),
            objective=Objective([Term("model")]),
            cache_prefix=cached,
        )

    plain, cached = preferring("plain", cached=False), preferring("cached", cached=True)
    plain.train()
    counted = Counted(Calls(monkeypatch, OlmoeAttention))
    cached.add_callback(counted)
    cached.train()
    expected, found = plain.model.state_dict(), cached.model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The last layer alone, of the model and of its reference, for two batches; the first and the last are compared.
    assert counted.by_epoch[1] == 2 * 2 * (1 + 3)
